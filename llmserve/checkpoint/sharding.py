"""How tensor-parallel ranks share a model: TensorRT-LLM's rules, as row and column ranges.

Outputs of qkv, fc and gate are split (each of q, k and v by itself), and so are the inputs of dense
and proj, whose partial results the ranks add up. K and V heads are duplicated where there are fewer
than ranks. The vocabulary is padded to a multiple of the ranks. Norms, routers and the biases of
dense and proj are on every rank.

A tensor is seen as a matrix: (experts, out, in) as experts * out rows, and a vector (n,), or one of
each expert, as rows of one column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import EMBEDDING, LM_HEAD, plain_tensors
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.errors import CheckpointError

Range = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one rank holds of a tensor.

    Attributes:
        rows: Half-open ranges of the whole tensor's rows, in the order in which the rank has them.
        columns: Half-open range of its columns; None: all.
        padding_rows: Rows of zeros behind these.
        vectors: The tensor has one value a row, (..., out), and not (..., out, in).
    """

    rows: tuple[Range, ...]
    columns: Range | None = None
    padding_rows: int = 0
    vectors: bool = False

    @property
    def num_rows(self) -> int:
        """Rows that the rank has, padding included."""
        return sum(stop - start for start, stop in self.rows) + self.padding_rows

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The rank's shape of a tensor whose whole shape is this."""
        *leading, _, width = (*whole, 1) if self.vectors else whole
        columns = width if self.columns is None else self.columns[1] - self.columns[0]
        shape = (*leading, self.num_rows // math.prod(leading), columns)
        return shape[:-1] if self.vectors else shape

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """The rank's part of a whole tensor: a view where it is one range of rows, else a copy."""
        matrix = whole.reshape(-1, 1 if self.vectors else whole.shape[-1])
        parts = [matrix[start:stop] for start, stop in self.rows]
        if self.padding_rows:
            parts.append(matrix.new_zeros(self.padding_rows, matrix.shape[1]))
        part = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.columns is not None:
            part = part[:, self.columns[0] : self.columns[1]]
        return part.reshape(self.shape(tuple(whole.shape)))


def check_tp_size(config: PretrainedConfig, tp_size: int) -> None:
    """Check that a model can be split over so many ranks.

    Raises:
        CheckpointError: A size is not a multiple of the ranks.
    """
    if tp_size < 1:
        raise CheckpointError(f"tp_size is {tp_size}; it must be at least 1")
    sizes = {"num_attention_heads": config.num_attention_heads}
    if config.moe is not None:
        sizes["moe_intermediate_size"] = config.expert_size
    else:
        sizes["intermediate_size"] = config.intermediate_size
    for name, size in sizes.items():
        if size % tp_size:
            raise CheckpointError(f"tp_size is {tp_size}; it must divide {name}, {size}")
    kv_heads = config.num_key_value_heads
    if kv_heads % tp_size and tp_size % kv_heads:
        raise CheckpointError(
            f"tp_size is {tp_size}; it must divide num_key_value_heads, {kv_heads}, or be a "
            "multiple of it"
        )


def kv_heads_per_rank(config: PretrainedConfig) -> int:
    """K and V heads that a rank holds."""
    return max(1, config.num_key_value_heads // config.tp_size)


def padded_vocab_size(config: PretrainedConfig) -> int:
    """vocab_size, up to a multiple of the ranks."""
    return -(-config.vocab_size // config.tp_size) * config.tp_size


def shards(config: PretrainedConfig, rank: int) -> dict[str, Shard]:
    """What a rank holds of each of ``plain_tensors(config)``."""
    specs = plain_tensors(config)
    return {name: _shard(config, name, spec, rank) for name, spec in specs.items()}


def _shard(config: PretrainedConfig, name: str, spec: TensorSpec, rank: int) -> Shard:
    if name in (EMBEDDING, LM_HEAD):
        return _vocabulary(config, name, rank)
    vectors = len(spec.shape) == 1
    rows = spec.shape[0] if vectors else math.prod(spec.shape[:-1])
    whole = Shard(rows=((0, rows),), vectors=vectors)
    tp, linear = config.tp_size, ".".join(name.split(".")[3:-1])
    if tp == 1:
        return whole
    if linear == "attention.qkv":
        return Shard(rows=_qkv_rows(config, rank), vectors=vectors)
    if linear in ("mlp.fc", "mlp.gate"):
        # Up and gate in one weight, and every expert's, are split each by itself.
        halves = 2 if config.fused_mlp or config.moe is not None else 1
        parts = halves * (config.moe.num_experts if config.moe is not None else 1)
        size = rows // parts
        share = size // tp
        begins = [part * size + rank * share for part in range(parts)]
        return Shard(rows=tuple((begin, begin + share) for begin in begins), vectors=vectors)
    if linear in ("attention.dense", "mlp.proj") and not vectors:
        share = spec.shape[-1] // tp
        return Shard(rows=((0, rows),), columns=(rank * share, (rank + 1) * share))
    return whole


def _qkv_rows(config: PretrainedConfig, rank: int) -> tuple[Range, ...]:
    size, heads, kv_heads = (
        config.head_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    share, kv_share = heads // config.tp_size, kv_heads_per_rank(config)
    first = rank * kv_heads // config.tp_size  # with fewer heads than ranks, several have the same
    k, v = heads + first, heads + kv_heads + first
    ranges = ((rank * share, (rank + 1) * share), (k, k + kv_share), (v, v + kv_share))
    return tuple((start * size, stop * size) for start, stop in ranges)


def _vocabulary(config: PretrainedConfig, name: str, rank: int) -> Shard:
    if name == EMBEDDING and not config.use_parallel_embedding:
        return Shard(rows=((0, config.vocab_size),))
    share = padded_vocab_size(config) // config.tp_size
    start, stop = (min(at, config.vocab_size) for at in (rank * share, (rank + 1) * share))
    return Shard(rows=((start, stop),), padding_rows=share - (stop - start))
