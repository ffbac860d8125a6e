"""Which tensors an artefact of a quant_algo holds: the decoder's, with quantised weights replaced.

It knows the names, shapes and dtypes, and neither where the values come from nor who runs them.
"""

from __future__ import annotations

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import plain_tensors, quantized_linear
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.quantization import weight_format


def checkpoint_tensors(config: PretrainedConfig) -> dict[str, TensorSpec]:
    """The tensors of a TensorRT-LLM checkpoint.

    W8A16 is TensorRT-LLM's form A: plain weights, which whoever loads them quantises.
    """
    if config.quantization.quant_algo == "W8A16":
        return plain_tensors(config)
    return engine_tensors(config)


def engine_tensors(config: PretrainedConfig) -> dict[str, TensorSpec]:
    """The tensors of a native engine: quantised as they are computed with."""
    stored = weight_format(config.quantization.quant_algo).stored
    tensors: dict[str, TensorSpec] = {}
    for name, spec in plain_tensors(config).items():
        linear = quantized_linear(config, name)
        if linear is None:
            tensors[name] = spec
            continue
        out_features, in_features = spec.shape
        for suffix, (shape, dtype) in stored(out_features, in_features, spec.dtype).items():
            tensors[f"{linear}.{suffix}"] = TensorSpec(shape, dtype)
    return tensors
