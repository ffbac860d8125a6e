"""A file of known size, written in any order past the page cache.

A checkpoint is larger than the memory of many machines that convert it, and nobody reads it while
it is written. Written through the page cache it would push out everything else, and on a virtual
machine, where the hypervisor provides each fresh page, the cache costs more time than the disk.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import torch

from llmserve.checkpoint.scratch import PAGE_BYTES, bytes_of

# Below this one more trip to the disk costs more than a copy into the page cache.
_MIN_DIRECT_BYTES = 2**16


class UnbufferedFile:
    """A file in the making, its whole size reserved, so that a full disk is found at once.

    Whole pages go past the cache if memory and file are aligned alike (``Scratch`` sees to that)
    and the file system can (O_DIRECT); all else goes through it. Several threads may write to
    different places. Opening one that is there keeps its bytes.

    Args:
        path: The file.
        num_bytes: Its size.

    Raises:
        OSError: The file system refuses, e.g. a full disk.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._direct: int | None = None
        try:
            if num_bytes:
                os.posix_fallocate(self._descriptor, 0, num_bytes)
            self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EINVAL:  # what a file system without O_DIRECT says
                os.close(self._descriptor)
                raise

    def close(self) -> None:
        """Close it. What was written since ``sync`` may not be durable."""
        os.close(self._descriptor)
        if self._direct is not None:
            os.close(self._direct)

    def write_at(self, offset: int, values: torch.Tensor) -> None:
        """Write a contiguous tensor's bytes from byte ``offset`` on.

        Raises:
            OSError: The file system refuses.
        """
        view = bytes_of(values)
        head = min(-offset % PAGE_BYTES, len(view))
        body = (len(view) - head) // PAGE_BYTES * PAGE_BYTES
        aligned = (values.data_ptr() - offset) % PAGE_BYTES == 0
        if self._direct is None or not aligned or body < _MIN_DIRECT_BYTES:
            _write(self._descriptor, view, offset)
            return
        # The first and the last page are shared with what stands before and behind.
        _write(self._descriptor, view[:head], offset)
        _write(self._descriptor, view[head + body :], offset + head + body)
        try:
            _write(self._direct, view[head : head + body], offset + head)
        except OSError as error:
            # A disk with larger sectors, or the rest of a write that was cut at no sector's end.
            if error.errno != errno.EINVAL:
                raise
            _write(self._descriptor, view[head : head + body], offset + head)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Bytes from ``offset`` on; fewer at the end."""
        return os.pread(self._descriptor, num_bytes, offset)

    def sync(self) -> None:
        """Make what was written durable.

        Raises:
            OSError: The disk is failing.
        """
        os.fsync(self._descriptor)


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count
