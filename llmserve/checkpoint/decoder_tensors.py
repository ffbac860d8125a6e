"""The tensors of a decoder under TensorRT-LLM's names, before any quantisation.

Linear weights are (out, in). The trap in the names: ``mlp.fc`` is Hugging Face's gate_proj, and
``mlp.gate`` its up_proj.
"""

from __future__ import annotations

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.tensor_spec import TensorSpec

EMBEDDING = "transformer.vocab_embedding.weight"
LM_HEAD = "lm_head.weight"


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a config's dtype, 'float16', 'bfloat16' or 'float32'."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def layer_linears(config: PretrainedConfig) -> dict[str, tuple[int, int, bool]]:
    """Each linear of one layer: out features, in features, whether it has a bias."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_size
    kv = config.num_key_value_heads * config.head_size
    return {
        "attention.qkv": (q + 2 * kv, hidden, config.attn_bias),
        "attention.dense": (hidden, q, config.attn_bias),
        "mlp.fc": (ffn, hidden, config.mlp_bias),
        "mlp.gate": (ffn, hidden, config.mlp_bias),
        "mlp.proj": (hidden, ffn, config.mlp_bias),
    }


def plain_tensors(config: PretrainedConfig) -> dict[str, TensorSpec]:
    """Every tensor of the model by name, layer by layer, in ``config.dtype``."""
    hidden, dtype = config.hidden_size, torch_dtype(config.dtype)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    linears = layer_linears(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"transformer.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.post_layernorm.weight"] = (hidden,)
        for linear, (out_features, in_features, bias) in linears.items():
            shapes[f"{prefix}.{linear}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{prefix}.{linear}.bias"] = (out_features,)
    shapes["transformer.ln_f.weight"] = (hidden,)
    if not config.share_embedding_table:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    return {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}


def quantized_linear(config: PretrainedConfig, name: str) -> str | None:
    """The linear whose weight tensor ``name`` is, if ``config.quantization`` quantises it.

    Only linears of decoder layers ever are: never the embedding, a norm, a bias or lm_head.

    Returns:
        e.g. 'transformer.layers.0.mlp.fc' for 'transformer.layers.0.mlp.fc.weight', else None.
    """
    linear, _, kind = name.rpartition(".")
    parts = linear.split(".")
    if kind != "weight" or len(parts) != 5 or parts[3] not in ("attention", "mlp"):
        return None
    return linear if config.quantization.quantizes(linear) else None
