"""Root-mean-square norm (Zhang and Sennrich 2019), in float32 whatever the dtype of its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Normalise each row to a root mean square of 1 and multiply by ``weight``.

    Args:
        x: (tokens, hidden), any float dtype.
        weight: (hidden,), the dtype of ``x``.
        epsilon: Added to the mean square.

    Returns:
        (tokens, hidden) in the dtype of ``x``; it is rounded once before the weight, as Hugging
        Face's Llama does.
    """
    if x.dtype == torch.float32:
        return F.rms_norm(x, (x.shape[-1],), weight, epsilon)
    # It sums in float32; with the weight inside it would round one time less.
    return F.rms_norm(x, (x.shape[-1],), None, epsilon) * weight


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The definition, a row at a time in float64; float64 out."""
    rows = [row / torch.sqrt((row * row).mean() + epsilon) for row in x.double()]
    return torch.stack(rows) * weight.double()
