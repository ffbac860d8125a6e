"""Where tensors come from, whatever holds them: a file, several ranks' files, a conversion."""

from __future__ import annotations

from typing import Protocol

import torch

from llmserve.checkpoint.tensor_spec import TensorSpec


class TensorSource(Protocol):
    """Named tensors that are read when they are asked for."""

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor, without its values.

        Raises:
            CheckpointError: There is no such tensor.
        """
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU; never write to it.

        Raises:
            CheckpointError: There is no such tensor, or it cannot be read.
        """
        ...
