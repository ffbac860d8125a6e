"""What a model takes in memory, from its config.json alone: weights, K and V, a step's activations.

The runner sizes itself by these numbers and ``llmserve plan`` tells them, so that what is planned
is what happens. All are of one rank; ranks are alike.
"""

from __future__ import annotations

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import torch_dtype
from llmserve.checkpoint.sharding import kv_heads_per_rank, padded_vocab_size
from llmserve.quantization.layout import engine_tensors, rank_tensors

# An interpreter with torch's CPU build, a loaded engine's books included: resident bytes, measured.
# A GPU's context takes about as much of the GPU.
PROCESS_BYTES = 250 * 2**20
# K and V of requests that decode together are gathered, padded, up to so many tokens at a time.
MAX_GATHERED_TOKENS = 1 << 16


def weights_bytes(config: PretrainedConfig) -> int:
    """All tensors of a rank of the engine."""
    tensors = rank_tensors(config, engine_tensors(config), 0)
    return sum(spec.nbytes for spec in tensors.values())


def kv_bytes_per_token(config: PretrainedConfig) -> int:
    """K and V of a token in all layers."""
    itemsize = torch_dtype(config.dtype).itemsize
    if config.quantization.kv_cache_quant_algo is not None:
        itemsize = 1
    width = 2 * kv_heads_per_rank(config) * config.head_size
    return width * itemsize * config.num_hidden_layers


def activation_bytes(
    config: PretrainedConfig, *, max_num_tokens: int, max_batch_size: int, max_seq_len: int
) -> int:
    """The most that a step holds at a time beside weights and cache.

    A layer's widest moment for every token (the residual stream, its norm, and either qkv or gate,
    up and their product), K and V gathered for attention, and float32 logits with the sampler's
    copies.
    """
    itemsize, tp = torch_dtype(config.dtype).itemsize, config.tp_size
    # Products of quantised weights come in float32 first.
    product = itemsize + (4 if config.quantization.quant_algo is not None else 0)
    ffn, copies = config.intermediate_size // tp, 1
    if config.moe is not None:
        # Every expert that a token goes through has its own rows, in and out.
        ffn, copies = config.expert_size // tp, config.moe.top_k
    mlp = copies * ffn * (2 * product + itemsize)
    if config.moe is not None:
        mlp += 2 * copies * config.hidden_size * itemsize
    heads = config.num_attention_heads // tp + 2 * kv_heads_per_rank(config)
    attention = heads * config.head_size * (product + itemsize)
    tokens = max_num_tokens * (2 * config.hidden_size * itemsize + max(mlp, attention))
    gathered = min(MAX_GATHERED_TOKENS, max_batch_size * max_seq_len)
    kv = gathered * 2 * kv_heads_per_rank(config) * config.head_size * itemsize
    rows = min(max_batch_size, max_num_tokens)
    return tokens + kv + rows * padded_vocab_size(config) * 4 * 4
