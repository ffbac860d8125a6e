"""Which part of a tensor is a rank's, against TensorRT-LLM's rules in chunks and concatenations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmserve.checkpoint.config import MoeConfig, ParallelMapping, PretrainedConfig
from llmserve.checkpoint.decoder_tensors import plain_tensors
from llmserve.checkpoint.sharding import (
    check_tp_size,
    kv_heads_per_rank,
    padded_vocab_size,
    shards,
)
from llmserve.errors import CheckpointError
from tests.checkpoint.factories import pretrained_config
from tests.checkpoint.strategies import configs, random_bits, same_bits


def expected_part(
    config: PretrainedConfig, name: str, whole: torch.Tensor, rank: int
) -> torch.Tensor:
    tp, head = config.tp_size, config.head_size
    bias = name.endswith(".bias")
    if "vocab_embedding" in name and not config.use_parallel_embedding:
        return whole
    if "vocab_embedding" in name or "lm_head" in name:
        missing = -len(whole) % tp
        padded = torch.cat([whole, torch.zeros(missing, whole.shape[1], dtype=whole.dtype)])
        return padded.chunk(tp)[rank]
    if "attention.qkv" in name:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        q, k, v = whole.split([heads * head, kv_heads * head, kv_heads * head])
        if kv_heads < tp:
            k, v = (
                t.unflatten(0, (kv_heads, head)).repeat_interleave(tp // kv_heads, 0).flatten(0, 1)
                for t in (k, v)
            )
        return torch.cat([t.chunk(tp)[rank] for t in (q, k, v)])
    if "mlp.fc" in name and config.moe is not None:
        up, gate = whole.chunk(2, dim=1)
        return torch.cat([up.chunk(tp, 1)[rank], gate.chunk(tp, 1)[rank]], dim=1)
    if "mlp.fc" in name and config.architecture == "Phi3ForCausalLM":
        up, gate = whole.chunk(2)
        return torch.cat([up.chunk(tp)[rank], gate.chunk(tp)[rank]])
    if "mlp.fc" in name or "mlp.gate" in name:
        return whole.chunk(tp)[rank]
    if ("attention.dense" in name or "mlp.proj" in name) and not bias:
        return whole.chunk(tp, dim=-1)[rank]
    return whole


@given(config=configs(), seed=st.integers(0, 2**32))
def test_each_rank_has_its_part(config: PretrainedConfig, seed: int) -> None:
    check_tp_size(config, config.tp_size)
    whole = random_bits(plain_tensors(config), seed)
    for rank in range(config.tp_size):
        parts = shards(config, rank)
        assert parts.keys() == whole.keys()
        for name, tensor in whole.items():
            expected = expected_part(config, name, tensor, rank)
            assert same_bits(parts[name].take(tensor), expected), (name, rank)
            assert parts[name].shape(tuple(tensor.shape)) == tuple(expected.shape), (name, rank)


def test_what_a_part_costs() -> None:
    config = pretrained_config(
        mapping=ParallelMapping.tensor_parallel(2), use_parallel_embedding=True
    )
    whole = random_bits(plain_tensors(config), 0)
    # One range of rows is a view of the source: nothing is copied until it is written.
    for name in ("transformer.vocab_embedding.weight", "transformer.layers.0.mlp.fc.weight"):
        part = shards(config, 1)[name].take(whole[name])
        assert part.untyped_storage().data_ptr() == whole[name].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("tp_size", "overrides", "words"),
    [
        (0, {}, "tp_size is 0; it must be at least 1"),
        (3, {}, "tp_size is 3; it must divide num_attention_heads, 4"),
        (2, {"intermediate_size": 97}, "must divide intermediate_size, 97"),
        (
            4,
            {"moe": MoeConfig(num_experts=2, top_k=1), "moe_intermediate_size": 6},
            "must divide moe_intermediate_size, 6",
        ),
        (
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 6},
            "must divide num_key_value_heads, 6, or be a multiple of it",
        ),
    ],
)
def test_a_model_that_ranks_cannot_share(
    tp_size: int, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        check_tp_size(pretrained_config(**overrides), tp_size)


def test_heads_and_vocabulary_of_a_rank() -> None:
    for tp_size, kv_heads, vocab_size in ((1, 2, 321), (2, 1, 322), (4, 1, 324)):
        config = pretrained_config(mapping=ParallelMapping.tensor_parallel(tp_size), vocab_size=321)
        assert kv_heads_per_rank(config) == kv_heads
        assert padded_vocab_size(config) == vocab_size
