"""K and V in 8 bits: INT8 and FP8, with one scale per layer.

A cache holds what attention reads: K after the rotary embedding, and V. Both go under one scale, as
in TensorRT-LLM, which also reads the scale of each and takes the larger. INT8 = largest magnitude /
127. FP8 = largest magnitude / 448, but at least 1, as nvidia-modelopt exports it: a float keeps its
relative precision without being stretched to its largest value.
"""

from __future__ import annotations

import torch

from llmserve.quantization.scales import symmetric_scale

# The names of a layer's scales under ``attention``, float32 (1,): the one that counts, and those
# of K and V, of which it is the larger.
SCALE = "kv_cache_scaling_factor"
KEY_SCALE, VALUE_SCALE = "k_cache_scaling_factor", "v_cache_scaling_factor"
SCALES = (KEY_SCALE, VALUE_SCALE, SCALE)

DTYPES = {"INT8": torch.int8, "FP8": torch.float8_e4m3fn}
_MAX = {"INT8": 127.0, "FP8": 448.0}


def scales(
    quant_algo: str, key_amax: torch.Tensor, value_amax: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """A layer's scales by name, each float32 (1,).

    Args:
        quant_algo: 'INT8' or 'FP8'.
        key_amax: Largest magnitude of K, after the rotary embedding, on representative text; of any
            shape, the largest counts.
        value_amax: Likewise of V.
        dtype: Of the model.

    Raises:
        CheckpointError: A range is NaN or infinite.
    """
    key, value = (
        symmetric_scale(amax.amax().reshape(1), _MAX[quant_algo], dtype)
        for amax in (key_amax, value_amax)
    )
    if quant_algo == "FP8":
        key, value = key.clamp(min=1.0), value.clamp(min=1.0)
    return {KEY_SCALE: key, VALUE_SCALE: value, SCALE: torch.maximum(key, value)}


def quantize(key_value: torch.Tensor, quant_algo: str, scale: torch.Tensor) -> torch.Tensor:
    """Round values to the grid of a cache; what lies outside of it takes its end.

    Args:
        key_value: Of any shape and float dtype. NaN becomes any value in INT8, NaN in FP8.
        quant_algo: 'INT8' or 'FP8'.
        scale: Of the layer, float32 (1,).

    Returns:
        int8 or float8_e4m3fn of the same shape.
    """
    steps = key_value.float() / scale
    if quant_algo == "INT8":
        return steps.round_().clamp_(-128, 127).to(torch.int8)
    return steps.clamp_(-448, 448).to(torch.float8_e4m3fn)


def dequantize(stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 values that a cache stands for."""
    return stored.float() * scale
