"""What a tensor-parallel rank needs of the others, and the linear that adds up their results.

Every rank computes the same rows with its share of each layer: see ``checkpoint.sharding``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from llmserve.runtime.torch.kernels.linear import Linear


class RankGroup(Protocol):
    """The ranks of one engine. Every rank makes the same calls in the same order."""

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Add up all ranks' ``x`` (one shape and dtype), in place; returns ``x``."""
        ...

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' ``x`` side by side in the last dimension, in the order of the ranks."""
        ...

    def broadcast_(self, x: torch.Tensor) -> torch.Tensor:
        """Give every rank the values of rank 0's ``x``, in place; returns ``x``."""
        ...


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """A linear of which each rank has a share of the inputs: the ranks' products are added up.

    Attributes:
        partial: The rank's product, without a bias.
        bias: (out,), added once, to the sum; or None.
        group: All ranks.
    """

    partial: Linear
    bias: torch.Tensor | None
    group: RankGroup

    @property
    def weights_bytes(self) -> int:
        """Bytes of the rank's share and the bias."""
        return self.partial.weights_bytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, the rank's share of in) -> (tokens, out)."""
        y = self.group.all_reduce_(self.partial(x))
        return y if self.bias is None else y.add_(self.bias)
