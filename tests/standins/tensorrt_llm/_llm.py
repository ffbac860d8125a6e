"""Its LLM classes."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from tensorrt_llm._behaviour import behaviour, is_engine_generation
from tensorrt_llm._executor import Executor
from tensorrt_llm._params import KvCacheConfig, SamplingParams, SchedulerConfig
from tensorrt_llm._result import IterationResult, RequestOutput, no_iterations

logger = logging.getLogger(__name__)

_BOTH = {
    *("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width"),
    *("enable_chunked_prefill", "kv_cache_config", "scheduler_config", "guided_decoding_backend"),
    "gather_generation_logits",
}
_ENGINE_ONLY = {
    *("build_config", "quant_config", "calib_config", "workspace", "fast_build"),
    *("enable_build_cache", "embedding_parallel_mode", "batching_type", "normalize_log_probs"),
    "extended_runtime_perf_knob_config",
}
_PYTORCH_ONLY = {"enable_iter_perf_stats", "backend"}


class BaseLLM:
    """What both classes share."""

    on_engine: bool
    known: set[str]

    def __init__(
        self,
        model: str | Path,
        tokenizer: Any = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if unknown := set(kwargs) - self.known:
            raise ValueError(f"unknown arguments of LLM: {sorted(unknown)}")
        if kwargs.get("backend", "pytorch") != "pytorch":
            raise ValueError(f"backend {kwargs['backend']} is not supported any more")
        assert skip_tokenizer_init, "the stand-in has no tokenizer to load"
        if behaviour.load_error is not None:
            raise behaviour.load_error
        cache = kwargs.get("kv_cache_config") or KvCacheConfig()
        if not isinstance(cache, KvCacheConfig):
            raise ValueError("kv_cache_config is no KvCacheConfig")
        if not isinstance(kwargs.get("scheduler_config") or SchedulerConfig(), SchedulerConfig):
            raise ValueError("scheduler_config is no SchedulerConfig")
        self.kwargs = {**kwargs, "tensor_parallel_size": tensor_parallel_size}
        self.chunked = bool(kwargs.get("enable_chunked_prefill", False))
        self.config = json.loads((Path(model) / "config.json").read_text())
        self.max_batch_size = kwargs.get("max_batch_size") or 2048
        self.max_num_tokens = kwargs.get("max_num_tokens") or 8192
        self._load(Path(model), cache)
        max_tokens = cache.max_tokens or 64 * self.tokens_per_block
        self._executor: Executor | None = Executor(
            vocab_size=self.vocab_size,
            leaves_end_id_out=self.on_engine,
            max_batch_size=self.max_batch_size,
            num_blocks=max_tokens // self.tokens_per_block,
            tokens_per_block=self.tokens_per_block,
            tells_statistics=self.on_engine or bool(kwargs.get("enable_iter_perf_stats")),
        )
        behaviour.llms.append(self)

    vocab_size: int
    max_seq_len: int
    tokens_per_block: int

    def _load(self, model: Path, cache: KvCacheConfig) -> None:
        raise NotImplementedError

    def generate_async(
        self,
        *,  # the real one takes positions too, and they differ between releases
        inputs: Any,
        sampling_params: SamplingParams | None = None,
        lora_request: Any = None,
        prompt_adapter_request: Any = None,
        streaming: bool = False,
        kv_cache_retention_config: Any = None,
        disaggregated_params: Any = None,
        _postproc_params: Any = None,
        scheduling_params: Any = None,
        cache_salt: str | None = None,
    ) -> RequestOutput:
        asyncio.get_running_loop()
        executor = self._executor
        if executor is None or executor.stopped:
            raise RuntimeError("LLM is shutting down")
        params = sampling_params or SamplingParams()
        if not isinstance(params, SamplingParams):
            raise TypeError("sampling_params must be SamplingParams")
        if not isinstance(inputs, list) or not all(type(item) is int for item in inputs):
            raise TypeError(f"inputs must be a list of int, not {type(inputs)}")
        if not inputs:
            raise ValueError("the prompt is empty")
        if params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if params.stop is not None or params.bad is not None:
            raise RuntimeError("SamplingParams.stop is not processed by tokenizer")
        if params.max_tokens is None:
            params.max_tokens = self.max_seq_len - len(inputs)
        if len(inputs) + params.max_tokens > self.max_seq_len:
            if self.on_engine and not self.chunked:
                raise ValueError(f"prompt and max_tokens exceed max_seq_len {self.max_seq_len}")
            logger.warning("max_tokens is clipped")
            params.max_tokens = self.max_seq_len - len(inputs)
        if not self.chunked and len(inputs) > self.max_num_tokens:
            raise ValueError(f"the prompt exceeds max_num_tokens {self.max_num_tokens}")
        self._check_logprobs(params)
        self._check_bias(params)
        behaviour.submitted.append((list(inputs), params, cache_salt))
        return executor.submit(inputs, params, streaming)

    def _check_logprobs(self, params: SamplingParams) -> None:
        if not self.on_engine:
            return
        if params.logprobs and not self.kwargs.get("gather_generation_logits"):
            raise ValueError("logprobs requires gather_generation_logits=True")
        wants_context = params.prompt_logprobs or params.return_context_logits
        if wants_context and not self.config["build_config"]["gather_context_logits"]:
            raise ValueError("prompt_logprobs requires gather_context_logits")

    def _check_bias(self, params: SamplingParams) -> None:
        import torch

        bias = params.embedding_bias
        if bias is not None and not (
            isinstance(bias, torch.Tensor)
            and bias.dtype == torch.float32
            and bias.shape == (self.vocab_size,)
        ):
            raise ValueError("embedding_bias must be float32 of the vocabulary's size")

    def get_stats_async(self, timeout: float | None = 2) -> Any:
        assert self._executor is not None, "LLM is shutting down"
        statistics: IterationResult | None = self._executor.statistics
        if statistics is None:
            return no_iterations()
        statistics.timeout = timeout if timeout is not None else 2
        return statistics

    def shutdown(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.stop()
            executor.join()


class EngineLLM(BaseLLM):
    """``tensorrt_llm._tensorrt_engine.LLM`` of 1.2."""

    on_engine = True
    known = _BOTH | _ENGINE_ONLY

    def _load(self, model: Path, cache: KvCacheConfig) -> None:
        if "pretrained_config" not in self.config or "build_config" not in self.config:
            raise ValueError("the stand-in builds nothing: give it an engine")
        build, pretrained = self.config["build_config"], self.config["pretrained_config"]
        world_size = pretrained.get("mapping", {}).get("world_size", 1)
        if self.kwargs["tensor_parallel_size"] not in (1, world_size):
            raise ValueError("tensor_parallel_size differs from the engine's")
        for rank in range(world_size):
            if not (model / f"rank{rank}.engine").is_file():
                raise RuntimeError(f"rank{rank}.engine is missing")
        if cache.dtype != "auto":
            raise ValueError("kv_cache_config.dtype must be auto for an engine")
        self.tokens_per_block = build["plugin_config"]["tokens_per_block"]
        if self.chunked and not build["plugin_config"].get("use_paged_context_fmha"):
            raise RuntimeError("chunked context requires paged context FMHA")
        for name in ("max_batch_size", "max_num_tokens"):
            if getattr(self, name) > build[name]:
                logger.warning("%s is lowered to the engine's", name)
                setattr(self, name, build[name])
        self.vocab_size = pretrained["vocab_size"]
        self.max_seq_len = build["max_seq_len"]


class LLM(BaseLLM):
    """``tensorrt_llm.LLM``: PyTorch, on a Hugging Face checkpoint."""

    on_engine = False
    known = _BOTH | _PYTORCH_ONLY

    def _load(self, model: Path, cache: KvCacheConfig) -> None:
        assert not is_engine_generation(), "with 1.2, engines are what is served here"
        if "model_type" not in self.config and "architectures" not in self.config:
            raise ValueError(f"{model} is no Hugging Face checkpoint")
        self.tokens_per_block = cache.tokens_per_block
        self.vocab_size = self.config["vocab_size"]
        self.max_seq_len = self.kwargs.get("max_seq_len") or self.config["max_position_embeddings"]
