"""No quantisation: the weight as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weight itself."""
    return {"weight": weight}


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight in float32."""
    return tensors["weight"].float()


def stored(
    out_features: int, in_features: int, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """One tensor in the model's dtype."""
    return {"weight": ((out_features, in_features), dtype)}
