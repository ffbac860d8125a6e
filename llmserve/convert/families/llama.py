"""Llama 2 and 3, and models that say they are: Hugging Face's ``model_type`` 'llama'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import bool_key
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
# What transformers takes for a key that config.json lacks.
_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    if (tp := hf.get("pretraining_tp", 1)) not in (None, 1):
        raise UnsupportedCheckpointError(
            f"config.json has pretraining_tp {tp}, which is not implemented; the weights are the "
            "same without it: set it to 1"
        )
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="LlamaForCausalLM",
        attn_bias=bool_key(hf, "attention_bias"),
        mlp_bias=bool_key(hf, "mlp_bias"),
    )


FAMILY = Family(
    architecture="LlamaForCausalLM", tensors=TENSORS, pretrained_config=pretrained_config
)
