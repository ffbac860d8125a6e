"""Writes a safetensors file tensor by tensor, which the safetensors library cannot.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length as a
little-endian integer, a JSON header padded with spaces to a multiple of eight, then the values
without gaps. All names, shapes and dtypes are known in advance, so the header goes first and every
tensor to its place as it comes, whole or some rows at a time; nothing is held.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import torch

from llmserve.checkpoint.scratch import Scratch
from llmserve.checkpoint.tensor_spec import SAFETENSORS_DTYPES, TensorSpec
from llmserve.checkpoint.unbuffered_file import UnbufferedFile
from llmserve.errors import CheckpointError

_NAMES_OF_DTYPES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_COPY_BYTES = 2**22


class StreamingWriter:
    """One safetensors file in the making. Use as a context manager.

    Leaving the context without an error checks that every tensor was written and makes the file
    durable. After an error the file is left as it is. Several threads may write different tensors.

    Args:
        path: The file.
        specs: Every tensor that will be written.
        resume: Go on with a file that is there; without it there must be none.

    Raises:
        FileExistsError: There is a file, and ``resume`` is off.
        CheckpointError: The file to go on with is not the beginning of this one.
        OSError: The file system refuses, e.g. a full disk.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], *, resume: bool = False
    ) -> None:
        self.path = path
        self._specs = dict(specs)
        self._begins: dict[str, int] = {}  # of each tensor, in bytes of the file
        self._written = dict.fromkeys(specs, 0)  # bytes of each tensor
        self._started: set[str] = set()
        self.header = self._layout()
        """The bytes before the first value."""
        num_bytes = len(self.header) + sum(spec.nbytes for spec in specs.values())
        if resume and (not path.is_file() or path.stat().st_size != num_bytes):
            raise CheckpointError(f"{path} is not the file that was begun")
        if not resume:
            path.touch(exist_ok=False)
        self._file = UnbufferedFile(path, num_bytes)
        if resume and self._file.read(0, len(self.header)) != self.header:
            self._file.close()
            raise CheckpointError(f"{path} is not the file that was begun")
        if not resume:
            self._file.write_at(0, torch.frombuffer(bytearray(self.header), dtype=torch.uint8))

    def __enter__(self) -> StreamingWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None:
                return
            if missing := {name for name in self._specs if not self._complete(name)}:
                raise CheckpointError(f"{self.path} lacks {_some(missing)}")
            self._file.sync()
        finally:
            self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor to its place. The order is free.

        Raises:
            CheckpointError: The name is unknown or was written, or shape or dtype differ from
                what was announced.
            OSError: The file system refuses, e.g. a full disk.
        """
        spec, given = self._spec(name), TensorSpec(tuple(tensor.shape), tensor.dtype)
        if name in self._started:
            raise CheckpointError(f"{name} was written to {self.path} before")
        if given != spec:
            raise CheckpointError(f"{name} is {given}; {self.path} wants {spec}")
        self._started.add(name)
        values, scratch = tensor.contiguous().view(-1), Scratch()
        for part in torch.split(values, _COPY_BYTES // tensor.element_size()):
            # Copied to where unbuffered writing wants it, which costs less than the page cache.
            aligned = scratch.tensor(
                "part", tuple(part.shape), part.dtype, file_offset=self.position(name)
            )
            self.append(name, aligned.copy_(part))

    def append(self, name: str, values: torch.Tensor) -> None:
        """Write the next values of a tensor behind those that were written.

        Args:
            name: The tensor.
            values: Contiguous, in its dtype; any shape. Fastest where they begin as far into a
                page of memory as ``position`` is into one of the file.

        Raises:
            CheckpointError: The name is unknown, the dtype another, or there are too many values.
            OSError: The file system refuses, e.g. a full disk.
        """
        spec, begin = self._spec(name), self._written[name]
        if values.dtype != spec.dtype or begin + values.nbytes > spec.nbytes:
            given = TensorSpec(tuple(values.shape), values.dtype)
            raise CheckpointError(
                f"{given} does not fit behind {begin} bytes of {name}, {spec} in {self.path}"
            )
        self._started.add(name)
        self._file.write_at(self.position(name), values)
        self._written[name] += values.nbytes

    def position(self, name: str) -> int:
        """Where the next values of a tensor go, in bytes of the file."""
        return self._begins[name] + self._written[name]

    def names_in_order(self) -> list[str]:
        """The names of all tensors as they stand in the file."""
        return list(self._begins)

    def keep(self, name: str) -> None:
        """Take a tensor of a file that is gone on with for written."""
        self._written[name] = self._spec(name).nbytes
        self._started.add(name)

    def read(self, name: str, part_bytes: int) -> Iterator[bytes]:
        """A tensor's bytes as they stand in the file, some at a time."""
        begin, num_bytes = self._begins[name], self._spec(name).nbytes
        for at in range(0, num_bytes, part_bytes):
            yield self._file.read(begin + at, min(part_bytes, num_bytes - at))

    def close(self) -> None:
        """Close the file as it is; leaving the context does."""
        self._file.close()

    def sync(self) -> None:
        """Make what was written durable.

        Raises:
            OSError: The disk is failing.
        """
        self._file.sync()

    def _spec(self, name: str) -> TensorSpec:
        if name not in self._specs:
            raise CheckpointError(f"{name} has no place in {self.path}")
        return self._specs[name]

    def _complete(self, name: str) -> bool:
        return name in self._started and self._written[name] == self._specs[name].nbytes

    def _layout(self) -> bytes:
        """Give every tensor its place and return the header."""
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
            self._begins[name] = begin
            begin = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        data_start = 8 + len(text)
        self._begins = {name: data_start + place for name, place in self._begins.items()}
        return len(text).to_bytes(8, "little") + text


def _some(names: set[str]) -> str:
    """Up to three names, and how many more there are."""
    shown = sorted(names)[:3]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
