"""FP8: float8_e4m3fn weights and activations, one float32 scale each per tensor.

Scale = largest magnitude / 448 (the largest e4m3 value). q, k and v are one weight and so have one
scale; ``mlp.fc`` and ``mlp.gate`` share one as well, for TensorRT-LLM computes them as one product
(``layout.same_scale``). Every expert has a scale of its own, their activations one together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.quantization import Stored
from llmserve.quantization.amax import row_amax
from llmserve.quantization.scales import symmetric_scale

CALIBRATED = True
ROWWISE = False

_MAX = 448.0


def quantize(
    weight: torch.Tensor,
    input_amax: torch.Tensor | None = None,
    smoothquant_val: float = 0.5,
    weight_amax: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Quantise to ``weight`` e4m3 (..., out, in) and the scales of weights and activations.

    ``weights_scaling_factor`` is float32 (1,), of experts (experts, 1);
    ``activation_scaling_factor`` float32 (1,), for the largest of the input channels' ranges.
    """
    if input_amax is None:
        raise ValueError("FP8 needs the range of the linear's inputs")
    amax = row_amax(weight).amax(-1, keepdim=True)
    if weight_amax is not None:
        amax = torch.maximum(amax, weight_amax)
    scale = symmetric_scale(amax, _MAX, weight.dtype)
    # The division promotes to float32, so this is the only copy of the weight in it.
    q = torch.div(weight, scale[..., None]).to(torch.float8_e4m3fn)
    input_scale = symmetric_scale(input_amax.amax().reshape(1), _MAX, weight.dtype)
    return {
        "weight": q,
        "weights_scaling_factor": scale,
        "activation_scaling_factor": input_scale,
    }


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``weight * weights_scaling_factor`` in float32 (..., out, in)."""
    return tensors["weight"].float() * tensors["weights_scaling_factor"][..., None]


def stored(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Stored]:
    """A float8_e4m3fn weight and its two float32 scales."""
    scale = TensorSpec((*shape[:-2], 1), torch.float32)
    return {
        "weight": Stored(TensorSpec(shape, torch.float8_e4m3fn), "weight"),
        "weights_scaling_factor": Stored(scale, "nothing"),
        "activation_scaling_factor": Stored(TensorSpec((1,), torch.float32), "nothing"),
    }
