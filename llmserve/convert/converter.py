"""Writes a TensorRT-LLM checkpoint: config.json, rank0.safetensors, and the tokenizer's files.

It reads tensors one at a time, in the order of the file it writes, so that memory holds the
sources of one tensor and its result. It knows tables and formats, and neither runtime nor engine.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from llmserve.checkpoint.companions import GENERATION_CONFIG, companions_bytes, copy_companions
from llmserve.checkpoint.config import DTYPES, PretrainedConfig
from llmserve.checkpoint.config_file import CONFIG_FILE, check_kind, write_json
from llmserve.checkpoint.decoder_tensors import plain_tensors, quantized_linear
from llmserve.checkpoint.engine_dir import RANK_FILE
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.quant_config import FP8_ROWWISE_EXCLUDE_MODULES, QuantConfig
from llmserve.checkpoint.staging import check_free, staged_directory
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.checkpoint.writer import StreamingWriter
from llmserve.config import QUANT_ALGOS, DType, check_choice
from llmserve.convert.families import family
from llmserve.convert.hub import locate
from llmserve.convert.plain_tensors import PlainTensors
from llmserve.convert.plan import make_plan
from llmserve.errors import CheckpointError, UnsupportedCheckpointError
from llmserve.quantization import weight_format
from llmserve.quantization.layout import checkpoint_tensors

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
        source_tensors = PlainTensors(checkpoint, make_plan(checkpoint, rules, config))
        specs = checkpoint_tensors(config)
        total = sum(spec.nbytes for spec in specs.values())
        required = total + companions_bytes(path) + _OVERHEAD_BYTES
        with staged_directory(out_dir, required_bytes=required) as staging:
            done = 0
            with StreamingWriter(staging / RANK_FILE, specs) as writer:
                for name, tensor in _tensors(source_tensors, config):
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


def _tensors(source: TensorSource, config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the checkpoint to write, one at a time."""
    algo = config.quantization.quant_algo
    for target in plain_tensors(config):
        tensor = source.tensor(target)
        linear = None if algo == "W8A16" else quantized_linear(config, target)
        if linear is None:
            yield target, tensor
            continue
        for suffix, stored in weight_format(algo).quantize(tensor).items():
            yield f"{linear}.{suffix}", stored


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
