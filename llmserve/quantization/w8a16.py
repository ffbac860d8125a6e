"""W8A16: int8 weights with one scale per output channel, activations in floating point.

The scale is TensorRT-LLM's for weight-only int8: amax of the row / 128, values clamped to
[-128, 127]. A TensorRT-LLM checkpoint of this algorithm holds plain weights (its loader, like our
``build``, quantises them); an engine holds what is below.
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


def quantize(
    weight: torch.Tensor,
    input_amax: torch.Tensor | None = None,
    smoothquant_val: float = 0.5,
    weight_amax: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Quantise to ``weight`` int8 (..., out, in) and ``per_channel_scale`` float32 (..., out)."""
    scale = row_amax(weight) / 128
    # A row of zeros stays zeros under any scale; 1 avoids 0 / 0.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    # The division promotes to float32, so this is the only copy of the weight in it.
    q = torch.div(weight, scale[..., None]).round_().clamp_(-128, 127).to(torch.int8)
    return {"weight": q, "per_channel_scale": scale}


def quantize_rows(
    rows: torch.Tensor, amax: torch.Tensor, out: torch.Tensor, scratch: Scratch
) -> QuantizedRows:
    """Quantise some rows (rows, in) into ``out``; see ``RowwiseFormat``."""
    shape = tuple(rows.shape)
    scale = amax / 128
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    scaled = torch.div(rows, scale[:, None], out=scratch.tensor("scaled", shape, torch.float32))
    squared_norm = scaled_square(scaled, scale)
    rounded = torch.round(scaled, out=scratch.tensor("stored", shape, torch.float32))
    out.copy_(rounded.clamp_(-128, 127))
    error = scaled.sub_(rounded)
    return QuantizedRows({"per_channel_scale": scale}, scaled_square(error, scale), squared_norm)


def dequantize(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """``weight * per_channel_scale`` in float32 (..., out, in)."""
    return tensors["weight"].float() * tensors["per_channel_scale"].float()[..., None]


def stored(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Stored]:
    """An int8 weight and its float32 scales."""
    return {
        "weight": Stored(TensorSpec(shape, torch.int8), "weight"),
        "per_channel_scale": Stored(TensorSpec(shape[:-1], torch.float32), "rows"),
    }
