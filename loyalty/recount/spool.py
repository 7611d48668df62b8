"""A temporary file of byte chunks, for data that does not fit in memory."""

import tempfile
from collections.abc import Iterator
from contextlib import suppress

from loyalty.errors import NoTempSpace

MAX_MEMORY_BYTES = 1024 * 1024
"""More than this goes to the disk."""
_LENGTH_BYTES = 4


class Spool:
    """Chunks, read in the order in which they were added. The file is deleted with the object."""

    def __init__(self, max_memory_bytes: int = MAX_MEMORY_BYTES) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_memory_bytes)  # noqa: SIM115 -- see __del__

    def __del__(self) -> None:
        with suppress(OSError):  # a full disk fails once more
            self._file.close()

    def add(self, chunk: bytes) -> None:
        """Add a chunk. Raises NoTempSpace."""
        try:
            self._file.write(len(chunk).to_bytes(_LENGTH_BYTES, "little") + chunk)
            self._file.flush()  # otherwise a full disk would be reported much later
        except OSError as error:
            raise NoTempSpace(f"no temporary disk space: {error.strerror}") from error

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        while length := self._file.read(_LENGTH_BYTES):
            yield self._file.read(int.from_bytes(length, "little"))
