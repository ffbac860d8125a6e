"""Products whose every row is the same bits in any batch, on a CPU.

MKL and oneDNN have kernels by the number of rows, and these add up in different orders: one row by
itself is other bits than among many. So rows are filled up to a multiple that has been tried.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F

from llmserve.runtime.torch.kernels.linear import Linear

logger = logging.getLogger(__name__)

# Rows that are multiplied at once at most, so that all sizes there are lie within those tried.
MAX_ROWS = 256
_TILES = (1, 4, 16)
_MULTIPLES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24, 31, 32, 33, 48, 64, 100, 128, 256)
# Results that are compared: enough for a sum in another order to show, rounded to bfloat16 or not.
_TRIED_RESULTS = 1 << 17
_TRIED_BATCH = 7


class BatchInvariantLinear:
    """A linear layer of which a row's result depends on that row alone, to the bit.

    Args:
        linear: Any.
        tile: Rows are filled up to a multiple of it; of ``row_tile``.
        at_once: Whether several tiles are one product.
    """

    def __init__(self, linear: Linear, tile: int, *, at_once: bool) -> None:
        self._linear, self._tile = linear, tile
        self._max_rows = MAX_ROWS if at_once else tile

    @property
    def weights_bytes(self) -> int:
        """Bytes of the linear."""
        return self._linear.weights_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, in) -> (tokens, out)."""
        tokens = x.shape[0]
        missing = -tokens % self._tile
        if missing:
            x = F.pad(x, (0, 0, 0, missing))
        if x.shape[0] <= self._max_rows:
            y = self._linear(x)
        else:
            y = torch.cat([self._linear(part) for part in torch.split(x, self._max_rows)])
        return y[:tokens] if missing else y


class RowTiles:
    """Makes linears batch-invariant, and tries each kind of them once."""

    def __init__(self) -> None:
        self._found: dict[Hashable, int | None] = {}

    def invariant(
        self, linear: Linear, kind: Hashable, in_features: int, dtype: torch.dtype
    ) -> BatchInvariantLinear:
        """The linear, batch-invariant.

        Args:
            linear: To wrap.
            kind: Equal for linears that run the same products: format, shapes, dtypes.
            in_features: Of the linear.
            dtype: Of its inputs.
        """
        if kind not in self._found:
            self._found[kind] = row_tile(linear, in_features, dtype)
        tile = self._found[kind]
        return BatchInvariantLinear(linear, tile or _TILES[-1], at_once=tile is not None)


class BatchInvariantProducts:
    """Batches of products (rows, k) @ (k, n), each row by itself to the bit.

    Args:
        k: Length of the sums.
        n: Columns of the results.
        transposed: Whether the right sides are transposed views.

    Attributes:
        tile: What ``rows`` must be a multiple of.
    """

    def __init__(self, k: int, n: int, *, transposed: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        right = torch.randn(_TRIED_BATCH, *((n, k) if transposed else (k, n)), generator=generator)
        right = right.transpose(1, 2) if transposed else right

        def products(rows: torch.Tensor) -> torch.Tensor:
            left = rows.expand(_TRIED_BATCH, -1, -1)
            batch, single = torch.bmm(left, right), torch.bmm(left[:1], right[:1])
            return torch.cat((*batch, *single), dim=-1)

        tile = row_tile(products, k, torch.float32)
        self.tile, self._at_once = tile or _TILES[-1], tile is not None

    def __call__(self, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply float32 (batch, rows, k) and (batch, k, n) to ``out`` (batch, rows, n)."""
        if self._at_once:
            torch.bmm(left, right, out=out)
            return
        for x, y, result in zip(left, right, out, strict=True):
            for start in range(0, x.shape[0], self.tile):
                part = slice(start, start + self.tile)
                torch.mm(x[part], y, out=result[part])


def row_tile(
    product: Callable[[torch.Tensor], torch.Tensor], in_features: int, dtype: torch.dtype
) -> int | None:
    """The smallest tile of which any multiple of rows, up to MAX_ROWS, gives the same bits.

    Args:
        product: (rows, in) -> (rows, out), each row by itself but for its rounding.
        in_features: Columns of what it takes.
        dtype: Of what it takes.

    Returns:
        None if there is none: every product must then have the rows of one tile.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        out_features = product(torch.zeros(1, in_features, dtype=dtype)).shape[-1]
        distinct = min(max(_TRIED_RESULTS // out_features, _TILES[-1]), MAX_ROWS)
        distinct -= distinct % _TILES[-1]
        rows = torch.randn(distinct, in_features, generator=generator).to(dtype)
        for tile in _TILES:
            expected = torch.cat([product(part) for part in torch.split(rows, tile)])
            if all(_is_same(product, rows, expected, n) for n in _sizes(tile)):
                return tile
    logger.info("no number of rows keeps a product's bits: it is made %d at a time", _TILES[-1])
    return None


def _sizes(tile: int) -> Sequence[int]:
    return [tile * n for n in _MULTIPLES if tile * n <= MAX_ROWS]


def _is_same(
    product: Callable[[torch.Tensor], torch.Tensor],
    rows: torch.Tensor,
    expected: torch.Tensor,
    count: int,
) -> bool:
    # Another order for each size: every row comes to lie at other places.
    order = torch.randperm(MAX_ROWS, generator=torch.Generator().manual_seed(count))
    order = order[:count] % len(rows)
    return torch.equal(product(rows[order]), expected[order])
