"""FP8_PER_CHANNEL_PER_TOKEN: float8_e4m3fn weights, one float32 scale per output channel.

Scale = amax of the row / 448 (the largest e4m3 value), at least 1 / (448 * 512), as TensorRT-LLM
has it; activations are quantised per token at run time where the hardware has FP8 products.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmserve.checkpoint.scratch import Scratch
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.quantization import Stored
from llmserve.quantization.amax import row_amax
from llmserve.quantization.rowwise import QuantizedRows, scaled_square

CALIBRATED = False
ROWWISE = True

_MAX = 448.0
_MIN_SCALE = 1.0 / (_MAX * 512.0)


def quantize(
    weight: torch.Tensor,
    input_amax: torch.Tensor | None = None,
    smoothquant_val: float = 0.5,
    weight_amax: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Quantise to ``weight`` e4m3 (..., out, in) and ``per_channel_scale`` float32 (..., out)."""
    scale = (row_amax(weight) / _MAX).clamp_(min=_MIN_SCALE)
    # The division promotes to float32, so this is the only copy of the weight in it.
    q = torch.div(weight, scale[..., None]).to(torch.float8_e4m3fn)
    return {"weight": q, "per_channel_scale": scale}


def quantize_rows(
    rows: torch.Tensor, amax: torch.Tensor, out: torch.Tensor, scratch: Scratch
) -> QuantizedRows:
    """Quantise some rows (rows, in) into ``out``; see ``RowwiseFormat``."""
    shape = tuple(rows.shape)
    scale = (amax / _MAX).clamp_(min=_MIN_SCALE)
    scaled = torch.div(rows, scale[:, None], out=scratch.tensor("scaled", shape, torch.float32))
    out.copy_(scaled)
    squared_norm = scaled_square(scaled, scale)
    # float16 has e4m3's sign, four of its five exponent bits and three of its ten fraction bits,
    # with a bias 8 larger: moved to their places, the same bits are 2^-8 of the value, exactly.
    # torch's own conversion takes ten times as long.
    bits = scratch.tensor("decoded", shape, torch.int16).copy_(out.view(torch.int8))
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)
    halves = scratch.tensor("stored", shape, torch.float32).copy_(bits.view(torch.float16))
    error = scaled.sub_(halves, alpha=256)
    return QuantizedRows({"per_channel_scale": scale}, scaled_square(error, scale), squared_norm)


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``weight * per_channel_scale`` in float32 (..., out, in)."""
    return tensors["weight"].float() * tensors["per_channel_scale"].float()[..., None]


def stored(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Stored]:
    """A float8_e4m3fn weight and its float32 scales."""
    return {
        "weight": Stored(TensorSpec(shape, torch.float8_e4m3fn), "weight"),
        "per_channel_scale": Stored(TensorSpec(shape[:-1], torch.float32), "rows"),
    }
