"""Configs for tests that need no model."""

from typing import Any

from llmserve.checkpoint.config import PretrainedConfig


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
