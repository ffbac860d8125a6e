"""Writes a TensorRT-LLM checkpoint: config.json, rank0.safetensors, and the tokenizer's files.

It reads tensors one at a time, in the order of the file it writes, so that memory holds the
sources of one tensor and its result. It knows tables and formats, and neither runtime nor engine.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llmserve.checkpoint.companions import GENERATION_CONFIG, companions_bytes, copy_companions
from llmserve.checkpoint.config import (
    DTYPES,
    FP8_ROWWISE_EXCLUDE_MODULES,
    PretrainedConfig,
    QuantConfig,
)
from llmserve.checkpoint.config_file import CONFIG_FILE, check_kind, write_json
from llmserve.checkpoint.decoder_tensors import (
    EMBEDDING,
    LM_HEAD,
    plain_tensors,
    quantized_linear,
    torch_dtype,
)
from llmserve.checkpoint.engine_dir import RANK_FILE
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.staging import check_free, staged_directory
from llmserve.checkpoint.writer import StreamingWriter
from llmserve.config import QUANT_ALGOS, DType, check_choice
from llmserve.convert.families import Family, family
from llmserve.convert.hub import locate
from llmserve.errors import CheckpointError, UnsupportedCheckpointError
from llmserve.quantization import weight_format
from llmserve.quantization.layout import checkpoint_tensors

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LAYER = re.compile(r"\.layers\.(\d+)\.")
# A header of names and shapes, and config.json.
_OVERHEAD_BYTES = 2**20

logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    out_dir: str | Path,
    *,
    quant: str = "none",
    dtype: DType = "auto",
    report: Report = no_report,
) -> Path:
    """Convert a Hugging Face checkpoint to a TensorRT-LLM checkpoint directory.

    Args:
        source: A directory, or a Hub id, 'owner/name' or 'owner/name@revision'.
        out_dir: The directory to make; it appears when it is whole.
        quant: 'none', 'w8a16' or 'fp8_rowwise'. W8A16 is written as TensorRT-LLM's quantize.py
            does, with plain weights that the build quantises: such a checkpoint is as large as
            its source.
        dtype: Of all that is not quantised. 'auto' is the source's own.
        report: Told after every tensor.

    Returns:
        ``out_dir``.

    Raises:
        ConfigError: ``quant`` or ``dtype`` is none of the choices.
        CheckpointError: The source cannot be read, is not whole or not supported, or the output
            cannot be written. Nothing is left at ``out_dir``.
    """
    check_choice("quant", quant, tuple(QUANT_ALGOS))
    check_choice("dtype", dtype, ("auto", *DTYPES))
    out_dir = Path(out_dir).expanduser()
    check_free(out_dir)
    path = locate(str(source))
    check_kind(path, "huggingface")
    with HuggingFaceCheckpoint(path) as checkpoint:
        rules = family(checkpoint.config)
        quantization = _quant_config(QUANT_ALGOS[quant])
        resolved = _source_dtype(checkpoint) if dtype == "auto" else dtype
        config = rules.pretrained_config(checkpoint.config, resolved, quantization)
        sources = match_tensors(checkpoint, rules, config)
        specs = checkpoint_tensors(config)
        total = sum(spec.nbytes for spec in specs.values())
        required = total + companions_bytes(path) + _OVERHEAD_BYTES
        with staged_directory(out_dir, required_bytes=required) as staging:
            done = 0
            with StreamingWriter(staging / RANK_FILE, specs) as writer:
                for name, tensor in _tensors(checkpoint, rules, config, sources):
                    writer.write(name, tensor)
                    done += tensor.nbytes
                    report("convert", done, total)
            write_json(staging / CONFIG_FILE, config.to_dict())
            copy_companions(path, staging)
            if not (staging / GENERATION_CONFIG).exists():
                write_json(staging / GENERATION_CONFIG, _generation_config(checkpoint.config))
    if not (out_dir / "tokenizer.json").exists():
        logger.warning("%s has no tokenizer.json: what is made of it takes token ids only", path)
    return out_dir


def half_precision(source: str | Path) -> DType:
    """The dtype that TensorRT-LLM's scripts take for 'auto': the source's, float32 as float16.

    Raises:
        CheckpointError: As ``convert``.
    """
    with HuggingFaceCheckpoint(locate(str(source))) as checkpoint:
        dtype = _source_dtype(checkpoint)
    return "bfloat16" if dtype == "bfloat16" else "float16"


def match_tensors(
    checkpoint: HuggingFaceCheckpoint, rules: Family, config: PretrainedConfig
) -> dict[str, list[str]]:
    """Find every target's sources, with shapes and dtypes checked, before any value is read.

    Returns:
        For each tensor of ``plain_tensors(config)``, its Hugging Face names in order.

    Raises:
        CheckpointError: A tensor is missing, left over, or of the wrong shape or dtype.
    """
    targets = plain_tensors(config)
    sources: dict[str, list[str]] = {}
    unused = set(checkpoint.names())
    for pattern, target_pattern in rules.TENSORS.items():
        for layer in range(config.num_hidden_layers) if "{i}" in pattern else (0,):
            name = pattern.replace("{i}", str(layer))
            target = target_pattern and target_pattern.replace("{i}", str(layer))
            if target is None:
                unused.discard(name)
            elif target in targets:
                sources.setdefault(target, []).append(name)
            elif target == LM_HEAD and name in unused:
                _check_tied(checkpoint, sources[EMBEDDING][0], name)
                unused.discard(name)
    for target, names in sources.items():
        shape = targets[target].shape
        rows = rules.split_rows(target, config) if len(names) > 1 else shape[:1]
        for name, count in zip(names, rows, strict=True):
            if name not in unused:
                raise CheckpointError(f"{checkpoint.path} lacks the tensor {name}")
            unused.remove(name)
            _check_source(checkpoint, name, (count, *shape[1:]))
    if unused:
        raise CheckpointError(_left_over(checkpoint, sorted(unused), config))
    return sources


def _check_source(checkpoint: HuggingFaceCheckpoint, name: str, shape: tuple[int, ...]) -> None:
    spec = checkpoint.spec(name)
    if spec.shape != shape:
        raise CheckpointError(
            f"{name} in {checkpoint.file_of(name)} has shape {list(spec.shape)}; by config.json "
            f"it must be {list(shape)}"
        )
    if spec.dtype not in _FLOATS:
        raise UnsupportedCheckpointError(
            f"{name} in {checkpoint.file_of(name)} is {spec}; it must be floating point: convert "
            "the checkpoint before quantisation"
        )


def _check_tied(checkpoint: HuggingFaceCheckpoint, embedding: str, lm_head: str) -> None:
    """Some tied checkpoints store both; that loses nothing only where they are the same."""
    if not torch.equal(checkpoint.tensor(embedding), checkpoint.tensor(lm_head)):
        raise CheckpointError(
            f"config.json has tie_word_embeddings, yet {lm_head} differs from {embedding}: set "
            "tie_word_embeddings to false if the model was trained so"
        )


def _left_over(
    checkpoint: HuggingFaceCheckpoint, names: list[str], config: PretrainedConfig
) -> str:
    first, more = names[0], f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    layer = _LAYER.search(first)
    why = "the architecture has no place for it"
    if layer and int(layer[1]) >= config.num_hidden_layers:
        why = f"config.json has num_hidden_layers {config.num_hidden_layers}"
    elif first.endswith("_proj.bias"):
        why = "config.json has attention_bias or mlp_bias off"
    return f"{checkpoint.file_of(first)} has the tensor {first}{more} left over: {why}"


def _tensors(
    checkpoint: HuggingFaceCheckpoint,
    rules: Family,
    config: PretrainedConfig,
    sources: Mapping[str, list[str]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the checkpoint to write, one at a time."""
    dtype = torch_dtype(config.dtype)
    algo = config.quantization.quant_algo
    for target in plain_tensors(config):
        parts = [_load(checkpoint, name, dtype) for name in sources[target]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        del parts
        linear = None if algo == "W8A16" else quantized_linear(config, target)
        if linear is None:
            yield target, tensor
            continue
        for suffix, stored in weight_format(algo).quantize(tensor).items():
            yield f"{linear}.{suffix}", stored


def _load(checkpoint: HuggingFaceCheckpoint, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One tensor in ``dtype``, with every value finite."""
    source = checkpoint.tensor(name)
    tensor = source.to(dtype)
    # Extremes tell as much as isfinite() would, without a tensor of flags: NaN is both of them.
    if not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        if all(torch.isfinite(extreme) for extreme in torch.aminmax(source)):
            wider = "bfloat16" if dtype == torch.float16 else "float32"
            raise CheckpointError(
                f"{name} in {checkpoint.file_of(name)} has values beyond {dtype_name(dtype)}'s "
                f"largest; convert with dtype {wider}"
            )
        raise CheckpointError(f"{name} in {checkpoint.file_of(name)} holds NaN or infinity")
    return tensor


def _source_dtype(checkpoint: HuggingFaceCheckpoint) -> str:
    """What config.json says, or else what the first tensor has."""
    names = checkpoint.names()
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no tensors")
    said = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = str(said or dtype_name(checkpoint.spec(names[0]).dtype))
    if dtype not in DTYPES:
        raise UnsupportedCheckpointError(
            f"the source's dtype is {dtype!r}; choose one of {', '.join(DTYPES)} with --dtype"
        )
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """'bfloat16' of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _quant_config(quant_algo: str | None) -> QuantConfig:
    if quant_algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return QuantConfig(
            quant_algo=quant_algo,
            clamp_val=[-1200.0, 1200.0],
            exclude_modules=list(FP8_ROWWISE_EXCLUDE_MODULES),
        )
    # W8A16 has no exclude_modules on purpose: a list would replace TensorRT-LLM's defaults.
    return QuantConfig(quant_algo=quant_algo)


def _generation_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers derives from config.json where there is no generation_config.json."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: hf[key] for key in keys if hf.get(key) is not None}
