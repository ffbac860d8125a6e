"""A checkpoint's ranks seen as one model: the inverse of ``checkpoint.sharding``.

Whoever measures, inspects or exports a checkpoint of several ranks reads it as if it had been
written for one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.sharding import Range, Shard
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.errors import CheckpointError
from llmserve.quantization.layout import rank_shards, stored_tensors

# Values are moved and compared as bits: a NaN is equal to itself, and 0 is not -0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class UnshardedTensors:
    """A ``TensorSource`` of the whole model over the sources of all its ranks.

    Parts are put back where they came from and padding is left out. What several ranks hold (norms,
    routers, duplicated K and V heads, an embedding that is not split) is compared whenever it is
    read: ranks of different conversions must not pass for a model.

    W8A16 weights of an engine have scales of their own on each rank and cannot be put together;
    those of its checkpoint, which are plain, can.

    Args:
        sources: A checkpoint's ranks, in order.
        config: Its config.json, ``share_embedding_table`` set if there is no lm_head.

    Raises:
        CheckpointError: There are more or fewer sources than ranks.
    """

    def __init__(self, sources: Sequence[TensorSource], config: PretrainedConfig) -> None:
        if len(sources) != config.tp_size:
            raise CheckpointError(
                f"mapping.tp_size is {config.tp_size}, but there are {len(sources)} ranks"
            )
        self._sources = list(sources)
        self._specs = stored_tensors(config, sources[0].names())
        self._shards = [rank_shards(config, self._specs, r) for r in range(config.tp_size)]

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a whole tensor.

        Raises:
            CheckpointError: There is no such tensor, or a rank's has another shape or dtype than
                config.json asks for.
        """
        if name not in self._specs:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        whole = self._specs[name]
        for rank, source in enumerate(self._sources):
            expected = TensorSpec(self._shards[rank][name].shape(whole.shape), whole.dtype)
            if (given := source.spec(name)) != expected:
                raise CheckpointError(
                    f"{name} of rank {rank} is {given}; by config.json it is {expected}"
                )
        return whole

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor; never write to it, for one that all ranks hold is rank 0's own.

        Raises:
            CheckpointError: As ``spec``; or a rank's cannot be read, or differs from another's
                where both should be the same.
        """
        spec = self.spec(name)
        shards = [shards[name] for shards in self._shards]
        if all(shard.shape(spec.shape) == spec.shape for shard in shards):
            whole = self._sources[0].tensor(name)
            written = {(rows, shards[0].columns): 0 for rows in shards[0].rows}
        else:
            whole, written = torch.empty(spec.shape, dtype=spec.dtype), {}
        for rank in range(1 if written else 0, len(shards)):
            self._put(name, rank, shards[rank], whole, written)
        return whole

    def _put(
        self,
        name: str,
        rank: int,
        shard: Shard,
        whole: torch.Tensor,
        written: dict[tuple[Range, Range | None], int],
    ) -> None:
        """Write a rank's ranges to the whole, or compare them with what another wrote there."""
        target = _matrix(whole, shard)
        source = _matrix(self._sources[rank].tensor(name), shard)
        begin = 0
        for rows in shard.rows:
            place = target[slice(*rows)]
            if shard.columns is not None:
                place = place[:, slice(*shard.columns)]
            part = source[begin : begin + len(place)]
            begin += len(place)
            other = written.setdefault((rows, shard.columns), rank)
            if other == rank:
                place.copy_(part)
            elif not torch.equal(place, part):
                raise CheckpointError(
                    f"{name} of rank {rank} differs from rank {other}'s where both hold the same "
                    "part; the ranks are not of one conversion: convert again"
                )


def _matrix(tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
    """A tensor's bits as the matrix that a shard speaks of."""
    matrix = tensor.reshape(-1, 1 if shard.vectors else tensor.shape[-1])
    return matrix.view(_BITS[tensor.dtype.itemsize])
