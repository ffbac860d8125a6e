"""Quantising rows in memory that is used again, against the plain way on the whole weight."""

import pytest
import torch

from llmserve.checkpoint.scratch import Scratch
from llmserve.quantization import weight_format
from llmserve.quantization.amax import row_amax, row_amax_of_bits
from llmserve.quantization.rowwise import rowwise_format

_DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _weight(dtype: torch.dtype, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(40, columns, generator=generator)
    weight *= torch.logspace(-6, 3, 40)[:, None]  # rows of very different size
    weight[3] = 0
    weight[4, ::2] = 0
    weight[5] = -weight[5].abs()
    # Every tie of e4m3 and of int8, which must go to the even neighbour.
    weight[6] = torch.arange(columns) % 255 - 127 + 0.5
    weight[7, 0], weight[7, 1:] = 448.0, (torch.arange(columns - 1) % 449) / 8
    return weight.to(dtype)


@pytest.mark.parametrize("columns", [2, 33, 700])
@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("algo", ["W8A16", "FP8_PER_CHANNEL_PER_TOKEN"])
def test_rows_are_quantised_as_the_whole_weight_is(
    algo: str, dtype: torch.dtype, columns: int
) -> None:
    weight, scratch = _weight(dtype, columns), Scratch()
    plain, rowwise = weight_format(algo), rowwise_format(algo)
    assert rowwise is not None
    stored = plain.quantize(weight)
    error = plain.dequantize(stored).double() - weight.double()
    squared_error = squared_norm = 0.0
    for begin in (0, 7, 14, 21, 28, 35):  # the scratch's memory is dirty from the second on
        rows = weight[begin : begin + 7]
        out = torch.empty(rows.shape, dtype=stored["weight"].dtype)
        amax = row_amax_of_bits(rows, scratch)
        done = rowwise.quantize_rows(rows, amax, out, scratch)
        whole = {suffix: tensor[begin : begin + 7] for suffix, tensor in stored.items()}
        assert torch.equal(out.view(torch.uint8), whole.pop("weight").view(torch.uint8))
        assert done.scales.keys() == whole.keys()
        assert all(torch.equal(done.scales[suffix], whole[suffix]) for suffix in whole)
        squared_error += done.squared_error
        squared_norm += done.squared_norm
    assert squared_error == pytest.approx(float(error.square().sum()), rel=1e-4)
    assert squared_norm == pytest.approx(float(weight.double().square().sum()), rel=1e-4)


def test_formats_that_need_a_whole_weight_take_no_rows() -> None:
    assert rowwise_format("FP8") is None
    assert rowwise_format(None) is None


@pytest.mark.parametrize("dtype", _DTYPES)
def test_the_bits_tell_the_largest_magnitude(dtype: torch.dtype) -> None:
    weight = _weight(dtype, 33)
    assert torch.equal(row_amax_of_bits(weight, Scratch()), row_amax(weight))
    for bad in (float("nan"), float("inf"), float("-inf")):
        spoilt = weight.clone()
        spoilt[9, 20] = bad
        finite = torch.isfinite(row_amax_of_bits(spoilt, Scratch()))
        assert finite.tolist() == [row != 9 for row in range(40)]
