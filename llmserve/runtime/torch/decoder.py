"""A Llama-family decoder over a flat batch: rows are tokens, of any mix of requests.

It knows layers and tensors; which rows belong together is the attention plan's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmserve.runtime.torch.kernels.attention import AttentionPlan, paged_attention
from llmserve.runtime.torch.kernels.linear import Linear
from llmserve.runtime.torch.kernels.norm import rms_norm
from llmserve.runtime.torch.kernels.rotary import apply_rotary_


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """The weights of one layer.

    Attributes:
        input_norm: (hidden,).
        qkv: hidden -> (heads + 2 * kv_heads) * head_size: all q, then all k, then all v.
        dense: heads * head_size -> hidden.
        post_norm: (hidden,).
        fc_gate: hidden -> 2 * ffn: TensorRT-LLM's fc (Hugging Face's gate_proj, which goes through
            SiLU), then its gate (their up_proj).
        proj: ffn -> hidden.
    """

    input_norm: torch.Tensor
    qkv: Linear
    dense: Linear
    post_norm: torch.Tensor
    fc_gate: Linear
    proj: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The weights of a model and its forward pass.

    Attributes:
        embedding: (vocab, hidden), in the model's dtype.
        layers: From the embedding up.
        final_norm: (hidden,).
        lm_head: hidden -> vocab.
        tied: Whether lm_head holds the embedding itself.
        rotary: A ``rotary_table`` of max_seq_len rows.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_size: Elements of one head.
        norm_epsilon: Of all norms.
    """

    embedding: torch.Tensor
    layers: Sequence[DecoderLayer]
    final_norm: torch.Tensor
    lm_head: Linear
    tied: bool
    rotary: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_size: int
    norm_epsilon: float

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights held, each once; the rotary table is none."""
        total = self.embedding.nbytes + self.final_norm.nbytes
        for layer in self.layers:
            linears = (layer.qkv, layer.dense, layer.fc_gate, layer.proj)
            total += sum(linear.weights_bytes for linear in linears)
            total += layer.input_norm.nbytes + layer.post_norm.nbytes
        return total if self.tied else total + self.lm_head.weights_bytes

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        plan: AttentionPlan,
        kv_cache: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """Compute the hidden states of a flat batch.

        Args:
            token_ids: int64 (tokens,).
            positions: int64 (tokens,), of each token in its request.
            plan: How they attend.
            kv_cache: A cache per layer; written at the plan's slots.

        Returns:
            (tokens, hidden) before the final norm, in the model's dtype.
        """
        x = F.embedding(token_ids, self.embedding)
        cos, sin = self.rotary.index_select(0, positions).unsqueeze(1).unbind(2)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            normed = rms_norm(x, layer.input_norm, self.norm_epsilon)
            x = x + self._attention(normed, layer, cos, sin, cache, plan)
            fc, gate = layer.fc_gate(rms_norm(x, layer.post_norm, self.norm_epsilon)).chunk(2, -1)
            x = x + layer.proj(F.silu(fc).mul_(gate))
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits (rows, vocab) in float32 of chosen rows of ``forward``'s result."""
        return self.lm_head(rms_norm(hidden, self.final_norm, self.norm_epsilon)).float()

    def _attention(
        self,
        x: torch.Tensor,
        layer: DecoderLayer,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: torch.Tensor,
        plan: AttentionPlan,
    ) -> torch.Tensor:
        qkv = layer.qkv(x)
        # q and k stand side by side, so one rotation turns both where they are.
        rotated = (self.num_heads + self.num_kv_heads) * self.head_size
        apply_rotary_(qkv[:, :rotated].view(x.shape[0], -1, self.head_size), cos, sin)
        num_query = self.num_heads * self.head_size
        query, key_value = qkv[:, :num_query], qkv[:, num_query:]
        query = query.view(x.shape[0], self.num_kv_heads, -1, self.head_size)
        return layer.dense(paged_attention(query, key_value, cache, plan))
