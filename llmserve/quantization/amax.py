"""The largest magnitude of each row, with NaN and infinity refused: what scales are made from."""

from __future__ import annotations

import torch

from llmserve.checkpoint.scratch import Scratch
from llmserve.errors import CheckpointError

# As integers, floats without their sign are in the same order; NaN is above infinity.
_MAGNITUDES = {
    torch.float16: (torch.int16, 0x7FFF),
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFF_FFFF),
}


def row_amax(weight: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each row of a weight (..., out, in), as float32 (..., out).

    Raises:
        CheckpointError: A value is NaN or infinite; no scale could stand for it.
    """
    # aminmax needs no copy of the weight in float32, which abs() and float() would.
    low, high = torch.aminmax(weight, dim=-1)
    amax = torch.maximum(-low.float(), high.float())
    if not bool(torch.isfinite(amax).all()):
        row = int((~torch.isfinite(amax)).flatten().nonzero()[0])
        raise CheckpointError(f"row {row} of the weight holds NaN or infinity")
    return amax


def row_amax_of_bits(rows: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The same of (rows, in) in float16, bfloat16 or float32, faster, with nothing refused.

    Returns:
        float32 (rows,); NaN or infinite for rows that hold such a value.
    """
    integers, mask = _MAGNITUDES[rows.dtype]
    bits = scratch.tensor("magnitudes", tuple(rows.shape), integers)
    torch.bitwise_and(rows.view(integers), mask, out=bits)
    return bits.amax(dim=1).view(rows.dtype).float()
