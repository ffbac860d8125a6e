"""Mixtral: Mistral with a mixture of experts. Hugging Face's ``model_type`` 'mixtral'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import MoeConfig, PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import check_key, int_key
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
    f"{_HF}.block_sparse_moe.gate.weight": f"{_TRT}.mlp.router.weight",
    # Up (w3) and then gate (w1), the one under SiLU, expert after expert.
    f"{_HF}.block_sparse_moe.experts.{{e}}.w3.weight": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.block_sparse_moe.experts.{{e}}.w1.weight": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.block_sparse_moe.experts.{{e}}.w2.weight": f"{_TRT}.mlp.proj.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
# As transformers 5 holds them, and writes them when asked for its own layout: all experts in one.
OTHER_SPELLING = {
    f"{_HF}.mlp.gate.weight": f"{_TRT}.mlp.router.weight",
    f"{_HF}.mlp.experts.gate_up_proj": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.mlp.experts.down_proj": f"{_TRT}.mlp.proj.weight",
}
# What transformers takes for a key that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    check_key(hf, "hidden_act", "silu")
    hf["layer_types"] = None  # transformers does not read it for this model
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="MixtralForCausalLM",
        hidden_act="swiglu",
        moe=MoeConfig(
            num_experts=int_key(hf, "num_local_experts"),
            top_k=int_key(hf, "num_experts_per_tok"),
            normalization_mode=1,
        ),
        **windows(hf, sliding_window(hf)),
    )


FAMILY = Family(
    architecture="MixtralForCausalLM",
    tensors=TENSORS,
    pretrained_config=pretrained_config,
    other_spelling=OTHER_SPELLING,
    swapped_halves=frozenset({f"{_HF}.mlp.experts.gate_up_proj"}),
)
