"""Linear layers, one class per way to compute them; ``make_linear`` picks the one for a device.

Every class is compared with ``linear_reference``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from llmserve.quantization import weight_format
from llmserve.runtime.torch.kernels.e4m3 import EXPONENT_OFFSET, unpack_e4m3
from llmserve.runtime.torch.kernels.fp8_linear import (
    Fp8Linear,
    StaticFp8Linear,
    fp8_products_work,
    round_to_fp8,
)
from llmserve.runtime.torch.kernels.int8_linear import (
    Int8Linear,
    StaticInt8Linear,
    int8_products_pay,
    static_steps,
)

StoredTensors = Mapping[str, torch.Tensor]

# Elements of the scratch that quantised weights are unpacked into: it should stay in the cache
# where the product is bound by memory, and be large enough for GEMM where it is not.
_SMALL_BATCH_TOKENS = 16
_SMALL_SCRATCH, _LARGE_SCRATCH, _CUDA_SCRATCH = 1 << 16, 1 << 18, 1 << 24


class Linear(Protocol):
    """y = x @ weight.T + bias."""

    @property
    def weights_bytes(self) -> int:
        """Bytes held, mapped ones included."""
        ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out), in the dtype of ``x``."""
        ...


def make_linear(
    quant_algo: str | None,
    stored: StoredTensors,
    device: torch.device,
    clamp: tuple[float, float] | None = None,
) -> Linear:
    """The linear layer that stored tensors stand for, on a device.

    Args:
        quant_algo: Their format.
        stored: The tensors of the format by suffix, and perhaps ``bias``.
        device: Where it computes. Tensors on the CPU that need no packing are kept as they are.
        clamp: Bounds of activations that are quantised to FP8 per token; others are not clamped.
    """
    on_device = {suffix: tensor.to(device) for suffix, tensor in stored.items()}
    weight, bias = on_device["weight"], on_device.get("bias")
    if quant_algo is None:
        return PlainLinear(weight, bias)
    if quant_algo == "FP8":
        return _fp8_linear(on_device)
    if quant_algo == "W8A8_SQ_PER_CHANNEL":
        return _smoothquant_linear(on_device)
    scale = on_device["per_channel_scale"].float()
    if quant_algo == "W8A16" and device.type == "cpu" and int8_products_pay():
        return Int8Linear(weight, scale, bias)
    if quant_algo == "FP8_PER_CHANNEL_PER_TOKEN" and fp8_products_work(device, weight.shape):
        return Fp8Linear(weight, scale, bias, clamp)
    return DequantizedLinear(weight, scale, bias)


def _fp8_linear(stored: StoredTensors) -> Linear:
    weight, bias = stored["weight"], stored.get("bias")
    scale, input_scale = stored["weights_scaling_factor"], stored["activation_scaling_factor"]
    if fp8_products_work(weight.device, weight.shape):
        return StaticFp8Linear(weight, scale, input_scale, bias)
    plain = DequantizedLinear(weight, scale * input_scale, bias)
    return RoundedInputLinear(round_to_fp8, input_scale, plain)


def _smoothquant_linear(stored: StoredTensors) -> Linear:
    weight, bias = stored["weight"], stored.get("bias")
    input_scale = stored["activation_scaling_factor"]
    scale = stored["weights_scaling_factor"] * input_scale
    factor = stored["prequant_scaling_factor"].float() / input_scale
    if weight.device.type == "cpu" and int8_products_pay():
        return StaticInt8Linear(weight, scale, factor, bias)
    return RoundedInputLinear(static_steps, factor, DequantizedLinear(weight, scale, bias))


def stack_linears(
    quant_algos: Sequence[str | None],
    stored: Sequence[StoredTensors],
    device: torch.device,
    clamp: tuple[float, float] | None = None,
) -> Linear:
    """Linear layers of the same input as one, their outputs side by side.

    It is one product where the weights are copied anyway (to a GPU, or to be packed) and see the
    same inputs, and several where they are used as they are mapped.

    Args:
        quant_algos: The format of each.
        stored: The tensors of each, as for ``make_linear``.
        device: Where it computes.
        clamp: As for ``make_linear``.
    """
    algo = quant_algos[0]
    packed = algo in ("W8A16", "W8A8_SQ_PER_CHANNEL") and int8_products_pay()
    if all(other == algo for other in quant_algos) and (device.type != "cpu" or packed):
        joined = _joined(algo, stored)
        if joined is not None:
            return make_linear(algo, joined, device, clamp)
    linears = zip(quant_algos, stored, strict=True)
    return ParallelLinear([make_linear(algo, part, device, clamp) for algo, part in linears])


