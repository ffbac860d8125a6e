"""What a model takes in memory, from its config.json alone: weights, K and V, a step's activations.

The runner sizes itself by these numbers and ``llmserve plan`` tells them, so that what is planned
is what happens. All are of one rank; ranks are alike.
"""

from __future__ import annotations

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import torch_dtype
from llmserve.checkpoint.sharding import kv_heads_per_rank, padded_vocab_size
from llmserve.core.step import KVGroupSpec
from llmserve.quantization.layout import engine_tensors, rank_tensors

# Resident bytes of an interpreter with torch, a loaded engine's books included: measured, with
# torch's CPU build and with its CUDA build.
PROCESS_BYTES = (250 if torch.version.cuda is None else 470) * 2**20
# K and V of requests that decode together are gathered, padded, up to so many tokens at a time, or
# those of one request.
MAX_GATHERED_TOKENS = 1 << 16
# Queries of a prefill that share one mask, and scores that are held at a time where a softcap wants
# them explicit: both bound the memory, not the result.
QUERY_ROWS = 256
MAX_SCORES = 1 << 22
# Scores of deterministic attention that are held at a time, or those of one tile of queries.
MAX_INVARIANT_SCORES = 1 << 20
# Logits that are sampled from at a time, or those of one row, and the most that this takes for
# each: penalties, and probabilities sorted and added up in float64.
MAX_SAMPLED_LOGITS = 1 << 22
_SAMPLING_ITEMSIZE = 72


def weights_bytes(config: PretrainedConfig) -> int:
    """All tensors of a rank of the engine."""
    tensors = rank_tensors(config, engine_tensors(config), 0)
    return sum(spec.nbytes for spec in tensors.values())


def kv_groups(
    config: PretrainedConfig, tokens_per_block: int, max_seq_len: int
) -> tuple[KVGroupSpec, ...]:
    """The layers by the window that they see, in the order of each group's first layer.

    A window that no sequence outgrows is none: most models have one group, and so has one with
    layers of both kinds while its sequences are short.

    Args:
        config: Of the engine.
        tokens_per_block: Tokens of one block, the same in every group.
        max_seq_len: Longest prompt plus answer, in tokens.
    """
    layers: dict[int | None, list[int]] = {}
    for layer in range(config.num_hidden_layers):
        window = config.window(layer)
        seen = None if window is None or window >= max_seq_len else window
        layers.setdefault(seen, []).append(layer)
    block_bytes = _layer_kv_bytes(config) * tokens_per_block
    return tuple(
        KVGroupSpec(layers=tuple(group), window=window, bytes_per_block=len(group) * block_bytes)
        for window, group in layers.items()
    )


def _layer_kv_bytes(config: PretrainedConfig) -> int:
    """K and V of a token in one layer."""
    itemsize = torch_dtype(config.dtype).itemsize
    if config.quantization.kv_cache_quant_algo is not None:
        itemsize = 1
    return 2 * kv_heads_per_rank(config) * config.head_size * itemsize


def activation_bytes(
    config: PretrainedConfig,
    *,
    max_num_tokens: int,
    max_batch_size: int,
    max_seq_len: int,
    max_draft_len: int = 0,
    deterministic: bool = False,
) -> int:
    """The most that a step holds at a time beside weights and cache.

    A layer's widest moment for every token, what attention gathers for one batch of requests, and
    logits with what sampling makes of them: a row for each request and each guess behind it.
    A deterministic step attends in float32, to tiles of keys.
    """
    itemsize, tp = torch_dtype(config.dtype).itemsize, config.tp_size
    rows = min(max_batch_size * (1 + max_draft_len), max_num_tokens)
    # The residual stream before and after attention, what attention added and what is normalised.
    stream = 4 * config.hidden_size * itemsize
    tokens = max_num_tokens * (stream + max(_attention_bytes(config), _mlp_bytes(config)))
    gathered = max(max_seq_len, min(MAX_GATHERED_TOKENS, max_batch_size * max_seq_len))
    kv_width = 2 * kv_heads_per_rank(config) * config.head_size
    attention = (gathered * kv_width + QUERY_ROWS * max_seq_len) * itemsize
    if config.attn_logit_softcapping is not None:
        heads = config.num_attention_heads // tp
        # In float32 before and after the softmax, and in the model's dtype.
        attention += max(MAX_SCORES, heads * gathered) * (8 + itemsize)
    if deterministic:
        heads = config.num_attention_heads // tp
        # K, V and their indices once more, queries and results, scores and their exponentials.
        attention += gathered * (kv_width * 4 + 8) + 2 * MAX_INVARIANT_SCORES * 8
        attention += max_num_tokens * 2 * heads * config.head_size * 4
    vocab = padded_vocab_size(config)
    sampled = min(rows * vocab, max(MAX_SAMPLED_LOGITS, vocab)) * _SAMPLING_ITEMSIZE
    return tokens + attention + rows * vocab * (itemsize + 4) + sampled


def _attention_bytes(config: PretrainedConfig) -> int:
    """Of a token: q, k and v, their rotation, and the heads' results, in parts and joined."""
    itemsize, query_heads = torch_dtype(config.dtype).itemsize, config.num_attention_heads
    heads = query_heads // config.tp_size + 2 * kv_heads_per_rank(config)
    joined = 2 * query_heads // config.tp_size * itemsize
    return config.head_size * (heads * (_product_itemsize(config) + itemsize) + joined)


def _mlp_bytes(config: PretrainedConfig) -> int:
    """Of a token: gate and up, apart and joined, and their product; of experts, the sum as well."""
    itemsize = torch_dtype(config.dtype).itemsize
    if config.moe is None:
        ffn, mixture = config.intermediate_size, 0
    else:
        # At worst every token goes through the same expert; the others take their turn.
        ffn = config.expert_size
        mixture = config.hidden_size * (8 + 2 * itemsize) + config.moe.num_experts * 8
    return ffn // config.tp_size * 2 * (_product_itemsize(config) + itemsize) + mixture


def _product_itemsize(config: PretrainedConfig) -> int:
    # Products of quantised weights come in float32 first.
    return torch_dtype(config.dtype).itemsize + (
        4 if config.quantization.quant_algo is not None else 0
    )
