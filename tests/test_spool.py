"""A spool gives back what was added, from memory or from the disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from loyalty.errors import NoTempSpace
from loyalty.recount.spool import Spool

CHUNKS = [b"a", b"\0" * 5_000, bytes(range(256)) * 40]


@pytest.mark.parametrize("max_memory_bytes", [1, 100, 1_000_000])
def test_the_chunks_are_read_in_the_order_in_which_they_were_added(max_memory_bytes: int) -> None:
    spool = Spool(max_memory_bytes)
    for chunk in CHUNKS:
        spool.add(chunk)
    assert list(spool) == list(spool) == CHUNKS


@contextmanager
def limited_file_size(max_bytes: int) -> Iterator[None]:
    """Let every write to a file beyond `max_bytes` fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_of_add_and_not_of_the_deletion() -> None:
    spool = Spool(max_memory_bytes=100)
    with limited_file_size(1_000):
        spool.add(b"x" * 500)
        with pytest.raises(NoTempSpace, match="no temporary disk space: File too large"):
            spool.add(b"x" * 5_000)
        del spool  # pytest reports an exception in a destructor
