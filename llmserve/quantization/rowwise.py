"""Quantising a weight some rows at a time: what formats with a scale per row have besides.

``quantize`` of such a format takes a weight whole and is the plain reference; ``quantize_rows``
gives the same bytes from rows that are in the cache, in memory that is used again, and measures
the error on the way.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, cast

import torch

from llmserve.checkpoint.scratch import Scratch
from llmserve.quantization import weight_format


class QuantizedRows(NamedTuple):
    """What comes of some rows besides their values.

    Attributes:
        scales: Stored tensors by suffix with one value a row, e.g. ``per_channel_scale``.
        squared_error: Sum of the squares of what quantisation changed.
        squared_norm: Sum of the squares of the weights.
    """

    scales: dict[str, torch.Tensor]
    squared_error: float
    squared_norm: float


class RowwiseFormat(Protocol):
    """What a format with ``ROWWISE`` on exports in addition."""

    def quantize_rows(
        self, rows: torch.Tensor, amax: torch.Tensor, out: torch.Tensor, scratch: Scratch
    ) -> QuantizedRows:
        """Quantise some rows.

        Args:
            rows: (rows, in) of any float dtype; every value is finite.
            amax: float32 (rows,), of ``row_amax``.
            out: (rows, in) in the dtype of the stored ``weight``; written.
            scratch: Memory to work in.
        """
        ...


def rowwise_format(quant_algo: str | None) -> RowwiseFormat | None:
    """The format behind a quant_algo if it takes rows, else None.

    Raises:
        UnsupportedCheckpointError: It is none of ours.
    """
    found = weight_format(quant_algo)
    return cast(RowwiseFormat, found) if quant_algo is not None and found.ROWWISE else None


def scaled_square(rows: torch.Tensor, scale: torch.Tensor) -> float:
    """The sum of the squares of ``rows * scale[:, None]``; float32 (rows, in) and (rows,)."""
    norms = torch.linalg.vector_norm(rows, dim=1).double() * scale.double()
    return float(norms.square().sum())
