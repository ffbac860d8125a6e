"""Rotary position embedding (Su et al. 2021): plain, linear and llama3 scaling.

The halves of a head are rotated against each other (TensorRT-LLM's ``rope_gpt_neox``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from llmserve.checkpoint.rotary_scaling import rope_type


def inverse_frequencies(
    head_size: int, base: float, scaling: Mapping[str, Any] | None
) -> torch.Tensor:
    """Radians per position of each pair of a head, float32 (head_size / 2,).

    Args:
        head_size: Elements of one head, even.
        base: theta.
        scaling: A ``rotary_scaling`` that ``check_rotary_scaling`` has passed. 'dynamic' is plain
            within the original length, and no sequence is ever longer.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    frequencies = 1.0 / base**exponents
    kind = rope_type(scaling)
    if scaling is None or kind in ("default", "dynamic"):
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    raise AssertionError(f"rotary scaling {kind!r} has passed the configuration's check")


def _llama3(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    # Llama 3.1's rule: a wavelength that fits the original context often stays, one that hardly
    # fits it once is stretched by the factor, and those between are interpolated.
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / float(scaling["factor"])
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * stretched + smooth * frequencies
    result = torch.where(wavelengths > original / low, stretched, between)
    return torch.where(wavelengths < original / high, frequencies, result)


def rotary_table(
    inverse_frequencies: torch.Tensor, max_seq_len: int, dtype: torch.dtype
) -> torch.Tensor:
    """Cosines and sines of every position, for ``apply_rotary_``.

    Returns:
        (max_seq_len, 2, head_size): ``[:, 0]`` the cosines, for both halves; ``[:, 1]`` the sines,
        negated for the first half. Angles are products in float32, rounded to ``dtype`` last.
    """
    positions = torch.arange(max_seq_len, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies[None, :]
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
    return table.to(dtype)


def apply_rotary_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate every head in place.

    Args:
        x: (tokens, heads, head_size), a view is fine.
        cos: (tokens, 1, head_size), rows of a table's ``[:, 0]``.
        sin: (tokens, 1, head_size), rows of its ``[:, 1]``.
    """
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    x.mul_(cos).addcmul_(swapped, sin)


def apply_rotary_reference(
    x: torch.Tensor, positions: torch.Tensor, inverse_frequencies: torch.Tensor
) -> torch.Tensor:
    """The definition: each pair (i, i + head_size / 2) turned by its angle, in float64."""
    result, half = x.double().clone(), x.shape[-1] // 2
    for token, position in enumerate(positions.tolist()):
        for pair in range(half):
            angle = position * float(inverse_frequencies[pair])
            first, second = x[token, :, pair].double(), x[token, :, pair + half].double()
            result[token, :, pair] = first * math.cos(angle) - second * math.sin(angle)
            result[token, :, pair + half] = second * math.cos(angle) + first * math.sin(angle)
    return result
