"""Every way to compute a linear layer against the product with the dequantised weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmserve.quantization import kv_cache, weight_format
from llmserve.runtime.torch.kernels import int8_linear
from llmserve.runtime.torch.kernels.fp8_linear import quantize_per_token_fp8
from llmserve.runtime.torch.kernels.int8_linear import (
    Int8Linear,
    StaticInt8Linear,
    int8_products_pay,
    quantize_per_token,
    static_steps,
)
from llmserve.runtime.torch.kernels.kv_storage import make_kv_storage
from llmserve.runtime.torch.kernels.linear import (
    DequantizedLinear,
    ParallelLinear,
    PlainLinear,
    linear_reference,
    make_linear,
    stack_linears,
)

CPU = torch.device("cpu")
INT8, FP8 = "W8A16", "FP8_PER_CHANNEL_PER_TOKEN"
SQ, FP8_STATIC = "W8A8_SQ_PER_CHANNEL", "FP8"
INPUT_AMAX = 3.0  # of calibrated formats; random inputs go beyond it here and there
needs_int8 = pytest.mark.skipif(not int8_products_pay(), reason="no fast int8 products here")


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _stored(
    quant_algo: str | None, out_features: int, in_features: int, *, bias: bool = True
) -> dict[str, torch.Tensor]:
    weight = _random(out_features, in_features, seed=out_features) * 0.1
    amax = torch.linspace(0.5, 1.0, in_features) * INPUT_AMAX
    tensors = dict(weight_format(quant_algo).quantize(weight, amax, 0.75))
    if bias:
        tensors["bias"] = _random(out_features, seed=1)
    return tensors


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("quant_algo", [None, INT8, FP8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_in_floating_point(
    tokens: int, quant_algo: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.kernels.linear.int8_products_pay", lambda: False)
    monkeypatch.setattr("llmserve.runtime.torch.kernels.linear._SMALL_SCRATCH", 400)
    monkeypatch.setattr("llmserve.runtime.torch.kernels.linear._LARGE_SCRATCH", 700)
    stored = _stored(quant_algo, 35, 50)
    for name in ("weight", "bias"):
        if stored[name].is_floating_point() and stored[name].dtype != torch.float8_e4m3fn:
            stored[name] = stored[name].to(dtype)
    linear, x = make_linear(quant_algo, stored, CPU), _random(tokens, 50, seed=tokens).to(dtype)
    assert isinstance(linear, PlainLinear if quant_algo is None else DequantizedLinear)
    y = linear(x)
    assert y.dtype == dtype
    bound = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert _relative_error(y, linear_reference(x, quant_algo, stored)) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quant_algo", [None, INT8, FP8, SQ, FP8_STATIC])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_products_on_cuda(quant_algo: str | None, tokens: int) -> None:
    cuda, stored = torch.device("cuda"), _stored(quant_algo, 64, 128)
    if quant_algo is None:
        stored["weight"] = stored["weight"].bfloat16()
    stored["bias"] = stored["bias"].bfloat16()
    x = _random(tokens, 128).bfloat16()
    if quant_algo in (SQ, FP8_STATIC):
        x = x.clamp(-INPUT_AMAX / 2, INPUT_AMAX / 2)
    y = make_linear(quant_algo, stored, cuda)(x.to(cuda))
    bound = 5e-2 if quant_algo in (FP8, FP8_STATIC) else 1e-2  # activations in FP8, in bfloat16
    assert _relative_error(y, linear_reference(x, quant_algo, stored)) < bound


def test_every_float8_is_unpacked_exactly() -> None:
    patterns = torch.arange(256, dtype=torch.uint8)
    patterns = patterns[(patterns & 0x7F) != 0x7F]  # without the two NaN
    weight = patterns.view(torch.float8_e4m3fn)[None, :]
    linear = DequantizedLinear(weight, torch.ones(1), None)
    y = linear(torch.eye(weight.shape[1]))
    assert torch.equal(y[:, 0], weight[0].float())


@needs_int8
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_error_is_what_8_bit_activations_allow(tokens: int, dtype: torch.dtype) -> None:
    stored = _stored(INT8, 35, 50)
    linear, x = make_linear(INT8, stored, CPU), _random(tokens, 50, seed=tokens).to(dtype)
    assert isinstance(linear, Int8Linear)
    y, expected = linear(x), linear_reference(x, INT8, stored)
    assert y.dtype == dtype
    # Each activation is off by at most half a step, amax / 127 / 2.
    half_step = x.double().abs().amax(1, keepdim=True) / 127 / 2
    weight = weight_format(INT8).dequantize(stored).double()
    bound = half_step * weight.abs().sum(1) * 1.001
    bound += expected.abs() * (1e-5 if dtype == torch.float32 else 2**-8)
    assert bool(((y.double() - expected).abs() <= bound).all())
    assert _relative_error(y, expected) < 0.01


@needs_int8
def test_int8_products_are_exact_sums() -> None:
    stored = _stored(INT8, 33, 70, bias=False)
    linear, x = Int8Linear(stored["weight"], stored["per_channel_scale"], None), _random(9, 70)
    quantized, scale = quantize_per_token(x)
    sums = (quantized.long() - 128) @ stored["weight"].long().t()
    assert torch.equal(linear(x), sums.float() * stored["per_channel_scale"] * scale)


@needs_int8
@pytest.mark.parametrize("neighbours", [1, 4, 15, 63])
def test_a_neighbour_50_times_larger_changes_no_bit(neighbours: int) -> None:
    linear = make_linear(INT8, _stored(INT8, 96, 128), CPU)
    x = _random(1, 128)
    alone = linear(x)
    large = torch.cat((_random(neighbours, 128, seed=9) * 50, x))
    assert torch.equal(linear(large)[-1:], alone)


@needs_int8
def test_zero_rows_and_broken_rows_stay_by_themselves() -> None:
    linear = make_linear(INT8, _stored(INT8, 16, 32, bias=False), CPU)
    x = _random(4, 32)
    expected = linear(x)
    x[0], x[1, 3], x[2, 3] = 0.0, float("nan"), float("inf")
    y = linear(x)
    assert torch.equal(y[0], torch.zeros(16))
    assert not bool(y[1].isfinite().any())
    assert not bool(y[2].isfinite().any())
    assert torch.equal(y[3], expected[3])


def test_quantize_per_token_reaches_both_ends() -> None:
    quantized, scale = quantize_per_token(torch.tensor([[-2.0, 2.0, 0.0, 0.1]]))
    assert quantized.tolist() == [[1, 255, 128, 134]]
    assert scale.item() == pytest.approx(2 / 127)


def test_fp8_activations_per_token() -> None:
    x = _random(3, 64)
    x[1] *= 1e6
    x[2] = 0.0
    quantized, scale = quantize_per_token_fp8(x)
    back = quantized.float() * scale
    assert quantized.float().abs().amax(1).tolist() == [448, 448, 0]
    # 3 bits of mantissa: half a step is 1/16 of a value, at most.
    assert bool(((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all())
    clamped, scale = quantize_per_token_fp8(x, (-1200.0, 1200.0))
    assert float((clamped.float() * scale).abs().max()) == pytest.approx(1200.0)
    assert torch.equal(clamped[0].float(), quantized[0].float())


@pytest.mark.parametrize("flaw", ["inexact", "slow", "missing"])
def test_int8_products_that_do_not_pay_are_left_alone(
    flaw: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no such operator")

    changes: dict[str, tuple[str, Callable[..., object]]] = {
        "inexact": ("_is_exact", lambda *_: False),
        "slow": ("_slowdown", lambda: 100.0),
        "missing": ("int8_product", broken),
    }
    monkeypatch.setattr(int8_linear, *changes[flaw])
    assert int8_linear.int8_products_pay.__wrapped__() is False


def _static_steps(x: torch.Tensor, quant_algo: str, stored: dict[str, torch.Tensor]) -> Any:
    """Inputs on their format's grid, float64, in the units that the dequantised weight sees."""
    scale = stored["activation_scaling_factor"].double()
    if quant_algo == FP8_STATIC:
        steps = (x.double() / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
        return steps * scale
    factor = stored["prequant_scaling_factor"].double()
    return (x.double() * factor / scale).round().clamp(-128, 127) * scale / factor


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("quant_algo", [SQ, FP8_STATIC])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_static_scales(tokens: int, quant_algo: str, dtype: torch.dtype) -> None:
    stored = _stored(quant_algo, 35, 50)
    x = (_random(tokens, 50, seed=tokens) * 2).to(dtype)
    x[0, 0] = 50.0  # far beyond the range: it takes its end
    linear = make_linear(quant_algo, stored, CPU)
    y = linear(x)
    assert y.dtype == dtype
    on_grid = linear_reference(_static_steps(x, quant_algo, stored), quant_algo, stored)
    # The format's arithmetic and nothing else: products of what was rounded are all but exact.
    assert _relative_error(y, on_grid) < (1e-5 if dtype == torch.float32 else 5e-3)
    inside = x.clamp(-INPUT_AMAX / 2, INPUT_AMAX / 2)
    y, expected = linear(inside), linear_reference(inside, quant_algo, stored)
    scale = stored["activation_scaling_factor"].double()
    if quant_algo == SQ:
        half_step = (scale / stored["prequant_scaling_factor"].double() / 2).expand(inside.shape)
    else:
        half_step = torch.maximum(inside.double().abs() / 16, scale * 2.0**-10)
    weight = weight_format(quant_algo).dequantize(stored).double()
    bound = half_step @ weight.abs().t() * 1.001 + expected.abs() * 2.0**-8
    assert bool(((y.double() - expected).abs() <= bound + 1e-6).all())
    assert _relative_error(y, expected) < (0.01 if quant_algo == SQ else 0.04)


@pytest.mark.parametrize("quant_algo", [SQ, FP8_STATIC])
@pytest.mark.parametrize("neighbours", [1, 4, 15, 63])
def test_static_scales_know_no_neighbours(quant_algo: str, neighbours: int) -> None:
    linear, x = make_linear(quant_algo, _stored(quant_algo, 96, 128), CPU), _random(1, 128)
    alone = linear(x)
    batch = torch.cat((_random(neighbours, 128, seed=9) * 50, x))
    # The same sums; a product in float32 may add them in another order.
    assert torch.allclose(linear(batch)[-1:], alone, rtol=1e-5, atol=1e-5)
    batch[0, 3] = float("nan")
    y = linear(batch)
    assert bool(y[0].isnan().all())
    assert bool(y[1:].isfinite().all())


def test_static_int8_products_are_exact_sums() -> None:
    """On integers too, whatever the CPU: weights of 7 bits do not saturate at 16 bits."""
    stored = _stored(SQ, 33, 70, bias=False)
    weight = stored["weight"].div(3, rounding_mode="trunc").to(torch.int8)
    scale = stored["weights_scaling_factor"]
    factor = stored["prequant_scaling_factor"] / stored["activation_scaling_factor"]
    linear, x = StaticInt8Linear(weight, scale, factor, None), _random(9, 70) * 2
    steps = static_steps(x, factor)
    assert steps.min() == -128
    assert steps.max() == 127
    assert torch.equal(linear(x), (steps.long() @ weight.long().t()).float() * scale)


def test_linears_that_share_no_inputs_are_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.kernels.linear.int8_products_pay", lambda: True)
    stored = [_stored(SQ, 20, 32), _stored(SQ, 12, 32)]
    assert isinstance(stack_linears([SQ, SQ], stored, CPU), ParallelLinear)
    for suffix in ("prequant_scaling_factor", "activation_scaling_factor"):
        stored[1][suffix] = stored[0][suffix].clone()
    assert isinstance(stack_linears([SQ, SQ], stored, CPU), StaticInt8Linear)


@pytest.mark.parametrize("quant_algo", ["INT8", "FP8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kv_storage(quant_algo: str, dtype: torch.dtype) -> None:
    scale = torch.tensor([0.02 if quant_algo == "INT8" else 1.0])
    storage, key_value = make_kv_storage(quant_algo, scale, dtype), _random(7, 24).to(dtype)
    cache = torch.zeros(9, 24, dtype=storage.dtype)
    rows = torch.tensor([8, 1, 2, 0, 5, 4, 3])
    cache.index_copy_(0, rows, storage.store(key_value))
    assert cache.element_size() == 1
    loaded = storage.load(cache.index_select(0, rows))
    assert loaded.dtype == dtype
    expected = kv_cache.dequantize(kv_cache.quantize(key_value, quant_algo, scale), scale)
    assert torch.equal(loaded, expected.to(dtype))


@pytest.mark.parametrize("quant_algo", [None, INT8, FP8, SQ, FP8_STATIC])
def test_stacked_linears_are_side_by_side(quant_algo: str | None) -> None:
    stored = [_stored(quant_algo, 20, 32), _stored(quant_algo, 12, 32)]
    x = _random(6, 32)
    stacked = stack_linears([quant_algo, quant_algo], stored, CPU)
    single = [make_linear(quant_algo, part, CPU) for part in stored]
    assert torch.equal(stacked(x), torch.cat([linear(x) for linear in single], -1))


def test_stacked_linears_of_two_formats() -> None:
    stored = [_stored(INT8, 20, 32), _stored(None, 12, 32)]
    stacked, x = stack_linears([INT8, None], stored, CPU), _random(6, 32)
    assert isinstance(stacked, ParallelLinear)
    expected = torch.cat(
        [linear_reference(x, INT8, stored[0]), linear_reference(x, None, stored[1])], -1
    )
    assert _relative_error(stacked(x), expected) < 0.01


@pytest.mark.parametrize("quant_algo", [None, INT8, FP8, SQ, FP8_STATIC])
def test_weights_bytes_are_those_held(quant_algo: str | None) -> None:
    stored = _stored(quant_algo, 48, 64)
    linear = make_linear(quant_algo, stored, CPU)
    stored.pop("activation_scaling_factor", None)  # goes into the weights' scales
    held = sum(tensor.nbytes for tensor in stored.values())
    # oneDNN stores two int32 sums per output beside its packed weight.
    extra = 48 * 8 if isinstance(linear, Int8Linear | StaticInt8Linear) else 0
    assert held <= linear.weights_bytes <= held + extra + 64 * 64


def test_plain_weights_on_the_cpu_are_not_copied() -> None:
    weights = [_random(8, 4), _random(8, 4)]
    stacked = stack_linears([None, None], [{"weight": w} for w in weights], CPU)
    before = stacked(torch.ones(1, 4))
    weights[1][:] = 0.0
    after = stacked(torch.ones(1, 4))
    assert torch.equal(after[:, :8], before[:, :8])
    assert not torch.equal(after, before)
