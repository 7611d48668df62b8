"""What is too much for memory, for a while: chunks of bytes in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import suppress
from typing import Self

from loyalty.errors import NoTempSpace

MEMORY_BYTES = 2 * 1024 * 1024  # more than that goes to the disk
_LENGTH = 4


class Spool:
    """Chunks that are read in the order in which they were added; close it at the end."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=MEMORY_BYTES)  # noqa: SIM115 -- close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # of a result that nobody came to read

    def close(self) -> None:
        with suppress(OSError):  # a full disk says so once more
            self._file.close()

    def add(self, chunk: bytes) -> None:
        """Add a chunk. Raises NoRoom."""
        try:
            self._file.write(len(chunk).to_bytes(_LENGTH, "little") + chunk)
            self._file.flush()  # or a full disk would show up much later
        except OSError as error:
            # Not gettempdir(), which raises where no directory is usable.
            where = f" in {tempfile.tempdir}" if tempfile.tempdir else ""
            raise NoTempSpace(f"no temporary disk space{where}: {error.strerror}") from error

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        while length := self._file.read(_LENGTH):
            yield self._file.read(int.from_bytes(length, "little"))
