"""Qwen3 with a mixture of experts. Hugging Face's ``model_type`` 'qwen3_moe'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import MoeConfig, PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import bool_key, check_key, int_key
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
    f"{_HF}.self_attn.q_norm.weight": f"{_TRT}.attention.q_layernorm.weight",
    f"{_HF}.self_attn.k_norm.weight": f"{_TRT}.attention.k_layernorm.weight",
    f"{_HF}.self_attn.o_proj.weight": f"{_TRT}.attention.dense.weight",
    f"{_HF}.mlp.gate.weight": f"{_TRT}.mlp.router.weight",
    # Up and then gate, the one under SiLU, expert after expert.
    f"{_HF}.mlp.experts.{{e}}.up_proj.weight": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.mlp.experts.{{e}}.gate_proj.weight": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.mlp.experts.{{e}}.down_proj.weight": f"{_TRT}.mlp.proj.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
# As transformers 5 holds them, and writes them when asked for its own layout: all experts in one.
OTHER_SPELLING = {
    f"{_HF}.mlp.experts.gate_up_proj": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.mlp.experts.down_proj": f"{_TRT}.mlp.proj.weight",
}
# What transformers takes for a key that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    check_key(hf, "hidden_act", "silu")
    check_key(hf, "attention_bias", False, None)
    # Layers with a plain MLP among the others.
    check_key(hf, "decoder_sparse_step", 1)
    check_key(hf, "mlp_only_layers", None, [])
    window = sliding_window(hf) if bool_key(hf, "use_sliding_window") else None
    hf["layer_types"] = None  # transformers slides every layer here, or none
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="Qwen3MoeForCausalLM",
        qwen_type="qwen3_moe",
        qk_layernorm=True,
        hidden_act="swiglu",
        moe=MoeConfig(
            # transformers 5 has renamed it.
            num_experts=int_key(hf, "num_experts", int_key(hf, "num_local_experts", 128)),
            top_k=int_key(hf, "num_experts_per_tok"),
            normalization_mode=int(bool_key(hf, "norm_topk_prob")),
        ),
        moe_intermediate_size=int_key(hf, "moe_intermediate_size"),
        **windows(hf, window),
    )


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    tensors=TENSORS,
    pretrained_config=pretrained_config,
    other_spelling=OTHER_SPELLING,
    swapped_halves=frozenset({f"{_HF}.mlp.experts.gate_up_proj"}),
)
