"""What a directory holds that TensorRT-LLM can run, and the limits it is run under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.checkpoint.config_file import (
    CONFIG_FILE,
    KIND_NAMES,
    artifact_kind,
    read_json_object,
)
from llmserve.config import BuildConfig, EngineConfig
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from llmserve.runtime.tensorrt_llm_release import TensorRTLLMRelease

MODELOPT_CONFIG = "hf_quant_config.json"
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTLLMModel:
    """A model and the limits it is served under.

    Attributes:
        directory: Where it lies.
        is_engine: A TensorRT engine; else a Hugging Face checkpoint.
        dtype: Of activations.
        quant_algo: Of the weights, or None.
        vocab_size: Valid token ids are [0, vocab_size).
        tp_size: Tensor-parallel ranks.
        world_size: Ranks in all: a GPU each.
        max_batch_size: Most requests in one step.
        max_num_tokens: Most tokens in one step.
        max_seq_len: Longest prompt plus answer, in tokens.
        tokens_per_block: Tokens of one KV block.
        chunked_prefill: A prompt may be computed over several steps.
        gathers_generation_logits: The engine was built for log-probabilities.
        gathers_context_logits: Likewise for those of prompts.
        kv_bytes_per_token: K and V of one token over all layers and ranks.
        weights_bytes: Size of the weight files.
    """

    directory: Path
    is_engine: bool
    dtype: str
    quant_algo: str | None
    vocab_size: int
    tp_size: int
    world_size: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int
    chunked_prefill: bool
    gathers_generation_logits: bool
    gathers_context_logits: bool
    kv_bytes_per_token: int
    weights_bytes: int

    @property
    def max_prompt_tokens(self) -> int | None:
        """Longest prompt in tokens, or None where max_seq_len alone is the limit."""
        return None if self.chunked_prefill else self.max_num_tokens


def read_model(
    directory: Path, config: EngineConfig, release: TensorRTLLMRelease
) -> TensorRTLLMModel:
    """Read a directory's configuration and settle the limits.

    Raises:
        CheckpointError: It cannot be read, or this release of TensorRT-LLM cannot run it.
        ConfigError: A setting of ``config`` that TensorRT-LLM cannot honour for it.
    """
    kind = artifact_kind(directory)
    if kind == "tensorrt_llm_engine":
        if not release.has_engines:
            raise UnsupportedCheckpointError(
                f"{directory} is {KIND_NAMES[kind]}, and {release}, which is installed, runs no "
                "engines any more; install tensorrt-llm<1.3, or write a Hugging Face checkpoint "
                "with `llmserve convert --format hf` and serve that with --backend tensorrt-llm"
            )
    elif kind != "huggingface" or release.has_engines:
        raise UnsupportedCheckpointError(
            f"{directory} is {KIND_NAMES[kind]}; {release} is given "
            + (
                "an engine that `llmserve build --backend tensorrt-llm` has made"
                if release.has_engines
                else "a Hugging Face checkpoint"
            )
        )
    _refuse_settings(config)
    data = read_json_object(directory / CONFIG_FILE)
    try:
        if kind == "tensorrt_llm_engine":
            return _engine(directory, data, config)
        return _huggingface(directory, data, config)
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            f"{directory / CONFIG_FILE} lacks what it should hold: {error!r}"
        ) from error


def _refuse_settings(config: EngineConfig) -> None:
    """Raise ConfigError for what the native engine alone can honour."""
    if config.threads is not None:
        raise ConfigError(
            f"threads is {config.threads}; TensorRT-LLM computes on GPUs and takes no number of "
            "threads: leave --threads out"
        )
    if config.device not in ("auto", "cuda"):
        raise ConfigError(
            f"device is {config.device!r}; TensorRT-LLM runs on the GPUs it finds: leave it out, "
            "and choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    if config.speculative is not None:
        raise ConfigError(
            f"speculative is {config.speculative}; for TensorRT-LLM speculation is fixed when the "
            "engine is built: leave --speculative out"
        )
    if config.deterministic:
        raise ConfigError(
            "deterministic is True; TensorRT-LLM's kernels depend on the batch: leave "
            "--deterministic out, or use the native backend on a CPU"
        )
    if config.kv_cache.dtype != "auto":
        raise ConfigError(
            f"kv_cache_config.dtype is {config.kv_cache.dtype!r}; for TensorRT-LLM it is fixed by "
            "the checkpoint: leave it 'auto'"
        )


def _engine(directory: Path, data: Mapping[str, Any], config: EngineConfig) -> TensorRTLLMModel:
    model, build = data["pretrained_config"], data["build_config"]
    plugins = build["plugin_config"]
    quantization = model.get("quantization") or {}
    tokens_per_block = int(plugins["tokens_per_block"])
    wanted = config.kv_cache.tokens_per_block
    if wanted not in (None, tokens_per_block):
        raise ConfigError(
            f"tokens_per_block is {wanted}; the engine in {directory} was built with "
            f"{tokens_per_block}: leave it out, or build the engine again"
        )
    mapping = model.get("mapping") or {}
    heads = int(model["num_attention_heads"])
    return TensorRTLLMModel(
        directory=directory,
        is_engine=True,
        dtype=str(model["dtype"]),
        quant_algo=quantization.get("quant_algo"),
        vocab_size=int(model["vocab_size"]),
        tp_size=int(mapping.get("tp_size", 1)),
        world_size=int(mapping.get("world_size", 1)),
        max_batch_size=_limit(config, "max_batch_size", int(build["max_batch_size"]), directory),
        max_num_tokens=_limit(config, "max_num_tokens", int(build["max_num_tokens"]), directory),
        max_seq_len=_limit(config, "max_seq_len", int(build["max_seq_len"]), directory),
        tokens_per_block=tokens_per_block,
        # Without it the kernels cannot read a prompt's first part back from the cache.
        chunked_prefill=config.enable_chunked_prefill
        and bool(plugins.get("use_paged_context_fmha", False)),
        gathers_generation_logits=bool(build.get("gather_generation_logits", False)),
        gathers_context_logits=bool(build.get("gather_context_logits", False)),
        kv_bytes_per_token=_kv_bytes_per_token(
            layers=int(model["num_hidden_layers"]),
            kv_heads=int(model.get("num_key_value_heads") or heads),
            head_size=int(model.get("head_size") or int(model["hidden_size"]) // heads),
            dtype=str(model["dtype"]),
            kv_cache_quant_algo=quantization.get("kv_cache_quant_algo"),
        ),
        weights_bytes=_files_bytes(directory, "rank*"),
    )


def _huggingface(
    directory: Path, data: Mapping[str, Any], config: EngineConfig
) -> TensorRTLLMModel:
    model = data.get("text_config") or data  # multimodal checkpoints nest their language model
    path = directory / MODELOPT_CONFIG
    quantization = read_json_object(path)["quantization"] if path.is_file() else {}
    heads = int(model["num_attention_heads"])
    dtype = str(model.get("dtype") or model.get("torch_dtype") or "float16")
    default = BuildConfig()
    return TensorRTLLMModel(
        directory=directory,
        is_engine=False,
        dtype=dtype,
        quant_algo=quantization.get("quant_algo"),
        vocab_size=int(model["vocab_size"]),
        tp_size=1,
        world_size=1,
        # TensorRT-LLM's defaults too, and given to it, so that they are known on both sides.
        max_batch_size=config.max_batch_size or default.max_batch_size,
        max_num_tokens=config.max_num_tokens or default.max_num_tokens,
        max_seq_len=_limit(config, "max_seq_len", int(model["max_position_embeddings"]), directory),
        tokens_per_block=config.kv_cache.tokens_per_block or default.tokens_per_block,
        chunked_prefill=config.enable_chunked_prefill,
        # It computes them whenever they are asked for.
        gathers_generation_logits=True,
        gathers_context_logits=True,
        kv_bytes_per_token=_kv_bytes_per_token(
            layers=int(model["num_hidden_layers"]),
            kv_heads=int(model.get("num_key_value_heads") or heads),
            head_size=int(model.get("head_dim") or int(model["hidden_size"]) // heads),
            dtype=dtype,
            kv_cache_quant_algo=quantization.get("kv_cache_quant_algo"),
        ),
        weights_bytes=_files_bytes(directory, "*.safetensors"),
    )


def _limit(config: EngineConfig, name: str, most: int, directory: Path) -> int:
    """A limit of the model, or the lower one that was asked for."""
    wanted: int | None = getattr(config, name)
    if wanted is None:
        return most
    if wanted > most:
        raise ConfigError(
            f"{name} is {wanted}; {directory} is made for at most {most}: ask for less"
        )
    return wanted


def _kv_bytes_per_token(
    *, layers: int, kv_heads: int, head_size: int, dtype: str, kv_cache_quant_algo: str | None
) -> int:
    element_bytes = 1 if kv_cache_quant_algo in ("INT8", "FP8") else _DTYPE_BYTES.get(dtype, 2)
    return 2 * layers * kv_heads * head_size * element_bytes


def _files_bytes(directory: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in directory.glob(pattern) if path.is_file())
