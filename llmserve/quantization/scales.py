"""Symmetric scales from ranges, by the rule of NVIDIA's exporter."""

from __future__ import annotations

import torch

from llmserve.errors import CheckpointError


def symmetric_scale(amax: torch.Tensor, largest: float, dtype: torch.dtype) -> torch.Tensor:
    """The float32 scale under which ``amax`` becomes ``largest``.

    As nvidia-modelopt exports it: 1 for a range of zero, and none taken to be smaller than the
    smallest normal number of the values' dtype.

    Args:
        amax: Largest magnitudes, any shape.
        largest: 448 of float8_e4m3fn, 127 of int8.
        dtype: Of the values that the ranges were taken of.

    Raises:
        CheckpointError: A range is NaN, infinite or negative.
    """
    amax = amax.float()
    if not bool((torch.isfinite(amax) & (amax >= 0)).all()):
        raise CheckpointError(
            f"the largest magnitude of activations is {amax.tolist()}; it must be finite and at "
            "least 0: calibrate again with other text or another dtype"
        )
    scale = amax.clamp(min=torch.finfo(dtype).tiny) / largest
    return torch.where(amax == 0, torch.ones_like(scale), scale)
