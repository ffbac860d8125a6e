"""Mistral: Llama with a sliding window. Hugging Face's ``model_type`` 'mistral'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.windows import sliding_window, windows

_HF = "model.layers.{i}"
_TRT = "transformer.layers.{i}"

TENSORS: dict[str, str | None] = {
    "model.embed_tokens.weight": "transformer.vocab_embedding.weight",
    f"{_HF}.input_layernorm.weight": f"{_TRT}.input_layernorm.weight",
    f"{_HF}.post_attention_layernorm.weight": f"{_TRT}.post_layernorm.weight",
    f"{_HF}.self_attn.q_proj.weight": f"{_TRT}.attention.qkv.weight",
    f"{_HF}.self_attn.k_proj.weight": f"{_TRT}.attention.qkv.weight",
    f"{_HF}.self_attn.v_proj.weight": f"{_TRT}.attention.qkv.weight",
    f"{_HF}.self_attn.o_proj.weight": f"{_TRT}.attention.dense.weight",
    # The trap: TensorRT-LLM's fc is the gate (the one under the activation), its gate is up.
    f"{_HF}.mlp.gate_proj.weight": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.mlp.up_proj.weight": f"{_TRT}.mlp.gate.weight",
    f"{_HF}.mlp.down_proj.weight": f"{_TRT}.mlp.proj.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
# What transformers takes for a key that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    # transformers slides every layer, whatever layer_types says.
    hf["layer_types"] = None
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="MistralForCausalLM",
        **windows(hf, sliding_window(hf)),
    )


FAMILY = Family(
    architecture="MistralForCausalLM",
    tensors=TENSORS,
    pretrained_config=pretrained_config,
)
