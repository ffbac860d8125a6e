"""Llama 2 and 3, and models that say they are: Hugging Face's ``model_type`` 'llama'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.checkpoint.rotary_scaling import rope_type
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import bool_key, int_key, number_key, rope_settings
from llmserve.errors import UnsupportedCheckpointError

_HF = "model.layers.{i}"
_TRT = "transformer.layers.{i}"

# Hugging Face name -> TensorRT-LLM name; None: dropped on purpose. Tensors with the same target
# are concatenated on dim 0, in the order of this table. {i} is the layer.
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
    f"{_HF}.self_attn.o_proj.bias": f"{_TRT}.attention.dense.bias",
    # The trap: TensorRT-LLM's fc is the gate (the one under silu), its gate is the up projection.
    f"{_HF}.mlp.gate_proj.weight": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.mlp.gate_proj.bias": f"{_TRT}.mlp.fc.bias",
    f"{_HF}.mlp.up_proj.weight": f"{_TRT}.mlp.gate.weight",
    f"{_HF}.mlp.up_proj.bias": f"{_TRT}.mlp.gate.bias",
    f"{_HF}.mlp.down_proj.weight": f"{_TRT}.mlp.proj.weight",
    f"{_HF}.mlp.down_proj.bias": f"{_TRT}.mlp.proj.bias",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
    # A buffer that old versions of transformers saved; the runtime computes it from rotary_base.
    f"{_HF}.self_attn.rotary_emb.inv_freq": None,
    "model.rotary_emb.inv_freq": None,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one.

    Args:
        hf: Hugging Face's config.json.
        dtype: Of the checkpoint to write.
        quantization: Of the checkpoint to write.

    Raises:
        CheckpointError: A key is missing or of the wrong kind.
        UnsupportedCheckpointError: A feature that is not implemented.
    """
    if (tp := hf.get("pretraining_tp", 1)) not in (None, 1):
        raise UnsupportedCheckpointError(
            f"config.json has pretraining_tp {tp}, which is not implemented; the weights are the "
            "same without it: set it to 1"
        )
    hidden, heads = int_key(hf, "hidden_size"), int_key(hf, "num_attention_heads")
    theta, scaling = rope_settings(hf)
    max_positions = int_key(hf, "max_position_embeddings", 2048)
    if scaling is not None and rope_type(scaling) == "dynamic":
        # Up to its original length dynamic scaling does nothing; beyond it is not implemented.
        max_positions = min(
            max_positions, int_key(scaling, "original_max_position_embeddings", max_positions)
        )
    config = PretrainedConfig(
        architecture="LlamaForCausalLM",
        dtype=dtype,
        hidden_size=hidden,
        num_hidden_layers=int_key(hf, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=int_key(hf, "num_key_value_heads", heads),
        vocab_size=int_key(hf, "vocab_size"),
        intermediate_size=int_key(hf, "intermediate_size"),
        # Of 0 heads PretrainedConfig says what is wrong.
        head_size=int_key(hf, "head_dim", hidden // max(heads, 1)),
        max_position_embeddings=max_positions,
        hidden_act=str(hf.get("hidden_act", "silu")),
        norm_epsilon=number_key(hf, "rms_norm_eps", 1e-6),
        rotary_base=theta,
        rotary_scaling=scaling,
        attn_bias=bool_key(hf, "attention_bias"),
        mlp_bias=bool_key(hf, "mlp_bias"),
        share_embedding_table=bool_key(hf, "tie_word_embeddings"),
        quantization=quantization,
    )
    # from_dict holds the checks of values; what is written here must pass when it is read.
    return PretrainedConfig.from_dict(config.to_dict())


FAMILY = Family(
    architecture="LlamaForCausalLM", tensors=TENSORS, pretrained_config=pretrained_config
)
