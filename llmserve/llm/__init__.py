"""Prompts in, text out: an engine and a tokenizer together.

``AsyncLLM`` is what the server and batch jobs use, in their event loop; ``LLM`` is the same for a
plain script. Whatever concerns text is done here, the same for every engine: incremental
detokenisation, stop strings, n > 1. It knows neither HTTP nor OpenAI's protocol.
"""

from llmserve.llm.async_llm import AsyncLLM, RequestStream, open_llm
from llmserve.llm.offline import LLM, GenerationResult
from llmserve.llm.outputs import CompletionOutput, Logprob, RequestOutput

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "GenerationResult",
    "Logprob",
    "RequestOutput",
    "RequestStream",
    "open_llm",
]
