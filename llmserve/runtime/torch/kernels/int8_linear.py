"""W8A16 and W8A8_SQ_PER_CHANNEL on a CPU: integer products.

W8A16's activations are quantised to 8 bits token by token, SmoothQuant's by factors that were fixed
when the checkpoint was made. The sums are exact in int32 and no scale is that of a batch, so a row
of the result depends on nothing else in it, to the bit. It goes through oneDNN, which has fast
products of unsigned activations with signed weights on every CPU with VNNI or AMX; on others
``int8_products_pay`` says no and the weights are unpacked instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import cache

import torch

logger = logging.getLogger(__name__)

_ZERO_POINT = 128  # activations are stored as round(x / scale) + 128
_MIN_AMAX = 1e-20  # a row of zeros needs some scale
# An int8 product that takes longer than this many in float32 is oneDNN's reference code, which is
# a hundred times slower; fast ones are below 2 however busy the machine is.
_MAX_SLOWDOWN = 5.0


class Int8Linear:
    """The product of int8 weights with activations that are quantised per token.

    Args:
        weight: int8 (out, in); repacked, and not held.
        scale: float32 (out,).
        bias: (out,) or None.
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale, self._bias = scale, bias
        self._zero_points = torch.zeros(1, dtype=torch.int64)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the packed weight (oneDNN adds sums of its columns), the scales and the bias."""
        packed: int = torch.ops.mkldnn._nbytes(self._packed)
        bias = 0 if self._bias is None else self._bias.nbytes
        return packed + self._scale.nbytes + bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        quantized, scale = quantize_per_token(x)
        y = int8_product(quantized, self._packed, self._scale, self._zero_points).mul_(scale)
        if self._bias is not None:
            y.add_(self._bias)
        return y.to(x.dtype)


class StaticInt8Linear:
    """The product of int8 weights with activations that are quantised by fixed factors.

    Args:
        weight: int8 (out, in); repacked, and not held.
        scale: float32 (out,): the weights' scales times the activations'.
        factor: float32 (in,): what brings each input channel to steps.
        bias: (out,) or None.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scale: torch.Tensor,
        factor: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> None:
        self._packed = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scale, self._factor, self._bias = scale, factor, bias
        self._zero_points = torch.zeros(1, dtype=torch.int64)

    @property
    def weights_bytes(self) -> int:
        """Bytes of the packed weight, the scales, the factors and the bias."""
        packed: int = torch.ops.mkldnn._nbytes(self._packed)
        bias = 0 if self._bias is None else self._bias.nbytes
        return packed + self._scale.nbytes + self._factor.nbytes + bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out); NaN in a row of ``x`` makes that row's results NaN."""
        steps = static_steps(x, self._factor)
        quantized = (steps + _ZERO_POINT).to(torch.uint8)
        y = int8_product(quantized, self._packed, self._scale, self._zero_points)
        if self._bias is not None:
            y.add_(self._bias)
        # Integers know no NaN: 0 or NaN is added, by row.
        return y.add_(steps.sum(-1, keepdim=True) * 0).to(x.dtype)


def static_steps(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Quantise activations by fixed factors; what lies beyond them takes their end.

    Args:
        x: (tokens, features).
        factor: float32 (features,).

    Returns:
        Integers in [-128, 127] as float32 (tokens, features); NaN stays NaN.
    """
    return (x.float() * factor).round_().clamp_(-128, 127)


def quantize_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each row by its largest magnitude, symmetrically.

    Args:
        x: (tokens, features). NaN or infinity in a row makes its scale, and so all that is made
            from it, NaN or infinite.

    Returns:
        uint8 (tokens, features), 128 standing for zero, and float32 scales (tokens, 1) with
        x = (quantised - 128) * scale up to half a scale.
    """
    x32 = x.float()
    scale = x32.abs().amax(dim=-1, keepdim=True).clamp_(min=_MIN_AMAX).mul_(1 / 127)
    # Truncation after adding 0.5 rounds to the nearest.
    return (x32 / scale).add_(_ZERO_POINT + 0.5).to(torch.uint8), scale


def int8_product(
    quantized: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero_points: torch.Tensor
) -> torch.Tensor:
    """(quantised - 128) @ weight.T * scale: sums exact in int32, then one product in float32.

    Args:
        quantized: uint8 (tokens, in).
        packed: Of ``onednn.qlinear_prepack``.
        scale: float32 (out,).
        zero_points: int64 zeros, the weights'.

    Returns:
        float32 (tokens, out).
    """
    y: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        *(quantized, 1.0, _ZERO_POINT, packed, scale, zero_points, None),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    return y


@cache
def int8_products_pay() -> bool:
    """Whether oneDNN's int8 products are there, exact and fast on this CPU; tried once."""
    try:
        exact = all(_is_exact(tokens, 70, 33) for tokens in (1, 3, 17, 40))
        slowdown = _slowdown() if exact else 0.0
    except (AttributeError, RuntimeError) as error:  # another torch, or built without oneDNN
        logger.info("int8 products are not available (%s); weights are unpacked instead", error)
        return False
    if not exact or slowdown > _MAX_SLOWDOWN:
        cause = f"{slowdown:.1f} times slower than float32" if exact else "not exact"
        logger.info("int8 products are %s on this CPU; weights are unpacked instead", cause)
        return False
    return True


def _is_exact(tokens: int, in_features: int, out_features: int) -> bool:
    # Extremes: where pairs of products saturate at 16 bits (AVX2), these sums are wrong.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2, (tokens, in_features), generator=generator) * 254 + 1
    weight = torch.randint(0, 2, (out_features, in_features), generator=generator) * 255 - 128
    packed = torch.ops.onednn.qlinear_prepack(weight.to(torch.int8), None)
    ones, zero = torch.ones(out_features), torch.zeros(1, dtype=torch.int64)
    y = int8_product(x.to(torch.uint8), packed, ones, zero)
    return torch.equal(y, ((x - _ZERO_POINT) @ weight.t()).float())


def _slowdown() -> float:
    size, tokens = 512, 8
    weight = torch.ones(size, size, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    x = torch.ones(tokens, size, dtype=torch.uint8)
    scale, zero = torch.ones(size), torch.zeros(1, dtype=torch.int64)
    x32, weight32 = x.float(), weight.float()
    int8_s = _shortest_s(lambda: int8_product(x, packed, scale, zero))
    return int8_s / _shortest_s(lambda: torch.mm(x32, weight32))


def _shortest_s(call: Callable[[], object]) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
