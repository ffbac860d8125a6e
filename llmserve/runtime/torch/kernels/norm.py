"""Root-mean-square norm (Zhang and Sennrich 2019), in float32 whatever the dtype of its input."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, round_last: bool = False
) -> torch.Tensor:
    """Normalise each row to a root mean square of 1 and multiply by ``weight``.

    Args:
        x: (..., size), any float dtype.
        weight: (size,), the dtype of ``x``.
        epsilon: Added to the mean square.
        round_last: Multiply in float32 and round the product, as Hugging Face's Gemma does; the
            others round before the weight as well.

    Returns:
        (..., size) in the dtype of ``x``.
    """
    if x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    if round_last:
        return F.rms_norm(x.float(), weight.shape, weight.float(), epsilon).to(x.dtype)
    # It sums in float32; with the weight inside it would round one time less.
    return F.rms_norm(x, weight.shape, None, epsilon) * weight


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The definition, a row at a time in float64; float64 out."""
    rows = [row / torch.sqrt((row * row).mean() + epsilon) for row in x.double()]
    return torch.stack(rows) * weight.double()