def _joined(algo: str | None, stored: Sequence[StoredTensors]) -> StoredTensors | None:
    """The tensors of linears as those of one; None if what they would share differs."""
    format_tensors = weight_format(algo).stored((1, 1), torch.float32)
    joined = {}
    for suffix, first in stored[0].items():
        parts = [part[suffix] for part in stored]
        if suffix == "bias" or format_tensors[suffix].follows in ("weight", "rows"):
            joined[suffix] = torch.cat(parts)
        elif all(torch.equal(part, first) for part in parts):
            joined[suffix] = first
        else:
            return None
    return joined


class PlainLinear:
    """A product in the weight's own dtype.

    Args:
        weight: (out, in).
        bias: (out,) or None.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    @property
    def weights_bytes(self) -> int:
        """Bytes of the weight and the bias."""
        return _nbytes(self._weight, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        return F.linear(x, self._weight, self._bias)


class ParallelLinear:
    """Linear layers of one input, outputs side by side.

    Args:
        linears: In the order of their outputs.
    """

    def __init__(self, linears: Sequence[Linear]) -> None:
        self._linears = list(linears)

    @property
    def weights_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(linear.weights_bytes for linear in self._linears)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, sum of outs)."""
        return torch.cat([linear(x) for linear in self._linears], dim=-1)


class RoundedInputLinear:
    """A linear layer whose inputs are rounded first: a format's arithmetic, on any hardware.

    Args:
        round_inputs: Inputs (tokens, in) and ``grid`` -> their steps, float32 (tokens, in).
        grid: What brings inputs to steps: a scale, or a factor of each channel.
        linear: Of the steps.
    """

    def __init__(
        self,
        round_inputs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        grid: torch.Tensor,
        linear: Linear,
    ) -> None:
        self._round_inputs, self._grid, self._linear = round_inputs, grid, linear

    @property
    def weights_bytes(self) -> int:
        """Bytes of the linear and the grid."""
        return self._linear.weights_bytes + self._grid.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        return self._linear(self._round_inputs(x, self._grid)).to(x.dtype)


class DequantizedLinear:
    """Weights stay quantised in memory and are unpacked a few rows at a time: for any hardware.

    On the CPU the product is in float32 and the scale is applied to it; on CUDA the weight is
    rounded to the activations' dtype first.

    Args:
        weight: int8 or float8_e4m3fn (out, in).
        scale: float32 (out,) or (1,).
        bias: (out,) or None.
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        self._weight, self._scale, self._bias = weight, scale, bias

    @property
    def weights_bytes(self) -> int:
        """Bytes of the quantised weight, its scales and the bias."""
        return _nbytes(self._weight, self._scale, self._bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        y = self._on_cpu(x) if x.device.type == "cpu" else self._on_cuda(x)
        return y if self._bias is None else y.add_(self._bias)

    def _on_cpu(self, x: torch.Tensor) -> torch.Tensor:
        out_features, in_features = self._weight.shape
        is_fp8 = self._weight.dtype == torch.float8_e4m3fn
        elements = _SMALL_SCRATCH if x.shape[0] <= _SMALL_BATCH_TOKENS else _LARGE_SCRATCH
        rows = min(max(1, elements // in_features), out_features)
        scratch = torch.empty(rows, in_features)
        bits = torch.empty(rows if is_fp8 else 0, in_features, dtype=torch.int16)
        x32 = x.float()
        y = torch.empty(x.shape[0], out_features)
        for start in range(0, out_features, rows):
            part = self._weight[start : start + rows]
            unpacked = scratch[: part.shape[0]]
            if is_fp8:
                unpack_e4m3(part, bits[: part.shape[0]], unpacked)
            else:
                unpacked.copy_(part)
            torch.mm(x32, unpacked.t(), out=y[:, start : start + rows])
        y.mul_(self._scale * EXPONENT_OFFSET if is_fp8 else self._scale)
        return y.to(x.dtype)

    def _on_cuda(self, x: torch.Tensor) -> torch.Tensor:
        out_features, in_features = self._weight.shape
        rows = max(1, _CUDA_SCRATCH // in_features)
        scales = self._scale.expand(out_features)
        y = x.new_empty(x.shape[0], out_features)
        for start in range(0, out_features, rows):
            part, scale = self._weight[start : start + rows], scales[start : start + rows]
            unpacked = (part.float() * scale[:, None]).to(x.dtype)
            y[:, start : start + rows] = F.linear(x, unpacked)
        return y


def linear_reference(
    x: torch.Tensor, quant_algo: str | None, stored: StoredTensors
) -> torch.Tensor:
    """The definition: the whole dequantised weight in float64 and one product with it.

    Activations are not rounded here. What each format's arithmetic may differ by, of an input x:
    W8A16 and W8A8_SQ_PER_CHANNEL on integers half a step, a step being the token's largest
    magnitude / 127, and activation_scaling_factor / prequant_scaling_factor; FP8, per token or
    per tensor, |x| / 16, and half of 2**-9 steps near zero. Static scales bring what lies beyond
    their range to its end.
    """
    y = x.double() @ weight_format(quant_algo).dequantize(stored).double().t()
    return y + stored["bias"].double() if "bias" in stored else y


def _nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
