"""Reads safetensors files lazily: names and specs first, values only when asked for, mapped.

It knows files, not models. A file that is missing, cut short or no safetensors file is an error
that names it and says what to do.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmserve.checkpoint.scratch import bytes_of
from llmserve.checkpoint.tensor_spec import SAFETENSORS_DTYPES, TensorSpec
from llmserve.errors import CheckpointError, CheckpointNotFoundError, UnsupportedCheckpointError

_LIBC = ctypes.CDLL(None)
_DROP = mmap.MADV_DONTNEED
_GIT_LFS_POINTER = b"version https://git-lfs"


class RankReader:
    """One safetensors file, e.g. a checkpoint's or an engine's ``rank0.safetensors``.

    Tensors are mapped: their pages are read when they are used and stay valid after the reader is
    closed. Use as a context manager.

    Args:
        path: The file.

    Attributes:
        path: The file.
        header: Its bytes before the first value; empty until ``open_for_reading``.

    Raises:
        CheckpointNotFoundError: There is no such file.
        CheckpointError: It is cut short or is no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise CheckpointNotFoundError(f"there is no file {path}")
        try:
            self._file: Any = safe_open(path, framework="pt").__enter__()  # type: ignore[no-untyped-call]
        except SafetensorError as error:
            raise CheckpointError(_unreadable(path, error)) from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self._names = frozenset(self._file.keys())
        self.header = b""
        self._descriptor: int | None = None
        self._begins: dict[str, int] = {}  # of each tensor's values, in bytes of the file

    def __enter__(self) -> RankReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Tensors that were read stay valid."""
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._file = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._names)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, from the file's header.

        Raises:
            CheckpointError: There is no such tensor here.
            UnsupportedCheckpointError: A dtype that no artefact of ours has.
        """
        part = self._open(name).get_slice(name)
        dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            raise UnsupportedCheckpointError(
                f"{name} in {self.path} has dtype {part.get_dtype()}, which is not implemented"
            )
        return TensorSpec(tuple(part.get_shape()), dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, its values mapped from the file; never write to it.

        Raises:
            CheckpointError: There is no such tensor here, or it cannot be read.
        """
        file = self._open(name)
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} in {self.path} cannot be read: {error}") from error
        return tensor

    def open_for_reading(self) -> None:
        """Prepare ``read_into``, which several threads may then call at once, and ``header``.

        Raises:
            CheckpointError: The file cannot be opened, or its header not be understood.
        """
        if self._descriptor is not None:
            return
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            self.header = os.pread(self._descriptor, 8 + length, 0)
            header = json.loads(self.header[8:])
            begins = {name: header[name]["data_offsets"][0] for name in self._names}
            order = sorted(begins.items(), key=lambda item: (item[1], item[0]))
            self._begins = {name: 8 + length + begin for name, begin in order}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error

    def names_in_order(self) -> list[str]:
        """The names of all tensors as they stand in the file; after ``open_for_reading``."""
        return list(self._begins)

    def read_into(self, name: str, begin: int, out: torch.Tensor) -> None:
        """Fill ``out`` with a tensor's bytes from byte ``begin`` of it on; nothing is mapped.

        Args:
            name: The tensor.
            begin: Of its values, in bytes.
            out: Contiguous, of any dtype.

        Raises:
            CheckpointError: There is no such tensor here, the file cannot be read, or has become
                shorter.
        """
        self._open(name)
        if self._descriptor is None:
            raise ValueError(f"{self.path} is not open for reading")
        view = bytes_of(out)
        position = self._begins[name] + begin
        while view:
            try:
                count = os.preadv(self._descriptor, [view], position)
            except OSError as error:
                raise CheckpointError(f"{name} in {self.path} cannot be read: {error}") from error
            if count == 0:
                raise CheckpointError(f"{self.path} was cut short while it was read")
            view, position = view[count:], position + count

    def drop_pages(self, name: str) -> None:
        """Let go of the memory behind a mapped tensor that was copied; it can be read again.

        Until then the pages count as this process's, though the system may take them back.
        """
        tensor = self.tensor(name)
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
        if last > first:
            length = (last - first) * mmap.PAGESIZE
            _LIBC.madvise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(length), _DROP)

    def _open(self, name: str) -> Any:
        if self._file is None:
            raise ValueError(f"{self.path} is closed")
        if name not in self._names:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._file


def _unreadable(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        head = file.read(len(_GIT_LFS_POINTER))
    if head == _GIT_LFS_POINTER:
        return f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` there"
    return (
        f"{path} is cut short or is no safetensors file ({error}); if it was downloaded, "
        "download it again"
    )
