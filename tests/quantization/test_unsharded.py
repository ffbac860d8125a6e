"""Ranks put together again are the model that was split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmserve.checkpoint.config import ParallelMapping, PretrainedConfig
from llmserve.errors import CheckpointError
from llmserve.quantization.layout import checkpoint_tensors, rank_tensors
from llmserve.quantization.unsharded import UnshardedTensors
from tests.checkpoint.factories import pretrained_config
from tests.checkpoint.strategies import configs, random_bits, same_bits
from tests.sharded import DictSource, rank_part

_QKV = "transformer.layers.0.attention.qkv.weight"
_NORM = "transformer.ln_f.weight"


def _ranks(config: PretrainedConfig, whole: dict[str, torch.Tensor]) -> list[DictSource]:
    return [DictSource(rank_part(config, whole, rank)) for rank in range(config.tp_size)]


@given(config=configs(), seed=st.integers(0, 2**32))
def test_split_and_put_together(config: PretrainedConfig, seed: int) -> None:
    specs = checkpoint_tensors(config)
    whole = random_bits(specs, seed)
    ranks = _ranks(config, whole)
    for rank, source in enumerate(ranks):
        assert {n: source.spec(n) for n in source.names()} == rank_tensors(config, specs, rank)
    unsharded = UnshardedTensors(ranks, config)
    assert unsharded.names() == sorted(whole)
    for name, tensor in whole.items():
        assert unsharded.spec(name) == specs[name]
        assert same_bits(unsharded.tensor(name), tensor), name


@pytest.fixture
def duplicated() -> tuple[PretrainedConfig, list[DictSource]]:
    """Four ranks of two K and V heads: each head is on two ranks."""
    config = pretrained_config(mapping=ParallelMapping.tensor_parallel(4))
    return config, _ranks(config, random_bits(checkpoint_tensors(config), 1))


@pytest.mark.parametrize("name", [_NORM, _QKV, "transformer.vocab_embedding.weight"])
def test_ranks_that_contradict_each_other(
    duplicated: tuple[PretrainedConfig, list[DictSource]], name: str
) -> None:
    config, ranks = duplicated
    changed = ranks[3].tensors[name].clone()
    changed.view(torch.int16).view(-1)[-1] ^= 1  # of V, and so of a head that rank 2 has too
    ranks[3].tensors[name] = changed
    with pytest.raises(CheckpointError, match=rf"{name} of rank 3 differs from rank [02]'s"):
        UnshardedTensors(ranks, config).tensor(name)


def test_a_rank_of_another_split(duplicated: tuple[PretrainedConfig, list[DictSource]]) -> None:
    config, ranks = duplicated
    with pytest.raises(CheckpointError, match="tp_size is 4, but there are 3 ranks"):
        UnshardedTensors(ranks[:3], config)
    ranks[1].tensors[_QKV] = ranks[1].tensors[_QKV][:-1]
    for read in (UnshardedTensors(ranks, config).spec, UnshardedTensors(ranks, config).tensor):
        with pytest.raises(CheckpointError, match=rf"{_QKV} of rank 1 is bfloat16 \[47, 64\]; by"):
            read(_QKV)
    with pytest.raises(CheckpointError, match=r"no tensor transformer\.more"):
        UnshardedTensors(ranks, config).tensor("transformer.more")
