"""The keys of config.json that every family has, read once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.checkpoint.rotary_scaling import rope_type
from llmserve.convert.families.hf_config import bool_key, int_key, number_key, rope_settings


def decoder_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig, **family: Any
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one.

    Args:
        hf: Hugging Face's config.json, with what its family takes for a key that it lacks.
        dtype: Of the checkpoint to write.
        quantization: Of the checkpoint to write.
        family: What the family says by itself, under ``PretrainedConfig``'s names: its
            architecture, what is particular, and keys that it reads in another way than here.

    Raises:
        CheckpointError: A key is missing or of the wrong kind.
        UnsupportedCheckpointError: A feature that is not implemented.
    """
    hidden, heads = int_key(hf, "hidden_size"), int_key(hf, "num_attention_heads")
    settings: dict[str, Any] = {
        "dtype": dtype,
        "hidden_size": hidden,
        "num_hidden_layers": int_key(hf, "num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": int_key(hf, "num_key_value_heads", heads),
        "vocab_size": int_key(hf, "vocab_size"),
        "intermediate_size": int_key(hf, "intermediate_size"),
        # Of 0 heads PretrainedConfig says what is wrong.
        "head_size": int_key(hf, "head_dim", hidden // max(heads, 1)),
        "max_position_embeddings": int_key(hf, "max_position_embeddings"),
        "hidden_act": str(hf.get("hidden_act", "silu")),
        "norm_epsilon": number_key(hf, "rms_norm_eps", 1e-6),
        "share_embedding_table": bool_key(hf, "tie_word_embeddings"),
        "quantization": quantization,
    }
    if "rotary_base" not in family:
        settings["rotary_base"], settings["rotary_scaling"] = rope_settings(hf)
    settings |= family
    scaling, max_positions = settings["rotary_scaling"], settings["max_position_embeddings"]
    if rope_type(scaling) == "dynamic":
        # Up to its original length dynamic scaling does nothing; beyond it is not implemented.
        settings["max_position_embeddings"] = min(
            max_positions, int_key(scaling, "original_max_position_embeddings", max_positions)
        )
    elif rope_type(scaling) == "yarn":
        original = int_key(scaling, "original_max_position_embeddings", max_positions)
        # Where none is named transformers takes the model's positions. Models that are stretched
        # by this state their original length here as well, and mean the product.
        settings["rotary_scaling"] = scaling | {"original_max_position_embeddings": original}
        stretched = number_key(scaling, "factor", 1.0) * original
        settings["max_position_embeddings"] = max(max_positions, int(stretched))
    # from_dict holds the checks of values; what is written here must pass when it is read.
    return PretrainedConfig.from_dict(PretrainedConfig(**settings).to_dict())
