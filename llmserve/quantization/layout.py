"""Which tensors an artefact of a quant_algo holds: the decoder's, with quantised weights replaced.

It knows names, shapes and dtypes, of the whole model and of each rank, and neither where the values
come from nor who runs them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import layer_prefix, plain_tensors, quantized_linear
from llmserve.checkpoint.sharding import Shard, shards
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.quantization import Follows, weight_format
from llmserve.quantization.kv_cache import SCALE as KV_CACHE_SCALE
from llmserve.quantization.kv_cache import SCALES as KV_CACHE_SCALES


def checkpoint_tensors(config: PretrainedConfig) -> dict[str, TensorSpec]:
    """The tensors of a TensorRT-LLM checkpoint.

    W8A16 is TensorRT-LLM's form A: plain weights, which whoever loads them quantises.
    """
    if config.quantization.quant_algo == "W8A16":
        return plain_tensors(config) | _kv_cache_scales(config)
    return engine_tensors(config)


def stored_tensors(config: PretrainedConfig, names: Collection[str]) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint that holds these names.

    W8A16 weights that were quantised elsewhere, in the model's order of rows and columns and with
    float32 scales, are kept as they are: such a checkpoint has an engine's tensors already.
    """
    scales = (name for name in names if name.endswith(".per_channel_scale"))
    if config.quantization.quant_algo == "W8A16" and next(scales, None) is not None:
        return engine_tensors(config)
    return checkpoint_tensors(config)


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
    if suffix in KV_CACHE_SCALES:
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


def same_scale(config: PretrainedConfig, name: str) -> tuple[str, ...]:
    """The weights that are quantised with one scale, ``name`` among them.

    TensorRT-LLM computes ``mlp.fc`` and ``mlp.gate`` as one product, for which FP8 has one scale.

    Args:
        config: Of the artefact.
        name: A plain tensor.
    """
    module, _, linear = name.removesuffix(".weight").rpartition(".")
    if config.quantization.quant_algo != "FP8" or linear not in ("fc", "gate"):
        return (name,)
    pair = (f"{module}.fc.weight", f"{module}.gate.weight")
    tensors = plain_tensors(config)
    both = all(part in tensors and quantized_linear(config, part) for part in pair)
    return pair if both else (name,)


def kv_cache_scale(layer: int, suffix: str = KV_CACHE_SCALE) -> str:
    """The name of a layer's scale of K and V, float32 (1,), or of one of ``kv_cache.SCALES``."""
    return f"{layer_prefix(layer)}.attention.{suffix}"


def _kv_cache_scales(config: PretrainedConfig) -> dict[str, TensorSpec]:
    if config.quantization.kv_cache_quant_algo is None:
        return {}
    spec = TensorSpec((1,), torch.float32)
    return {
        kv_cache_scale(layer, suffix): spec
        for layer in range(config.num_hidden_layers)
        for suffix in KV_CACHE_SCALES
    }
