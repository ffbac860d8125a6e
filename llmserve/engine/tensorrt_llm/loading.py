"""Makes NVIDIA's LLM. The only file at serving time that imports tensorrt_llm."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmserve.config import EngineConfig
from llmserve.engine.tensorrt_llm.model import TensorRTLLMModel
from llmserve.engine.tensorrt_llm.sampling import Abilities
from llmserve.errors import EngineError
from llmserve.runtime.tensorrt_llm_release import TensorRTLLMRelease


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedLLM:
    """An LLM that is ready, and the two names of its package that serving needs.

    Attributes:
        llm: ``tensorrt_llm.LLM`` or ``tensorrt_llm._tensorrt_engine.LLM``.
        sampling_params: Its class SamplingParams.
        request_error: What iterating over a result raises for a fault of that request alone.
        abilities: What this LLM can do for a request.
    """

    llm: Any
    sampling_params: Callable[..., Any]
    request_error: type[Exception]
    abilities: Abilities


def load(
    model: TensorRTLLMModel,
    config: EngineConfig,
    release: TensorRTLLMRelease,
    *,
    gather_generation_logits: bool = False,
) -> LoadedLLM:
    """Import TensorRT-LLM and load a model: minutes, and not to be called in an event loop.

    Raises:
        EngineError: It could not be imported, or it refused the model.
    """
    gathers = gather_generation_logits or model.gathers_generation_logits
    try:
        api = importlib.import_module("tensorrt_llm.llmapi")
        module = "tensorrt_llm._tensorrt_engine" if model.is_engine else "tensorrt_llm"
        llm_class = importlib.import_module(module).LLM
        arguments = _llm_arguments(api, model, config)
        if model.is_engine and gathers:
            arguments["gather_generation_logits"] = True
        llm = llm_class(**arguments)
    except Exception as error:  # its own errors have no common class
        raise EngineError(f"{release} could not load {model.directory}: {error}") from error
    fields = {field.name for field in dataclasses.fields(api.SamplingParams)}
    return LoadedLLM(
        llm=llm,
        sampling_params=api.SamplingParams,
        request_error=api.RequestError,
        abilities=Abilities(
            release=release,
            is_engine=model.is_engine,
            vocab_size=model.vocab_size,
            logprobs=gathers,
            prompt_logprobs=model.gathers_context_logits,
            prompt_ignore_length="prompt_ignore_length" in fields,
        ),
    )


def _llm_arguments(api: Any, model: TensorRTLLMModel, config: EngineConfig) -> dict[str, Any]:
    cache = config.kv_cache
    cache_arguments: dict[str, Any] = {
        "enable_block_reuse": cache.enable_block_reuse,
        "enable_partial_reuse": cache.enable_partial_reuse,
        "free_gpu_memory_fraction": cache.memory_fraction or cache.free_gpu_memory_fraction,
    }
    if cache.max_tokens is not None:
        cache_arguments["max_tokens"] = cache.max_tokens
    if cache.max_total_bytes is not None:
        cache_arguments["max_gpu_total_bytes"] = cache.max_total_bytes
    arguments: dict[str, Any] = {
        "model": str(model.directory),
        # Text is ours, for every engine: it sees token ids alone.
        "skip_tokenizer_init": True,
        "tensor_parallel_size": model.tp_size,
        "max_batch_size": model.max_batch_size,
        "max_num_tokens": model.max_num_tokens,
        "max_seq_len": model.max_seq_len,
        "enable_chunked_prefill": model.chunked_prefill,
        "scheduler_config": api.SchedulerConfig(
            capacity_scheduler_policy=getattr(
                api.CapacitySchedulerPolicy, config.capacity_scheduler_policy.upper()
            )
        ),
    }
    if not model.is_engine:
        cache_arguments["tokens_per_block"] = model.tokens_per_block
        arguments["enable_iter_perf_stats"] = True  # engines always tell them
    arguments["kv_cache_config"] = api.KvCacheConfig(**cache_arguments)
    return arguments
