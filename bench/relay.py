"""A server that is further away: a relay in front of it that lets all bytes through, later."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

_CHUNK = 256 * 1024


@contextmanager
def relay(port: int, round_trip: float) -> Iterator[int]:
    """Pass connections on to `port` here, half of `round_trip` (seconds) late each way.

    Gives its own port. Bytes in flight are not limited: it adds latency, and takes no bandwidth.
    """
    started: Future[tuple[int, Callable[[], object]]] = Future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):  # at the end of the block
            there, back = await asyncio.open_connection("127.0.0.1", port)
            delay = round_trip / 2
            await asyncio.gather(_pass_on(reader, back, delay), _pass_on(there, writer, delay))

    async def serve() -> None:
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        own = server.sockets[0].getsockname()[1]
        started.set_result((own, lambda: loop.call_soon_threadsafe(stopped.set)))
        await stopped.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    own, stop = started.result()
    try:
        yield own
    finally:
        stop()
        thread.join()


async def _pass_on(
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
