"""Exact values and error bounds of the weight formats."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.errors import CheckpointError, UnsupportedCheckpointError
from llmserve.quantization import (
    fp8,
    fp8_rowwise,
    kv_cache,
    smoothquant,
    unquantized,
    w8a16,
    weight_format,
)

_FORMATS = (w8a16, fp8_rowwise)
_CALIBRATED = (fp8, smoothquant)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Matrices whose rows differ by orders of magnitude, zeros and single values among them."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    value = st.floats(-1, 1, width=32)
    values = draw(st.lists(value, min_size=rows * columns, max_size=rows * columns))
    magnitudes = draw(st.lists(st.integers(-12, 12), min_size=rows, max_size=rows))
    matrix = torch.tensor(values).reshape(rows, columns)
    matrix = matrix * torch.tensor([2.0**m for m in magnitudes])[:, None]
    return matrix.to(draw(st.sampled_from(_DTYPES)))


def test_w8a16_values() -> None:
    weight = torch.tensor([[128.0, -128.0, 64.4, 0.6], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.5, 0.0]])

    stored = w8a16.quantize(weight)

    assert stored["weight"].dtype == torch.int8
    assert stored["weight"].tolist() == [[127, -128, 64, 1], [0, 0, 0, 0], [-128, 64, 32, 0]]
    assert stored["per_channel_scale"].tolist() == [1.0, 1.0, 2 / 128]
    assert w8a16.dequantize(stored)[2].tolist() == [-2.0, 1.0, 0.5, 0.0]


def test_fp8_values() -> None:
    # 448, 1.125 and 0.5 are e4m3 numbers; 1.0625 lies between 1 and 1.125 and goes to the even 1.
    weight = torch.tensor([[448.0, -1.125, 1.0625, 0.5], [0.0] * 4, [-896.0, 2.25, 0.0, 1.0]])

    stored = fp8_rowwise.quantize(weight)

    assert stored["weight"].dtype == torch.float8_e4m3fn
    assert stored["weight"][0].float().tolist() == [448.0, -1.125, 1.0, 0.5]
    assert stored["weight"][2].float().tolist() == [-448.0, 1.125, 0.0, 0.5]
    assert stored["per_channel_scale"].tolist() == pytest.approx([1.0, 1 / (448 * 512), 2.0])


@pytest.mark.parametrize("dtype", _DTYPES)
def test_fp8_is_modelopts_rule_byte_for_byte(dtype: torch.dtype) -> None:
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = weight.float().abs().amax(dim=1) / 448

    stored = fp8_rowwise.quantize(weight)

    expected = (weight.float() / scale[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(stored["per_channel_scale"], scale)
    assert torch.equal(stored["weight"].view(torch.uint8), expected.view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(weights())
def test_w8a16_error_is_at_most_half_a_step(weight: torch.Tensor) -> None:
    stored = w8a16.quantize(weight)
    scale = stored["per_channel_scale"][:, None].double()

    steps = (w8a16.dequantize(stored).double() - weight.double()).abs() / scale

    # Above 127.5 steps the clamp costs up to a whole one: amax itself, where it is positive.
    bound = torch.where(weight.double() / scale > 127.5, 1.0, 0.5)
    assert bool((steps <= bound + 1e-4).all())


@settings(max_examples=60, deadline=None)
@given(weights())
def test_fp8_error_is_at_most_half_a_step(weight: torch.Tensor) -> None:
    stored = fp8_rowwise.quantize(weight)
    scale = stored["per_channel_scale"][:, None].double()

    error = (fp8_rowwise.dequantize(stored).double() - weight.double()).abs()

    # Three mantissa bits: 1/16 of the value; below the normal range half of 2**-9.
    bound = torch.maximum(weight.double().abs() / 16, scale * 2.0**-10)
    assert bool((error <= bound * (1 + 1e-5)).all())


@settings(max_examples=30, deadline=None)
@given(weights(), st.sampled_from(_FORMATS))
def test_rows_are_quantised_on_their_own(weight: torch.Tensor, module: object) -> None:
    whole = module.quantize(weight)  # type: ignore[attr-defined]
    for row in range(weight.shape[0]):
        alone = module.quantize(weight[row : row + 1])  # type: ignore[attr-defined]
        for suffix, tensor in alone.items():
            assert torch.equal(tensor.float(), whole[suffix][row : row + 1].float())


@st.composite
def calibrated(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and ranges of its inputs over 12 orders of magnitude."""
    weight = draw(weights())
    exponents = st.integers(-20, 20)
    powers = draw(st.lists(exponents, min_size=weight.shape[1], max_size=weight.shape[1]))
    return weight, torch.tensor([2.0**power for power in powers])


