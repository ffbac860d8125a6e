"""Distributes a tensor that comes some rows at a time over the ranks' files, with digests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from blake3 import blake3

from llmserve.checkpoint.scratch import PAGE_BYTES, Scratch, bytes_of
from llmserve.checkpoint.sharding import Shard
from llmserve.checkpoint.writer import StreamingWriter


class RankSlices:
    """One tensor of a checkpoint on its way to the files of those ranks that hold some of it.

    Args:
        name: Of the tensor.
        writers: Of each rank's file.
        shards: What each rank holds of it, seen as a matrix; rows in ascending order.
        scratch: Memory to work in.
        digested: Whether to compute digests; without, ``finish`` is told the one of all ranks.

    Raises:
        ValueError: A rank has rows in another order than they come in.
    """

    def __init__(
        self,
        name: str,
        writers: Sequence[StreamingWriter],
        shards: Sequence[Shard],
        scratch: Scratch,
        *,
        digested: bool = True,
    ) -> None:
        for shard in shards:
            if any(after[0] < before[1] for before, after in pairwise(shard.rows)):
                raise ValueError(f"rows {shard.rows} of {name} are not in ascending order")
        self._name, self._writers, self._shards = name, writers, shards
        self._scratch = scratch
        self._hashers = [blake3() for _ in writers] if digested else None
        self._columns, self._dtype = 1, torch.float32

    def file_offset(self) -> int:
        """Where the first rank's next rows go: rows so placed in memory need no copy."""
        return self._writers[0].position(self._name)

    def take(self, rows: torch.Tensor, begin: int) -> None:
        """Write what ranks hold of some rows.

        Args:
            rows: (rows, columns) in the stored dtype, from row ``begin`` of the whole tensor on;
                they follow those that were taken before.
            begin: The first row's number.
        """
        self._columns, self._dtype = rows.shape[1], rows.dtype
        for rank, shard in enumerate(self._shards):
            for start, stop in shard.rows:
                first, last = max(start, begin), min(stop, begin + len(rows))
                if first < last:
                    part = rows[first - begin : last - begin]
                    if shard.columns is not None:
                        part = part[:, shard.columns[0] : shard.columns[1]]
                    self._write(rank, part)

    def finish(self, digest: str | None = None) -> list[str]:
        """Write the rows of zeros that fill ranks up; returns each rank's digest."""
        for rank, shard in enumerate(self._shards):
            if shard.padding_rows:
                zeros = torch.zeros(shard.padding_rows, self._columns, dtype=self._dtype)
                self._write(rank, zeros)
        if self._hashers is not None:
            return [hasher.hexdigest() for hasher in self._hashers]
        assert digest is not None
        return [digest] * len(self._writers)

    def _write(self, rank: int, part: torch.Tensor) -> None:
        writer = self._writers[rank]
        position = writer.position(self._name)
        if not part.is_contiguous() or (part.data_ptr() - position) % PAGE_BYTES:
            shape = tuple(part.shape)
            place = self._scratch.tensor("slice", shape, part.dtype, file_offset=position)
            part = place.copy_(part)
        if self._hashers is not None:
            self._hashers[rank].update(bytes_of(part))
        writer.append(self._name, part)
