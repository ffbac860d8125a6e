"""Which tensors an artefact of a quant_algo holds: the decoder's, with quantised weights replaced.

It knows names, shapes and dtypes, of the whole model and of each rank, and neither where the values
come from nor who runs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import layer_prefix, plain_tensors, quantized_linear
from llmserve.checkpoint.sharding import Shard, shards
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.quantization import Follows, weight_format

KV_CACHE_SCALE = "kv_cache_scaling_factor"


def checkpoint_tensors(config: PretrainedConfig) -> dict[str, TensorSpec]:
    """The tensors of a TensorRT-LLM checkpoint.

    W8A16 is TensorRT-LLM's form A: plain weights, which whoever loads them quantises.
    """
    if config.quantization.quant_algo == "W8A16":
        return plain_tensors(config) | _kv_cache_scales(config)
    return engine_tensors(config)


def engine_tensors(config: PretrainedConfig) -> dict[str, TensorSpec]:
    """The tensors of a native engine: quantised as they are computed with."""
    stored = weight_format(config.quantization.quant_algo).stored
    tensors: dict[str, TensorSpec] = {}
    for name, spec in plain_tensors(config).items():
        linear = quantized_linear(config, name)
        if linear is None:
            tensors[name] = spec
            continue
        for suffix, part in stored(spec.shape, spec.dtype).items():
            tensors[f"{linear}.{suffix}"] = part.spec
    return tensors | _kv_cache_scales(config)


def follows(config: PretrainedConfig, name: str) -> tuple[str, Follows]:
    """The plain tensor that a tensor of an artefact belongs to, and what of it it follows.

    Args:
        config: Of the artefact.
        name: One of ``checkpoint_tensors`` or ``engine_tensors``.

    Returns:
        e.g. ('transformer.layers.0.mlp.fc.weight', 'rows') for that linear's per_channel_scale. A
        plain tensor is itself and follows 'weight'; a scale of the KV cache follows 'nothing'.
    """
    module, _, suffix = name.rpartition(".")
    weight = f"{module}.weight"
    if suffix == KV_CACHE_SCALE:
        return name, "nothing"
    if suffix in ("weight", "bias") or quantized_linear(config, weight) is None:
        return name, "weight"
    stored = weight_format(config.quantization.quant_algo).stored((1, 1), torch.float32)
    return weight, stored[suffix].follows


def rank_shards(
    config: PretrainedConfig, tensors: Mapping[str, TensorSpec], rank: int
) -> dict[str, Shard]:
    """What a rank holds of each of ``checkpoint_tensors`` or ``engine_tensors``.

    A scale goes where the rows or columns of its weight go.
    """
    plain = shards(config, rank)
    result: dict[str, Shard] = {}
    for name, spec in tensors.items():
        owner, what = follows(config, name)
        if what == "weight":
            result[name] = plain[owner]
        elif what == "rows":
            result[name] = replace(plain[owner], columns=None, vectors=True)
        elif what == "columns" and (columns := plain[owner].columns) is not None:
            result[name] = Shard(rows=(columns,), vectors=True)
        else:
            rows = math.prod(spec.shape)
            result[name] = Shard(rows=((0, rows),), vectors=True)
    return result


def rank_tensors(
    config: PretrainedConfig, tensors: Mapping[str, TensorSpec], rank: int
) -> dict[str, TensorSpec]:
    """The tensors of a rank's file."""
    return {
        name: TensorSpec(shard.shape(tensors[name].shape), tensors[name].dtype)
        for name, shard in rank_shards(config, tensors, rank).items()
    }


def kv_cache_scale(layer: int) -> str:
    """The name of a layer's scale of K and V, float32 (1,)."""
    return f"{layer_prefix(layer)}.attention.{KV_CACHE_SCALE}"


def _kv_cache_scales(config: PretrainedConfig) -> dict[str, TensorSpec]:
    if config.quantization.kv_cache_quant_algo is None:
        return {}
    spec = TensorSpec((1,), torch.float32)
    return {kv_cache_scale(layer): spec for layer in range(config.num_hidden_layers)}
