"""A relay in front of a server that adds latency, like a distant server."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

_CHUNK = 256 * 1024


@contextmanager
def relay(port: int, round_trip: float) -> Iterator[int]:
    """Forward connections to `port`, with a delay of half of `round_trip` (seconds) each way.

    Yields the relay's port. The bandwidth is not limited.
    """
    started: Future[tuple[int, Callable[[], object]]] = Future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):  # at the end of the block
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
            delay = round_trip / 2
            await asyncio.gather(
                _forward(reader, server_writer, delay), _forward(server_reader, writer, delay)
            )

    async def serve() -> None:
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        relay_port = server.sockets[0].getsockname()[1]
        started.set_result((relay_port, lambda: loop.call_soon_threadsafe(stopped.set)))
        await stopped.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    relay_port, stop = started.result()
    try:
        yield relay_port
    finally:
        stop()
        thread.join()


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float
) -> None:
    loop = asyncio.get_running_loop()
    delayed: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def send() -> None:
        while True:
            due, chunk = await delayed.get()
            await asyncio.sleep(due - loop.time())
            if not chunk:
                writer.close()
                return
            writer.write(chunk)

    sender = asyncio.create_task(send())
    with suppress(ConnectionError):
        while chunk := await reader.read(_CHUNK):
            delayed.put_nowait((loop.time() + delay, chunk))
    delayed.put_nowait((loop.time() + delay, b""))
    await sender
