"""The largest magnitude of each row, with NaN and infinity refused: what scales are made from."""

from __future__ import annotations

import torch

from llmserve.errors import CheckpointError


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
