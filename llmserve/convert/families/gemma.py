"""Gemma 1: norms of 1 + w, a scaled embedding, tanh GELU. Hugging Face's ``model_type`` 'gemma'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import check_key

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
    "num_key_value_heads": 16,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "tie_word_embeddings": True,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    # The first checkpoints say gelu and mean its tanh form, which they were trained with.
    check_key(hf, "hidden_act", "gelu_pytorch_tanh", "gelu")
    check_key(hf, "hidden_activation", "gelu_pytorch_tanh", None)
    check_key(hf, "attention_bias", False, None)
    check_key(hf, "use_bidirectional_attention", None, False)
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="GemmaForCausalLM",
        hidden_act="gelu_pytorch_tanh",
    )


FAMILY = Family(
    architecture="GemmaForCausalLM",
    tensors=TENSORS,
    pretrained_config=pretrained_config,
    norm_offset=1.0,
)
