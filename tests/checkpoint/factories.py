"""Configs for tests that need no model."""

from typing import Any

from llmserve.checkpoint.config import MoeConfig, PretrainedConfig


def pretrained_config(**overrides: Any) -> PretrainedConfig:
    """A tiny Llama's config.json as a dataclass."""
    settings: dict[str, Any] = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "intermediate_size": 96,
        "head_size": 16,
        "max_position_embeddings": 512,
    }
    return PretrainedConfig(**(settings | overrides))


_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "share_embedding_table": True, "head_size": 32}
_GEMMA2 = _GEMMA | {"inter_layernorms": True, "query_pre_attn_scalar": 24.0, "sliding_window": 8}
_EXPERTS = {"hidden_act": "swiglu", "moe": MoeConfig(num_experts=4, top_k=2, normalization_mode=1)}
# One tiny config of each architecture but Llama.
FAMILY_CONFIGS = (
    pretrained_config(architecture="MistralForCausalLM", sliding_window=8),
    pretrained_config(architecture="MixtralForCausalLM", **_EXPERTS),
    pretrained_config(
        architecture="Qwen2ForCausalLM",
        qwen_type="qwen2",
        attn_bias=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    pretrained_config(architecture="Qwen3ForCausalLM", qwen_type="qwen3", qk_layernorm=True),
    pretrained_config(
        architecture="Qwen3MoeForCausalLM",
        qwen_type="qwen3_moe",
        qk_layernorm=True,
        moe_intermediate_size=48,
        **_EXPERTS,
    ),
    pretrained_config(architecture="GemmaForCausalLM", **_GEMMA),
    pretrained_config(
        architecture="Gemma2ForCausalLM",
        sliding_window_pattern=2,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        **_GEMMA2,
    ),
    pretrained_config(
        architecture="Gemma3ForCausalLM",
        qk_layernorm=True,
        sliding_window_pattern=3,
        rope_local_base_freq=100.0,
        **_GEMMA2,
    ),
    pretrained_config(
        architecture="Phi3ForCausalLM",
        hidden_act="swiglu",
        position_embedding_type="long_rope",
        rotary_pct=0.75,
        original_max_position_embeddings=32,
        longrope_scaling_short_factors=[1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
        longrope_scaling_long_factors=[1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
    ),
)
