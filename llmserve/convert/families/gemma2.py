"""Gemma 2: Gemma with four norms a layer, softcaps and every other layer sliding.

Hugging Face's ``model_type`` 'gemma2'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import check_key, number_key, optional_number_key
from llmserve.convert.families.windows import sliding_window, windows

_HF = "model.layers.{i}"
_TRT = "transformer.layers.{i}"

TENSORS: dict[str, str | None] = {
    "model.embed_tokens.weight": "transformer.vocab_embedding.weight",
    f"{_HF}.input_layernorm.weight": f"{_TRT}.input_layernorm.weight",
    f"{_HF}.post_attention_layernorm.weight": f"{_TRT}.post_layernorm.weight",
    f"{_HF}.pre_feedforward_layernorm.weight": f"{_TRT}.pre_feedforward_layernorm.weight",
    f"{_HF}.post_feedforward_layernorm.weight": f"{_TRT}.post_feedforward_layernorm.weight",
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
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    check_key(hf, "hidden_activation", "gelu_pytorch_tanh")
    check_key(hf, "attention_bias", False, None)
    check_key(hf, "use_bidirectional_attention", None, False)
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="Gemma2ForCausalLM",
        hidden_act="gelu_pytorch_tanh",
        inter_layernorms=True,
        query_pre_attn_scalar=number_key(hf, "query_pre_attn_scalar", 256.0),
        attn_logit_softcapping=optional_number_key(hf, "attn_logit_softcapping"),
        final_logit_softcapping=optional_number_key(hf, "final_logit_softcapping"),
        **windows(hf, sliding_window(hf), pattern=2),
    )


FAMILY = Family(
    architecture="Gemma2ForCausalLM",
    tensors=TENSORS,
    pretrained_config=pretrained_config,
    norm_offset=1.0,
)
