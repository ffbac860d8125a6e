"""config.json of what a conversion makes, from the source's and the settings. Reads no tensor."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llmserve.checkpoint.config import DTYPES, ParallelMapping, PretrainedConfig
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.quant_config import FP8_ROWWISE_EXCLUDE_MODULES, QuantConfig
from llmserve.checkpoint.sharding import check_tp_size
from llmserve.config import ConvertConfig, DType
from llmserve.convert.families import family
from llmserve.convert.hub import locate
from llmserve.convert.import_hf import imported_settings, quantization_of
from llmserve.errors import CheckpointError, UnsupportedCheckpointError


def target_config(checkpoint: HuggingFaceCheckpoint, settings: ConvertConfig) -> PretrainedConfig:
    """The config.json that a conversion writes.

    A source that is quantised already keeps its quantisation.

    Raises:
        ConfigError: Another quantisation is asked for than the source has.
        CheckpointError: The source's config.json lacks a key, or the model can't be split so.
        UnsupportedCheckpointError: A feature or a dtype that is not implemented.
    """
    rules = family(checkpoint.config)
    if (quantization := quantization_of(checkpoint.path)) is not None:
        settings = imported_settings(quantization, settings)
    dtype = source_dtype(checkpoint) if settings.dtype == "auto" else settings.dtype
    # Without quantisation first: what is excluded from that depends on the model.
    config = rules.pretrained_config(checkpoint.config, dtype, QuantConfig())
    check_tp_size(config, settings.tp_size)
    return dataclasses.replace(
        config,
        # As NVIDIA's exporter has it: the embedding is split whenever there is more than one rank.
        use_parallel_embedding=settings.tp_size > 1,
        mapping=ParallelMapping.tensor_parallel(settings.tp_size),
        quantization=_quantization(config, settings),
    )


def _quantization(config: PretrainedConfig, settings: ConvertConfig) -> QuantConfig:
    algo = settings.quant_algo
    exclude: list[str] | None = None
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        exclude = list(FP8_ROWWISE_EXCLUDE_MODULES)
    elif algo in ("FP8", "W8A8_SQ_PER_CHANNEL"):
        exclude = ["lm_head"]
    # W8A16 has no list on purpose: it would replace TensorRT-LLM's own, which has the router in it.
    if exclude is not None and config.moe is not None:
        exclude.append("*router")
    return QuantConfig(
        quant_algo=algo,
        kv_cache_quant_algo=settings.kv_cache_quant_algo,
        smoothquant_val=settings.smoothquant_val,
        clamp_val=[-1200.0, 1200.0] if algo == "FP8_PER_CHANNEL_PER_TOKEN" else None,
        exclude_modules=exclude,
    )


def half_precision(source: str | Path) -> DType:
    """The dtype that TensorRT-LLM's scripts take for 'auto': the source's, float32 as float16.

    Raises:
        CheckpointError: The source cannot be read.
    """
    with HuggingFaceCheckpoint(locate(str(source))) as checkpoint:
        dtype = source_dtype(checkpoint)
    return "bfloat16" if dtype == "bfloat16" else "float16"


def source_dtype(checkpoint: HuggingFaceCheckpoint) -> str:
    """What config.json says, or else what the first tensor has.

    Raises:
        CheckpointError: There are no tensors.
        UnsupportedCheckpointError: It is none of ours.
    """
    names = checkpoint.names()
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no tensors")
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = str(said or str(checkpoint.spec(names[0]).dtype).removeprefix("torch."))
    if dtype not in DTYPES:
        raise UnsupportedCheckpointError(
            f"the source's dtype is {dtype!r}; choose one of {', '.join(DTYPES)} with --dtype"
        )
    return dtype
