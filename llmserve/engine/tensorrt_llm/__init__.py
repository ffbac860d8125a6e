"""NVIDIA's LLM behind the ``Engine`` protocol.

Written against the description of its Python API (1.1 to 1.3) and tested with a stand-in that
behaves by that description; it has not run on TensorRT-LLM itself.

    adapter.py    TensorRTLLMEngine: the open requests, the watchdog, start and shutdown
    model.py      what a directory holds and the limits that it is run under
    loading.py    makes the LLM: the only file at serving time that imports tensorrt_llm
    sampling.py   SamplingParams, field by field
    answer.py     what a step changed in NVIDIA's result, as an Output
    statistics.py its iteration statistics, as EngineStats
"""

from llmserve.engine.tensorrt_llm.adapter import TensorRTLLMEngine

__all__ = ["TensorRTLLMEngine"]
