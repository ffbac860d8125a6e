"""Memory that is used over and over by work that goes through tensors a few rows at a time.

Fresh memory costs more than the work done in it: every page of it is a fault, and an allocator
gives large blocks back as soon as they are free.
"""

from __future__ import annotations

import math

import torch

# What unbuffered files want: places in memory and in the file that are the same within a page.
PAGE_BYTES = 4096


class Scratch:
    """One thread's tensors, by what they are used for; asking again gives the same memory."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def tensor(
        self, use: str, shape: tuple[int, ...], dtype: torch.dtype, *, file_offset: int = 0
    ) -> torch.Tensor:
        """A contiguous tensor of unspecified values.

        Args:
            use: Tensors with different uses never overlap.
            shape: Of it.
            dtype: Of it.
            file_offset: Where it will be written, in bytes, a multiple of the dtype's size: it
                begins as far into a page of memory as this is into one of the file.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(use)
        if buffer is None or buffer.numel() < num_bytes + PAGE_BYTES:
            buffer = torch.empty(num_bytes + PAGE_BYTES, dtype=torch.uint8)
            self._buffers[use] = buffer
        begin = (file_offset - buffer.data_ptr()) % PAGE_BYTES
        return buffer[begin : begin + num_bytes].view(dtype).view(shape)


def bytes_of(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    view: memoryview = values.view(-1).view(torch.uint8).numpy().data
    return view
