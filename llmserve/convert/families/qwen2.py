"""Qwen2 and Qwen2.5: biases on q, k and v. Hugging Face's ``model_type`` 'qwen2'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import bool_key, int_key
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
    f"{_HF}.self_attn.q_proj.bias": f"{_TRT}.attention.qkv.bias",
    f"{_HF}.self_attn.k_proj.bias": f"{_TRT}.attention.qkv.bias",
    f"{_HF}.self_attn.v_proj.bias": f"{_TRT}.attention.qkv.bias",
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
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    window = sliding_window(hf) if bool_key(hf, "use_sliding_window") else None
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="Qwen2ForCausalLM",
        qwen_type="qwen2",
        attn_bias=True,
        **windows(hf, window, max_window_layers=int_key(hf, "max_window_layers")),
    )


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    tensors=TENSORS,
    pretrained_config=pretrained_config,
)
