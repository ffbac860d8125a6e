"""The demo model's architecture for training, with Hugging Face parameter names.

This module owns a compact Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU and
tied embeddings, computing what transformers' LlamaForCausalLM computes.  It exists because it
trains faster on a CPU; its state dict is the Hugging Face checkpoint.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the model."""

    vocab_size: int = 1_024
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_kv_heads: int = 4
    intermediate_size: int = 640
    max_positions: int = 2_048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.hidden_size // self.num_heads


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions in the half-split layout."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        width, kv_width = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Returns the attended hidden states of ``x`` ([batch, time, hidden])."""
        batch, time, _ = x.shape
        shape = self.shape

        def heads(y: Tensor, count: int) -> Tensor:
            return y.view(batch, time, count, shape.head_dim).transpose(1, 2)

        q = _rotate(heads(self.q_proj(x), shape.num_heads), cos, sin)
        k = _rotate(heads(self.k_proj(x), shape.num_kv_heads), cos, sin)
        v = heads(self.v_proj(x), shape.num_kv_heads)
        groups = shape.num_heads // shape.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o_proj(y.transpose(1, 2).reshape(batch, time, -1))


class Mlp(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output for ``x``."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RmsNorm(nn.Module):
    """Root-mean-square normalization."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.eps = shape.norm_eps
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Returns ``x`` normalized and scaled."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.input_layernorm = RmsNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RmsNorm(shape)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Returns the layer's output for ``x``."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embedding, decoder layers and final norm."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RmsNorm(shape)


class DemoModel(nn.Module):
    """The language model; the embedding is also the output projection."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Backbone(shape)
        half = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        angles = torch.outer(torch.arange(shape.max_positions).float(), shape.rope_theta**-half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 0.02 if "embed" in name else weight.shape[1] ** -0.5
                # The branches into the residual stream start small, so depth adds no noise.
                scale = 0.1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(weight, std=std * scale)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """Returns the logits after the tokens that ``rows`` (flat indices) selects.

        Args:
            tokens: Token ids, [batch, time].
            positions: Position of each token, [batch, time].
            mask: Boolean, True where a query (dim 2) may look at a key (dim 3).
            rows: Indices into the flattened tokens, [selected].
        """
        x = self.model.embed_tokens(tokens)
        if torch.is_autocast_enabled("cpu"):
            x = x.bfloat16()
        cos = self.cos[positions].unsqueeze(1).to(x.dtype)
        sin = self.sin[positions].unsqueeze(1).to(x.dtype)
        bias = torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, float("-inf"))
        for layer in self.model.layers:
            x = layer(x, cos, sin, bias)
        x = self.model.norm(x.flatten(0, 1)[rows])
        return F.linear(x, self.model.embed_tokens.weight)


def save_checkpoint(model: DemoModel, directory: Path, ids: dict[str, int]) -> None:
    """Writes config.json, generation_config.json and model.safetensors (bfloat16).

    Args:
        model: The model.
        directory: Where to write; each file is replaced as a whole.
        ids: The token ids of "bos", "eos" and "pad".
    """
    shape = model.shape
    special = {f"{kind}_token_id": token for kind, token in ids.items()}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_positions,
        "mlp_bias": False,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
        **special,
    }
    generation = {**special, "eos_token_id": [ids["eos"]], "do_sample": False}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    weights = {k: v.detach().bfloat16().contiguous() for k, v in model.state_dict().items()}
    partial = directory / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, directory / "model.safetensors")
