"""What its ``llmapi`` exports, as far as it is described."""

from tensorrt_llm._llm import LLM
from tensorrt_llm._params import (
    CapacitySchedulerPolicy,
    KvCacheConfig,
    SamplingParams,
    SchedulerConfig,
)
from tensorrt_llm._result import CompletionOutput, RequestError, RequestOutput

__all__ = [
    "LLM",
    "CapacitySchedulerPolicy",
    "CompletionOutput",
    "KvCacheConfig",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
]
