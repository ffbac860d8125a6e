"""llmserve: Hugging Face checkpoint to TensorRT-LLM checkpoint to engine to streaming answer.

The public names are loaded when they are first used: importing llmserve imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmserve.config import BuildConfig, EngineConfig, KvCacheConfig, NGramDecodingConfig
    from llmserve.core.sampling_params import GuidedDecodingParams, SamplingParams
    from llmserve.errors import (
        CheckpointError,
        CheckpointNotFoundError,
        ConfigError,
        ContextLengthError,
        EngineDeadError,
        EngineError,
        EngineOverloadedError,
        EngineShutdownError,
        InvalidRequestError,
        LlmserveError,
        RequestTimeoutError,
        UnsupportedCheckpointError,
    )
    from llmserve.llm import (
        LLM,
        AsyncLLM,
        CompletionOutput,
        GenerationResult,
        Logprob,
        RequestOutput,
        open_llm,
    )
    from llmserve.tokenizer import Tokenizer

__version__ = "0.1.0"

_MODULES = {
    "llmserve.config": ("BuildConfig", "EngineConfig", "KvCacheConfig", "NGramDecodingConfig"),
    "llmserve.core.sampling_params": ("GuidedDecodingParams", "SamplingParams"),
    "llmserve.errors": (
        "CheckpointError",
        "CheckpointNotFoundError",
        "ConfigError",
        "ContextLengthError",
        "EngineDeadError",
        "EngineError",
        "EngineOverloadedError",
        "EngineShutdownError",
        "InvalidRequestError",
        "LlmserveError",
        "RequestTimeoutError",
        "UnsupportedCheckpointError",
    ),
    "llmserve.llm": (
        "LLM",
        "AsyncLLM",
        "CompletionOutput",
        "GenerationResult",
        "Logprob",
        "RequestOutput",
        "open_llm",
    ),
    "llmserve.tokenizer": ("Tokenizer",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncLLM",
    "BuildConfig",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthError",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "EngineOverloadedError",
    "EngineShutdownError",
    "GenerationResult",
    "GuidedDecodingParams",
    "InvalidRequestError",
    "KvCacheConfig",
    "LlmserveError",
    "Logprob",
    "NGramDecodingConfig",
    "RequestOutput",
    "RequestTimeoutError",
    "SamplingParams",
    "Tokenizer",
    "UnsupportedCheckpointError",
    "__version__",
    "open_llm",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
