"""Reads safetensors files lazily: names and specs first, values only when asked for, mapped.

It knows files, not models. A file that is missing, cut short or no safetensors file is an error
that names it and says what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmserve.checkpoint.tensor_spec import SAFETENSORS_DTYPES, TensorSpec
from llmserve.errors import CheckpointError, CheckpointNotFoundError, UnsupportedCheckpointError

_GIT_LFS_POINTER = b"version https://git-lfs"


class RankReader:
    """One safetensors file, e.g. a checkpoint's or an engine's ``rank0.safetensors``.

    Tensors are mapped: their pages are read when they are used and stay valid after the reader is
    closed. Use as a context manager.

    Args:
        path: The file.

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

    def __enter__(self) -> RankReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Tensors that were read stay valid."""
        if self._file is not None:
            self._file.__exit__(None, None, None)
            self._file = None

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
