"""No quantisation: the weight as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.quantization import Stored

CALIBRATED = False
ROWWISE = True


def quantize(
    weight: torch.Tensor,
    input_amax: torch.Tensor | None = None,
    smoothquant_val: float = 0.5,
    weight_amax: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return the weight itself."""
    return {"weight": weight}


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the weight in float32."""
    return tensors["weight"].float()


def stored(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Stored]:
    """One tensor in the model's dtype."""
    return {"weight": Stored(TensorSpec(shape, dtype), "weight")}
