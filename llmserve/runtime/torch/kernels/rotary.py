"""Rotary position embedding (Su et al. 2021), plain and stretched to longer contexts.

The halves of a head are rotated against each other (TensorRT-LLM's ``rope_gpt_neox``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from llmserve.checkpoint.rotary_scaling import rope_type


def inverse_frequencies(
    rotary_dim: int, base: float, scaling: Mapping[str, Any] | None
) -> torch.Tensor:
    """Radians per position of each pair of a head, float32 (rotary_dim / 2,).

    Args:
        rotary_dim: Elements of one head that are rotated, even.
        base: theta.
        scaling: A ``rotary_scaling`` that ``check_rotary_scaling`` has passed. 'dynamic' is plain
            within the original length, and no sequence is ever longer.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequencies = 1.0 / base**exponents
    kind = rope_type(scaling)
    if scaling is None or kind in ("default", "dynamic"):
        return frequencies
    if kind == "linear":
        return frequencies / float(scaling["factor"])
    if kind == "llama3":
        return _llama3(frequencies, scaling)
    if kind == "yarn":
        return _yarn(frequencies, rotary_dim, base, scaling)
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


def _yarn(
    frequencies: torch.Tensor, rotary_dim: int, base: float, scaling: Mapping[str, Any]
) -> torch.Tensor:
    # YaRN (Peng et al. 2023): a pair that turns beta_fast times or more within the original context
    # stays, one that turns beta_slow times or less is stretched, and between is a ramp of pairs.
    original = float(scaling["original_max_position_embeddings"])

    def pair_of(turns: float) -> float:
        return rotary_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_of(scaling.get("beta_fast") or 32), pair_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    pairs = torch.arange(rotary_dim // 2, dtype=torch.float32)
    stretched = ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies / float(scaling["factor"]) * stretched + frequencies * (1 - stretched)


def yarn_magnitude(scaling: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosines and sines with: 0.1 * ln(factor) + 1, or attention_factor.

    Args:
        scaling: A ``rotary_scaling`` of type yarn.
    """
    if (given := scaling.get("attention_factor")) is not None:
        return float(given)
    factor = float(scaling["factor"])
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0


def long_rope_frequencies(rotary_dim: int, base: float, factors: Sequence[float]) -> torch.Tensor:
    """Radians per position of each pair under LongRoPE (Ding et al. 2024), float32.

    Args:
        rotary_dim: Elements of one head that are rotated, even.
        base: theta.
        factors: One for each pair: its frequency is divided by it.
    """
    return inverse_frequencies(rotary_dim, base, None) / torch.tensor(factors)


def long_rope_magnitude(max_position_embeddings: int, original: int) -> float:
    """What LongRoPE multiplies cosines and sines with: sqrt(1 + ln(stretch) / ln(original)).

    Args:
        max_position_embeddings: Of the stretched model, whatever the length it is run at.
        original: Context length before it was stretched.
    """
    stretch = max_position_embeddings / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0


def rotary_table(
    inverse_frequencies: torch.Tensor,
    max_seq_len: int,
    dtype: torch.dtype,
    magnitude: float = 1.0,
) -> torch.Tensor:
    """Cosines and sines of every position, for ``apply_rotary_``.

    Args:
        inverse_frequencies: (rotary_dim / 2,).
        max_seq_len: Number of positions.
        dtype: Of the result.
        magnitude: Cosines and sines are multiplied with it.

    Returns:
        (max_seq_len, 2, rotary_dim): ``[:, 0]`` the cosines, for both halves; ``[:, 1]`` the sines,
        negated for the first half. Angles are products in float32, rounded to ``dtype`` last.
    """
    positions = torch.arange(max_seq_len, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies[None, :]
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
    return table.to(dtype)


class Rotation(NamedTuple):
    """The rotation of a step's tokens.

    Attributes:
        cos: (tokens, 1, rotary_dim), rows of a table's ``[:, 0]``.
        sin: (tokens, 1, rotary_dim), rows of its ``[:, 1]``.
    """

    cos: torch.Tensor
    sin: torch.Tensor


class StepRotary(NamedTuple):
    """The rotations of a step's tokens.

    Attributes:
        full: Of layers that see everything.
        sliding: Of layers with a window.
    """

    full: Rotation
    sliding: Rotation


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryTables:
    """A model's ``rotary_table``.

    Attributes:
        full: Of layers that see everything.
        sliding: Of layers with a window, where these have a theta of their own; None: ``full``.
    """

    full: torch.Tensor
    sliding: torch.Tensor | None = None

    def at(self, positions: torch.Tensor) -> StepRotary:
        """The rotations of tokens at these positions, int64 (tokens,)."""
        full = _rows(self.full, positions)
        return StepRotary(full, full if self.sliding is None else _rows(self.sliding, positions))


def _rows(table: torch.Tensor, positions: torch.Tensor) -> Rotation:
    cos, sin = table.index_select(0, positions).unsqueeze(1).unbind(2)
    return Rotation(cos, sin)


def apply_rotary_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate every head in place.

    Args:
        x: (tokens, heads, rotary_dim), a view is fine.
        cos: (tokens, 1, rotary_dim), of a ``Rotation``.
        sin: (tokens, 1, rotary_dim), likewise.
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
