"""A decoder over a flat batch: rows are tokens, of any mix of requests.

It knows layers and tensors; which rows belong together is the attention plan's business. A layer
can be called by itself. On a tensor-parallel rank each part is the rank's share of the model, and
``group`` adds the shares up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F

from llmserve.runtime.torch.group import RankGroup
from llmserve.runtime.torch.kernels.attention import (
    AttentionPlan,
    AttentionScores,
    paged_attention,
)
from llmserve.runtime.torch.kernels.elementwise import Activation, gated, softcapped
from llmserve.runtime.torch.kernels.kv_storage import KvStorage
from llmserve.runtime.torch.kernels.linear import Linear
from llmserve.runtime.torch.kernels.norm import rms_norm
from llmserve.runtime.torch.kernels.rotary import RotaryTables, StepRotary, apply_rotary_

# Gets a linear's name and the linear, returns what takes its place.
LinearMap = Callable[[str, Linear], Linear]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A root-mean-square norm.

    Attributes:
        weight: (size,).
        epsilon: Added to the mean square.
        round_last: As for ``rms_norm``.
    """

    weight: torch.Tensor
    epsilon: float
    round_last: bool = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(..., size) -> (..., size)."""
        return rms_norm(x, self.weight, self.epsilon, round_last=self.round_last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of one layer.

    Attributes:
        qkv: hidden -> (heads + 2 * kv_heads) * head_size: all q, then all k, then all v.
        dense: heads * head_size -> hidden.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_size: Elements of one head.
        rotary_dim: The first so many of them are rotated.
        scores: How keys are scored; with the window.
        kv_storage: What the cache holds of K and V.
        q_norm: Of each query head, before it is rotated; or None.
        k_norm: Of each key head, likewise.
    """

    qkv: Linear
    dense: Linear
    num_heads: int
    num_kv_heads: int
    head_size: int
    rotary_dim: int
    scores: AttentionScores
    kv_storage: KvStorage
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def __call__(
        self, x: torch.Tensor, rotary: StepRotary, plan: AttentionPlan, cache: torch.Tensor
    ) -> torch.Tensor:
        """(tokens, hidden) -> (tokens, hidden); writes the tokens' K and V to the cache."""
        tokens = x.shape[0]
        qkv = self.qkv(x)
        # q and k stand side by side, so one rotation turns both where they are.
        num_rotated = self.num_heads + self.num_kv_heads
        heads = qkv[:, : num_rotated * self.head_size].view(tokens, num_rotated, self.head_size)
        if self.q_norm is not None and self.k_norm is not None:
            query_heads, key_heads = heads[:, : self.num_heads], heads[:, self.num_heads :]
            query_heads.copy_(self.q_norm(query_heads))
            key_heads.copy_(self.k_norm(key_heads))
        cos, sin = rotary.full if self.scores.window is None else rotary.sliding
        apply_rotary_(heads[..., : self.rotary_dim], cos, sin)
        num_query = self.num_heads * self.head_size
        query, key_value = qkv[:, :num_query], qkv[:, num_query:]
        query = query.view(tokens, self.num_kv_heads, -1, self.head_size)
        return self.dense(
            paged_attention(query, key_value, cache, plan, self.scores, self.kv_storage)
        )

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights held."""
        linears = self.qkv.weights_bytes + self.dense.weights_bytes
        return linears + _nbytes(self.q_norm, self.k_norm)


class Mlp(Protocol):
    """What a layer does after its attention."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) -> (tokens, hidden), each row by itself."""
        ...

    def map_linears(self, change: LinearMap) -> Mlp:
        """A copy with every linear changed; names begin with 'mlp.'."""
        ...

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights held."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedMlp:
    """proj(activation(gate(x)) * up(x)).

    Attributes:
        fc: hidden -> 2 * ffn: up and then gate. The trap in the names: where TensorRT-LLM stores
            two weights, its ``gate`` is up and its ``fc`` is gate.
        proj: ffn -> hidden.
        activation: Of the gate.
    """

    fc: Linear
    proj: Linear
    activation: Activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) -> (tokens, hidden)."""
        return self.proj(gated(self.fc(x), self.activation))

    def map_linears(self, change: LinearMap) -> GatedMlp:
        """A copy with 'mlp.fc' (which stands for a stored gate as well) and 'mlp.proj' changed."""
        return replace(self, fc=change("mlp.fc", self.fc), proj=change("mlp.proj", self.proj))

    @property
    def weights_bytes(self) -> int:
        """Bytes of both linears."""
        return self.fc.weights_bytes + self.proj.weights_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """One layer.

    Attributes:
        input_norm: Before the attention.
        attention: The attention.
        attention_norm: Of the attention's result (Gemma 2 and 3), or None.
        mlp_norm: Before the MLP.
        mlp: The MLP, or a mixture of experts.
        output_norm: Of the MLP's result (Gemma 2 and 3), or None.
    """

    input_norm: Norm
    attention: Attention
    mlp_norm: Norm
    mlp: Mlp
    attention_norm: Norm | None = None
    output_norm: Norm | None = None

    def __call__(
        self, x: torch.Tensor, rotary: StepRotary, plan: AttentionPlan, cache: torch.Tensor
    ) -> torch.Tensor:
        """Compute the layer for a flat batch.

        Args:
            x: (tokens, hidden).
            rotary: Of the tokens' positions.
            plan: How they attend.
            cache: The layer's KV cache; written at the plan's slots.

        Returns:
            (tokens, hidden).
        """
        attended = self.attention(self.input_norm(x), rotary, plan, cache)
        if self.attention_norm is not None:
            attended = self.attention_norm(attended)
        x = x + attended
        y = self.mlp(self.mlp_norm(x))
        if self.output_norm is not None:
            y = self.output_norm(y)
        return x + y

    def linears(self) -> dict[str, Linear]:
        """The linears by name: 'attention.qkv', 'attention.dense', 'mlp.fc', 'mlp.proj'.

        Where gate and fc are stored apart, 'mlp.fc' is both. Those of expert e are 'mlp.fc.e' and
        'mlp.proj.e'.
        """
        found: dict[str, Linear] = {}

        def keep(name: str, linear: Linear) -> Linear:
            found[name] = linear
            return linear

        self.map_linears(keep)
        return found

    def map_linears(self, change: LinearMap) -> DecoderLayer:
        """A copy in which ``change(name, linear)`` takes the place of each linear."""
        attention = replace(
            self.attention,
            qkv=change("attention.qkv", self.attention.qkv),
            dense=change("attention.dense", self.attention.dense),
        )
        return replace(self, attention=attention, mlp=self.mlp.map_linears(change))

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights held."""
        norms = _nbytes(self.input_norm, self.attention_norm, self.mlp_norm, self.output_norm)
        return norms + self.attention.weights_bytes + self.mlp.weights_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Token ids -> the first layer's input.

    Attributes:
        weight: (rows, hidden), in the model's dtype: all of the vocabulary, or the rank's share.
        scale: Rows are multiplied with it, rounded to their dtype.
        first_token_id: What the first row stands for.
        group: All ranks, where each has a share of the rows; else None.
    """

    weight: torch.Tensor
    scale: float = 1.0
    first_token_id: int = 0
    group: RankGroup | None = None

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 (tokens,) -> (tokens, hidden)."""
        if self.group is None:
            x = F.embedding(token_ids, self.weight)
        else:
            rows = token_ids - self.first_token_id
            others = (rows < 0) | (rows >= self.weight.shape[0])
            x = F.embedding(rows.masked_fill(others, 0), self.weight)
            x = self.group.all_reduce_(x.masked_fill(others[:, None], 0))
        return x if self.scale == 1.0 else x * torch.tensor(self.scale, dtype=x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The last layer's output -> logits.

    Attributes:
        norm: Of the hidden states.
        linear: hidden -> vocab, or the rank's share of it.
        vocab_size: Logits that mean a token; what the ranks have more is padding.
        softcap: Logits become softcap * tanh(logits / softcap); None leaves them.
        group: All ranks, where each has a share; else None.
    """

    norm: Norm
    linear: Linear
    vocab_size: int
    softcap: float | None = None
    group: RankGroup | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> float32 (rows, vocab_size)."""
        logits = self.linear(self.norm(hidden))
        if self.group is not None:
            logits = self.group.all_gather_last(logits)[:, : self.vocab_size]
        logits = logits.float()
        return logits if self.softcap is None else softcapped(logits, self.softcap)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """The weights of a model and its forward pass.

    Attributes:
        embedding: Of the tokens.
        layers: From the embedding up.
        head: Of the logits.
        tied: Whether the head's linear is the embedding's weight.
        rotary: For as many positions as will ever be computed.
    """

    embedding: Embedding
    layers: Sequence[DecoderLayer]
    head: Head
    tied: bool
    rotary: RotaryTables

    @property
    def weights_bytes(self) -> int:
        """Bytes of all weights held, each once; the rotary table is none."""
        total = self.embedding.weight.nbytes + self.head.norm.weight.nbytes
        total += sum(layer.weights_bytes for layer in self.layers)
        return total if self.tied else total + self.head.linear.weights_bytes

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
        x, rotary = self.embedding(token_ids), self.rotary.at(positions)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            x = layer(x, rotary, plan, cache)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits (rows, vocab) in float32 of chosen rows of ``forward``'s result."""
        return self.head(hidden)


def _nbytes(*norms: Norm | None) -> int:
    return sum(norm.weight.nbytes for norm in norms if norm is not None)
