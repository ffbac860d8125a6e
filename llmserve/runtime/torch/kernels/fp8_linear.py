"""FP8 products on a GPU that has them: both sides in float8_e4m3fn, scales by row or by tensor."""

from __future__ import annotations

from functools import cache

import torch

_MAX = 448.0  # the largest float8_e4m3fn
_MIN_SCALE = 1.0 / (_MAX * 512.0)
_ALIGNMENT = 16  # of both sides of a weight, cuBLASLt's rule


class Fp8Linear:
    """The product of FP8 weights with activations that are quantised per token.

    Args:
        weight: float8_e4m3fn (out, in) on a GPU.
        scale: float32 (out,).
        bias: (out,) or None.
        clamp: Bounds of the activations before they are quantised (config.json's clamp_val).
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        clamp: tuple[float, float] | None,
    ) -> None:
        self._weight, self._scale, self._bias = weight, scale[None, :].contiguous(), bias
        self._clamp = clamp

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weight, its scales and the bias."""
        bias = 0 if self._bias is None else self._bias.nbytes
        return self._weight.nbytes + self._scale.nbytes + bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        quantized, scale = quantize_per_token_fp8(x, self._clamp)
        # Rowwise scales come with bfloat16 results alone.
        y = torch._scaled_mm(
            quantized, self._weight.t(), scale, self._scale, out_dtype=torch.bfloat16
        ).to(x.dtype)
        return y if self._bias is None else y.add_(self._bias)


class StaticFp8Linear:
    """The product of FP8 weights with activations under a fixed scale.

    Args:
        weight: float8_e4m3fn (out, in) on a GPU.
        scale: float32 (1,), the weight's.
        input_scale: float32 (1,), the activations'.
        bias: (out,) or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        input_scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        self._weight, self._scale, self._input_scale = weight, scale, input_scale
        self._bias = bias

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weight, the scales and the bias."""
        bias = 0 if self._bias is None else self._bias.nbytes
        return self._weight.nbytes + self._scale.nbytes + self._input_scale.nbytes + bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        quantized = quantize_fp8(x, self._input_scale)
        y = torch._scaled_mm(
            quantized, self._weight.t(), self._input_scale, self._scale, out_dtype=x.dtype
        )
        return y if self._bias is None else y.add_(self._bias)


def quantize_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x / scale in float8_e4m3fn; what lies beyond it takes its end, NaN stays NaN."""
    return (x.float() / scale).clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn)


def round_to_fp8(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same as float32: e4m3 numbers, x / scale."""
    return quantize_fp8(x, scale).float()


def quantize_per_token_fp8(
    x: torch.Tensor, clamp: tuple[float, float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by its largest magnitude.

    Args:
        x: (tokens, features).
        clamp: Bounds that values are brought into first, so that an outlier leaves the others of
            its row some precision.

    Returns:
        float8_e4m3fn (tokens, features) and float32 scales (tokens, 1).
    """
    x32 = x.float() if clamp is None else x.float().clamp(*clamp)
    scale = (x32.abs().amax(dim=-1, keepdim=True) / _MAX).clamp_(min=_MIN_SCALE)
    # Division may round past the largest value, and the conversion would make that NaN.
    return (x32 / scale).clamp_(-_MAX, _MAX).to(torch.float8_e4m3fn), scale


def fp8_products_work(device: torch.device, shape: torch.Size) -> bool:
    """Whether the GPU has FP8 products with rowwise scales for a weight of this shape."""
    return (
        device.type == "cuda" and all(size % _ALIGNMENT == 0 for size in shape) and _capable(device)
    )


@cache
def _capable(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    one = torch.ones(_ALIGNMENT, _ALIGNMENT, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(_ALIGNMENT, 1, device=device)
    try:
        y = torch._scaled_mm(one, one.t(), scale, scale.t().contiguous(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return bool((y == _ALIGNMENT).all())
