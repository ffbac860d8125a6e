"""Writes a safetensors file tensor by tensor, which the safetensors library cannot.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length as a
little-endian integer, a JSON header padded with spaces to a multiple of eight, then the values
without gaps. All names, shapes and dtypes are known in advance, so the header goes first and every
tensor to its place as it comes; nothing is held.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch

from llmserve.checkpoint.tensor_spec import SAFETENSORS_DTYPES, TensorSpec
from llmserve.errors import CheckpointError

_NAMES_OF_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


class StreamingWriter:
    """One safetensors file in the making. Use as a context manager.

    Leaving the context without an error checks that every tensor was written and makes the file
    durable. After an error the file is left as it is: its directory is thrown away.

    Args:
        path: The file; it must not exist.
        specs: Every tensor that will be written.

    Raises:
        OSError: The file system refuses, e.g. a full disk.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path = path
        self._specs = dict(specs)
        self._offsets: dict[str, int] = {}
        self._missing = set(specs)
        header = self._layout()
        self._file = path.open("xb")
        self._file.write(header)

    def __enter__(self) -> StreamingWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            if error is not None:
                return
            if self._missing:
                raise CheckpointError(f"{self.path} lacks {_some(self._missing)}")
            self._file.flush()
            os.fsync(self._file.fileno())

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place. The order is free; writing in spec order seeks least.

        Raises:
            CheckpointError: The name is unknown or was written, or shape or dtype differ from
                what was announced.
            OSError: The file system refuses, e.g. a full disk.
        """
        if name not in self._specs:
            raise CheckpointError(f"{name} has no place in {self.path}")
        if name not in self._missing:
            raise CheckpointError(f"{name} was written to {self.path} before")
        spec, given = self._specs[name], TensorSpec(tuple(tensor.shape), tensor.dtype)
        if given != spec:
            raise CheckpointError(f"{name} is {given}; {self.path} wants {spec}")
        self._file.seek(self._offsets[name])
        self._file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._missing.remove(name)

    def _layout(self) -> bytes:
        """Give every tensor its offset and return the header."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        # Wide dtypes first, as the library does: then every tensor is aligned to its element.
        order = sorted(self._specs.items(), key=lambda item: -item[1].dtype.itemsize)
        begin = 0
        for name, spec in order:
            end = begin + spec.nbytes
            header[name] = {
                "dtype": _NAMES_OF_DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begin, end],
            }
            self._offsets[name] = begin
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data_start = 8 + len(text)
        self._offsets = {name: data_start + offset for name, offset in self._offsets.items()}
        return len(text).to_bytes(8, "little") + text


def _some(names: set[str]) -> str:
    """Up to three names, and how many more there are."""
    shown = sorted(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
