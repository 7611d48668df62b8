"""A relay in front of a server: it adds latency, or the faults of a bad network."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from enum import StrEnum

_CHUNK = 256 * 1024
_MAX_ANSWERS = 12  # the handshakes of TLS and of the driver, the login, and a few commands


class Fault(StrEnum):
    """What a relay does to one connection."""

    CLOSE = "close"
    """Close it at once."""
    RESET = "reset"
    """Reset it at once: the client receives an RST."""
    STALL = "stall"
    """Accept it, and never answer."""
    CUT_HANDSHAKE = "cut_handshake"
    """Close it after half of the server's first answer, which belongs to the TLS handshake."""
    CUT_REPLY = "cut_reply"
    """Close it after half of a later answer."""
    STALL_REPLY = "stall_reply"
    """Forward half of a later answer, and then nothing, but leave it open."""


End = Callable[[], Fault | None]
"""Says for each answer of the server whether, and how, the connection ends with it."""


class FaultCycle:
    """The faults of a relay. Its owner may change `is_active` while the relay runs.

    Each new connection has the next fault. After one of each, connections work for
    `working_seconds`; then every open one ends with its next answer, by CUT_REPLY and by
    STALL_REPLY in turn, and the cycle starts again. With `working_seconds` 0, none works.
    """

    def __init__(self, working_seconds: float = 0) -> None:
        self.working_seconds = working_seconds
        self.is_active = True
        """Without it, all connections work, except those that have stalled."""
        self.counts: Counter[Fault] = Counter()
        self._faults = [fault for fault in Fault if fault is not Fault.STALL_REPLY]
        self._connections = self._cycles = 0
        self._working_until = 0.0
        self._rng = random.Random(1)

    def next_fault(self) -> Fault | None:
        """Return the fault of a new connection; None if it works for now."""
        if not self.is_active or time.monotonic() < self._working_until:
            return None
        if self._connections == len(self._faults):
            self._connections = 0
            if self.working_seconds:
                self._cycles += 1
                self._working_until = time.monotonic() + self.working_seconds
                return None
        self._connections += 1
        return self._faults[self._connections - 1]

    def plan_end(self, fault: Fault | None) -> End:
        """Return the function that ends a connection which has this fault, or none yet."""
        answers = self._rng.randint(3, _MAX_ANSWERS) if fault is Fault.CUT_REPLY else 1
        working_until = self._working_until
        last = Fault.CUT_REPLY if self._cycles % 2 else Fault.STALL_REPLY

        def end() -> Fault | None:
            nonlocal answers
            answers -= 1
            is_due = time.monotonic() >= working_until if fault is None else answers <= 0
            if not self.is_active or not is_due:
                return None
            self.counts[fault or last] += 1
            return fault or last

        return end


def _never_end() -> Fault | None:
    return None


@contextmanager
def relay(port: int, round_trip: float = 0, faults: FaultCycle | None = None) -> Iterator[int]:
    """Forward connections to `port`, with a delay of half of `round_trip` (seconds) each way.

    Yields the relay's port. The bandwidth is not limited.
    """
    started: Future[tuple[int, Callable[[], object]]] = Future()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = faults.next_fault() if faults else None
        end = faults.plan_end(fault) if faults else _never_end
        with suppress(asyncio.CancelledError), closing(writer):  # cancelled at the end of the block
            if fault in (Fault.CLOSE, Fault.RESET, Fault.STALL):
                end()
                await _fail(fault, reader, writer)
                return
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
            delay = round_trip / 2
            with closing(server_writer):
                await asyncio.gather(
                    _forward(reader, server_writer, delay, _never_end),
                    _forward(server_reader, writer, delay, end),
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


async def _fail(fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """End a connection that never reaches the server."""
    if fault is Fault.STALL:
        with suppress(ConnectionError):
            while await reader.read(_CHUNK):  # until the client gives up
                pass
    if fault is Fault.RESET:
        # With a linger time of 0, the kernel sends an RST.
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()


async def _forward(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float, end: End
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
            fault = end()
            delayed.put_nowait((loop.time() + delay, chunk[: len(chunk) // 2] if fault else chunk))
            if fault is Fault.STALL_REPLY:
                while await reader.read(_CHUNK):  # until the client, and then the server, gives up
                    pass
            if fault:
                break
    delayed.put_nowait((loop.time() + delay, b""))
    await sender
