"""The tensors of a decoder under TensorRT-LLM's names, before any quantisation and sharding.

Linear weights are (out, in), those of experts (experts, out, in). The trap in the names:
``mlp.fc`` is Hugging Face's gate_proj, and ``mlp.gate`` its up_proj; where both are one weight
(Phi-3, experts), ``mlp.fc`` is up_proj and then gate_proj.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import NamedTuple

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.tensor_spec import TensorSpec

EMBEDDING = "transformer.vocab_embedding.weight"
FINAL_NORM = "transformer.ln_f.weight"
LM_HEAD = "lm_head.weight"


class LinearShape(NamedTuple):
    """A linear of a decoder layer.

    Attributes:
        weight: (out, in), or (experts, out, in).
        bias: Whether it has one, (out,).
    """

    weight: tuple[int, ...]
    bias: bool


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a config's dtype, 'float16', 'bfloat16' or 'float32'."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def layer_prefix(layer: int) -> str:
    """The name that a layer's tensors begin with, without the dot."""
    return f"transformer.layers.{layer}"


def layer_linears(config: PretrainedConfig) -> dict[str, LinearShape]:
    """The linears of one layer that may be quantised; a router is none of them."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_size
    kv = config.num_key_value_heads * config.head_size
    linears = {
        "attention.qkv": LinearShape((q + 2 * kv, hidden), config.attn_bias),
        "attention.dense": LinearShape((hidden, q), config.dense_bias),
    }
    if config.moe is not None:
        experts, ffn = config.moe.num_experts, config.expert_size
        linears["mlp.fc"] = LinearShape((experts, 2 * ffn, hidden), False)
        linears["mlp.proj"] = LinearShape((experts, hidden, ffn), False)
        return linears
    linears["mlp.fc"] = LinearShape((2 * ffn if config.fused_mlp else ffn, hidden), config.mlp_bias)
    if not config.fused_mlp:
        linears["mlp.gate"] = LinearShape((ffn, hidden), config.mlp_bias)
    linears["mlp.proj"] = LinearShape((hidden, ffn), config.mlp_bias)
    return linears


def layer_norms(config: PretrainedConfig) -> dict[str, int]:
    """The norms of one layer and their sizes."""
    hidden, head = config.hidden_size, config.head_size
    norms = {"input_layernorm": hidden, "post_layernorm": hidden}
    if config.inter_layernorms:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if config.qk_layernorm:
        norms |= {"attention.q_layernorm": head, "attention.k_layernorm": head}
    return norms


def plain_tensors(config: PretrainedConfig) -> dict[str, TensorSpec]:
    """Every tensor of the whole model by name, layer by layer.

    All are in ``config.dtype`` but a mixture's routers, which TensorRT-LLM keeps in float32.
    """
    hidden, dtype = config.hidden_size, torch_dtype(config.dtype)
    specs = {EMBEDDING: TensorSpec((config.vocab_size, hidden), dtype)}
    norms, linears = layer_norms(config), layer_linears(config)
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        for norm, size in norms.items():
            specs[f"{prefix}.{norm}.weight"] = TensorSpec((size,), dtype)
        if config.moe is not None:
            router = (config.moe.num_experts, hidden)
            specs[f"{prefix}.mlp.router.weight"] = TensorSpec(router, torch.float32)
        for linear, (weight, bias) in linears.items():
            specs[f"{prefix}.{linear}.weight"] = TensorSpec(weight, dtype)
            if bias:
                specs[f"{prefix}.{linear}.bias"] = TensorSpec(weight[-2:-1], dtype)
    specs[FINAL_NORM] = TensorSpec((hidden,), dtype)
    if not config.share_embedding_table:
        specs[LM_HEAD] = TensorSpec((config.vocab_size, hidden), dtype)
    return specs


def tied_without_lm_head(config: PretrainedConfig, names: Container[str]) -> PretrainedConfig:
    """Of what holds these tensors. TensorRT-LLM's rule: without an lm_head the embedding is it."""
    return config if LM_HEAD in names else replace(config, share_embedding_table=True)


def quantized_linear(config: PretrainedConfig, name: str) -> str | None:
    """The linear whose weight tensor ``name`` is, if ``config.quantization`` quantises it.

    Only linears of decoder layers ever are: never the embedding, a norm, a bias, a router or
    lm_head.

    Returns:
        e.g. 'transformer.layers.0.mlp.fc' for 'transformer.layers.0.mlp.fc.weight', else None.
    """
    linear, _, kind = name.rpartition(".")
    parts = linear.split(".")
    if kind != "weight" or len(parts) != 5 or ".".join(parts[3:]) not in _LINEARS:
        return None
    return linear if config.quantization.quantizes(linear) else None


_LINEARS = frozenset(
    {"attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"},
)
