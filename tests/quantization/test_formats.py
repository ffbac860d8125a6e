"""Exact values and error bounds of the weight formats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.errors import CheckpointError, UnsupportedCheckpointError
from llmserve.quantization import fp8_rowwise, unquantized, w8a16, weight_format

_FORMATS = (w8a16, fp8_rowwise)
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


@pytest.mark.parametrize("module", [*_FORMATS, unquantized])
@pytest.mark.parametrize("dtype", _DTYPES)
def test_stored_says_what_quantize_makes(module: object, dtype: torch.dtype) -> None:
    made = module.quantize(torch.ones(3, 5, dtype=dtype))  # type: ignore[attr-defined]
    said = module.stored(3, 5, dtype)  # type: ignore[attr-defined]
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == said


@pytest.mark.parametrize("module", _FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_no_scale_can_stand_for_are_refused(module: object, value: float) -> None:
    weight = torch.ones(4, 8)
    weight[2, 5] = value
    with pytest.raises(CheckpointError, match="row 2"):
        module.quantize(weight)  # type: ignore[attr-defined]


def test_unknown_algo_is_refused() -> None:
    with pytest.raises(UnsupportedCheckpointError, match="W4A16_AWQ"):
        weight_format("W4A16_AWQ")
