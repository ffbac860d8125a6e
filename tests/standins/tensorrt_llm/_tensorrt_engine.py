"""The engine's LLM, which 1.3 has not."""

from tensorrt_llm._behaviour import is_engine_generation

if not is_engine_generation():
    raise ImportError("there are no engines from 1.3 on")

from tensorrt_llm._llm import EngineLLM as LLM

__all__ = ["LLM"]