@pytest.mark.parametrize("module", [*_FORMATS, *_CALIBRATED, unquantized])
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)], ids=str)
def test_stored_says_what_quantize_makes(
    module: ModuleType, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if module is smoothquant and len(shape) == 3:
        with pytest.raises(UnsupportedCheckpointError, match="mixtures of experts"):
            module.stored(shape, dtype)
        return
    made = module.quantize(torch.ones(shape, dtype=dtype), torch.ones(5))
    said = {suffix: part.spec for suffix, part in module.stored(shape, dtype).items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == said


@pytest.mark.parametrize("module", [*_FORMATS, *_CALIBRATED])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_no_scale_can_stand_for_are_refused(module: ModuleType, value: float) -> None:
    weight = torch.ones(4, 8)
    weight[2, 5] = value
    with pytest.raises(CheckpointError, match="row 2"):
        module.quantize(weight, torch.ones(8))


@pytest.mark.parametrize("module", _CALIBRATED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_ranges_that_are_none_are_refused(module: ModuleType, value: float) -> None:
    amax = torch.ones(8)
    amax[3] = value
    if value < 0:
        amax[:] = value
    with pytest.raises(CheckpointError, match="must be finite and at least 0"):
        module.quantize(torch.ones(4, 8), amax)


def test_fp8_per_tensor_values() -> None:
    weight = torch.tensor([[896.0, -2.25, 2.125], [0.0, 0.0, 1.0]])

    stored = fp8.quantize(weight, torch.tensor([1.0, 224.0, 0.0]))

    assert stored["weight"].float().tolist() == [[448.0, -1.125, 1.0], [0.0, 0.0, 0.5]]
    assert stored["weights_scaling_factor"].tolist() == [2.0]
    assert stored["activation_scaling_factor"].tolist() == [0.5]
    assert fp8.dequantize(stored)[1].tolist() == [0.0, 0.0, 1.0]


def test_fp8_scale_of_several_weights() -> None:
    weight = torch.tensor([[448.0, -2.0]])
    stored = fp8.quantize(weight, torch.ones(2), weight_amax=torch.tensor(896.0))
    assert stored["weights_scaling_factor"].tolist() == [2.0]
    assert stored["weight"].float().tolist() == [[224.0, -1.0]]
    # Its own range counts too: nothing is ever beyond the scale, which e4m3 has no value for.
    stored = fp8.quantize(weight, torch.ones(2), weight_amax=torch.tensor(1.0))
    assert stored["weights_scaling_factor"].tolist() == [1.0]


def test_fp8_experts_have_scales_of_their_own() -> None:
    weight = torch.stack([torch.full((2, 3), 448.0), torch.full((2, 3), -4.48)])
    stored = fp8.quantize(weight, torch.tensor([1.0, 2.0, 448.0]))
    assert stored["weights_scaling_factor"].shape == (2, 1)
    assert stored["weights_scaling_factor"].flatten().tolist() == pytest.approx([1.0, 0.01])
    assert stored["weight"].float().abs().eq(448).all()
    assert torch.allclose(fp8.dequantize(stored), weight)
    assert stored["activation_scaling_factor"].tolist() == [1.0]


@pytest.mark.parametrize("module", _CALIBRATED)
def test_nothing_but_zeros_has_a_scale_of_one(module: ModuleType) -> None:
    stored = module.quantize(torch.zeros(2, 3), torch.zeros(3))
    assert not stored["weight"].float().any()
    assert stored["weights_scaling_factor"].unique().tolist() == [1.0]
    assert stored["activation_scaling_factor"].tolist() == [1.0]


@settings(max_examples=60, deadline=None)
@given(calibrated())
def test_fp8_per_tensor_error(case: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, amax = case
    stored = fp8.quantize(weight, amax)
    largest = weight.double().abs().max()
    smallest = torch.finfo(weight.dtype).tiny
    scale = float(max(largest, smallest)) / 448 if largest else 1.0
    assert float(stored["weights_scaling_factor"]) == pytest.approx(scale, rel=1e-6)
    error = (fp8.dequantize(stored).double() - weight.double()).abs()
    bound = torch.maximum(weight.double().abs() / 16, torch.tensor(scale * 2.0**-10))
    assert bool((error <= bound * (1 + 1e-5)).all())


def test_smoothquant_values() -> None:
    weight = torch.tensor([[1.0, 4.0, -0.5], [0.25, -1.0, 2.0]])
    amax = torch.tensor([4.0, 0.25, 2.0])

    stored = smoothquant.quantize(weight, amax, smoothquant_val=0.5)

    # sqrt(max|w| / max|x|) = 0.5, 4 and 1.
    assert stored["prequant_scaling_factor"].tolist() == [0.5, 4.0, 1.0]
    # weight / factor = [2, 1, -0.5], [0.5, -0.25, 2]; max|x| * factor = 2, 1, 2.
    assert stored["weights_scaling_factor"].tolist() == pytest.approx([2 / 127, 2 / 127])
    assert stored["weight"].tolist() == [[127, 64, -32], [32, -16, 127]]
    assert stored["activation_scaling_factor"].tolist() == pytest.approx([2 / 127])
    assert torch.allclose(smoothquant.dequantize(stored), weight, atol=4 / 127)


def test_alpha_says_where_the_differences_go() -> None:
    weight, amax = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.rand(8) + 1
    activations = smoothquant.quantize(weight, amax, smoothquant_val=1.0)
    assert torch.allclose(activations["prequant_scaling_factor"], 1 / amax)
    assert float(activations["activation_scaling_factor"]) == pytest.approx(1 / 127)
    weights_alone = smoothquant.quantize(weight, amax, smoothquant_val=0.0)
    assert torch.allclose(weights_alone["prequant_scaling_factor"], weight.abs().amax(0))


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_channel_without_activations(alpha: float) -> None:
    """modelopt gives it the largest factor, and so do we; its weights count for nothing."""
    stored = smoothquant.quantize(torch.ones(2, 3), torch.tensor([1.0, 0.0, 1.0]), alpha)
    assert stored["prequant_scaling_factor"].tolist() == [1.0, 1e4, 1.0]
    assert stored["weight"].tolist() == [[127, 0, 127]] * 2


@settings(max_examples=60, deadline=None)
@given(calibrated(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_smoothquant_error(case: tuple[torch.Tensor, torch.Tensor], alpha: float) -> None:
    weight, amax = case
    try:
        stored = smoothquant.quantize(weight, amax, alpha)
    except CheckpointError:  # smoothed weights, or inputs, beyond float16
        assert weight.dtype == torch.float16
        return
    w, x = weight.double(), amax.double()
    factor = w.abs().amax(0) ** (1 - alpha) / x**alpha
    factor = factor.clamp(1e-4, 1e4)
    epsilon = torch.finfo(weight.dtype).eps
    given_factor = stored["prequant_scaling_factor"].double()
    regular = factor > 1e-4  # modelopt's exception for vanishing factors apart
    assert torch.allclose(given_factor[regular], factor[regular], rtol=2 * epsilon)
    smoothed = w / given_factor
    scale = stored["weights_scaling_factor"][:, None].double()
    steps = (stored["weight"].double() - smoothed / scale).abs()
    # Half a step, and the two roundings to the model's dtype.
    assert bool((steps <= 0.5 + 127 * 3 * epsilon).all())
    largest = float((x * given_factor).max())
    assert float(stored["activation_scaling_factor"]) == pytest.approx(
        max(largest, torch.finfo(weight.dtype).tiny) / 127, rel=4 * epsilon
    )


@pytest.mark.parametrize(("algo", "largest"), [("INT8", 127.0), ("FP8", 448.0)])
def test_kv_cache_scales(algo: str, largest: float) -> None:
    keys, values = torch.tensor([3.0, 900.0]), torch.tensor(5.0)
    made = kv_cache.scales(algo, keys, values, torch.bfloat16)
    key, value = 900 / largest, 5 / largest
    if algo == "FP8":
        value = 1.0  # never below
    expected = {"k_cache_scaling_factor": key, "v_cache_scaling_factor": value}
    expected["kv_cache_scaling_factor"] = key
    assert {name: t.item() for name, t in made.items()} == pytest.approx(expected)
    assert all(t.shape == (1,) and t.dtype == torch.float32 for t in made.values())
    with pytest.raises(CheckpointError, match="nan"):
        kv_cache.scales(algo, torch.tensor(float("nan")), values, torch.float32)


@pytest.mark.parametrize("algo", ["INT8", "FP8"])
def test_kv_cache_error_and_ends(algo: str) -> None:
    scale = torch.tensor([0.5])
    end = 127 if algo == "INT8" else 448
    x = torch.linspace(-0.5 * end, 0.5 * end, 999)
    back = kv_cache.dequantize(kv_cache.quantize(x, algo, scale), scale)
    bound = torch.full_like(x, 0.25)
    if algo == "FP8":
        bound = torch.maximum(x.abs() / 16, torch.tensor(0.5 * 2.0**-10))
    assert bool(((back - x).abs() <= bound * (1 + 1e-6)).all())
    beyond = kv_cache.quantize(torch.tensor([1e6, -1e6, float("inf")]), algo, scale)
    ends = [127, -128, 127] if algo == "INT8" else [448, -448, 448]
    assert beyond.float().tolist() == ends
    assert beyond.dtype == kv_cache.DTYPES[algo]


def test_unknown_algo_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="W4A16_AWQ"):
        weight_format("W4A16_AWQ")
