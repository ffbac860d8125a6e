"""Gemma 3 without its eyes: Gemma 2's layers, norms on q and k, two kinds of angles.

Hugging Face's ``model_type`` 'gemma3_text'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import (
    check_key,
    int_key,
    number_key,
    optional_number_key,
    rope_object,
    rope_settings,
)
from llmserve.convert.families.windows import sliding_window, windows
from llmserve.errors import UnsupportedCheckpointError

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
    f"{_HF}.self_attn.q_norm.weight": f"{_TRT}.attention.q_layernorm.weight",
    f"{_HF}.self_attn.k_norm.weight": f"{_TRT}.attention.k_layernorm.weight",
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
    "max_position_embeddings": 131072,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    check_key(hf, "hidden_activation", "gelu_pytorch_tanh")
    check_key(hf, "attention_bias", False, None)
    check_key(hf, "use_bidirectional_attention", None, False)
    theta, scaling, local_theta = _rope(hf)
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="Gemma3ForCausalLM",
        hidden_act="gelu_pytorch_tanh",
        inter_layernorms=True,
        qk_layernorm=True,
        query_pre_attn_scalar=number_key(hf, "query_pre_attn_scalar", 256.0),
        attn_logit_softcapping=optional_number_key(hf, "attn_logit_softcapping"),
        final_logit_softcapping=optional_number_key(hf, "final_logit_softcapping"),
        rotary_base=theta,
        rotary_scaling=scaling,
        rope_local_base_freq=local_theta,
        **windows(hf, sliding_window(hf), pattern=int_key(hf, "sliding_window_pattern")),
    )


def _rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None, float]:
    """Theta and scaling of the layers that see everything, and theta of the sliding ones.

    transformers 4 wrote the first as other models do and the last as ``rope_local_base_freq``;
    version 5 writes an object for each kind of layer.
    """
    rope = rope_object(hf)
    local = number_key(hf, "rope_local_base_freq", 10000.0)
    whole = {
        "rope_theta": number_key(hf, "rope_theta", 1e6),
        "partial_rotary_factor": hf.get("partial_rotary_factor"),
    }
    if not {"full_attention", "sliding_attention"} & rope.keys():
        return *rope_settings({"rope_parameters": whole | rope}), local
    sliding = {"rope_theta": local} | dict(rope.get("sliding_attention") or {})
    local, local_scaling = rope_settings({"rope_parameters": sliding})
    if local_scaling is not None:
        raise UnsupportedCheckpointError(
            f"config.json has scaled angles for sliding layers, {local_scaling!r}, which is not "
            "implemented"
        )
    return *rope_settings(
        {"rope_parameters": whole | dict(rope.get("full_attention") or {})}
    ), local


FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    tensors=TENSORS,
    pretrained_config=pretrained_config,
    norm_offset=1.0,
)
