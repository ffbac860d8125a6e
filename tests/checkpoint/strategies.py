"""Random tiny models of every family and format as hypothesis strategies."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from llmserve.checkpoint.config import MoeConfig, ParallelMapping, PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.config import KV_CACHE_QUANT_ALGOS, QUANT_ALGOS

# What tells the families' tensors apart.
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {"attn_bias": True, "mlp_bias": True},
    "MixtralForCausalLM": {"hidden_act": "swiglu", "moe": MoeConfig(num_experts=3, top_k=2)},
    "Qwen2ForCausalLM": {"attn_bias": True},
    "Qwen3ForCausalLM": {"qk_layernorm": True},
    "Qwen3MoeForCausalLM": {
        "qk_layernorm": True,
        "hidden_act": "swiglu",
        "moe": MoeConfig(num_experts=2, top_k=1),
        "moe_intermediate_size": 4,
    },
    "GemmaForCausalLM": {"share_embedding_table": True},
    "Gemma3ForCausalLM": {
        "share_embedding_table": True,
        "inter_layernorms": True,
        "qk_layernorm": True,
    },
    "Phi3ForCausalLM": {"hidden_act": "swiglu"},
}


@st.composite
def configs(draw: st.DrawFn, tp_sizes: tuple[int, ...] = (1, 2, 4)) -> PretrainedConfig:
    """A model that so many ranks can share; sizes are as small and as odd as they may be."""
    tp = draw(st.sampled_from(tp_sizes))
    kv_heads = draw(st.sampled_from([kv for kv in (1, 2, 4, 8) if kv % tp == 0 or tp % kv == 0]))
    heads = max(tp, kv_heads) * draw(st.integers(1, 2))
    architecture = draw(st.sampled_from(sorted(_FAMILIES)))
    algos = set(QUANT_ALGOS.values())
    if "moe" in _FAMILIES[architecture]:
        algos -= {"W8A8_SQ_PER_CHANNEL"}  # which has no form for experts
    return PretrainedConfig(
        architecture=architecture,
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        hidden_size=draw(st.integers(1, 6)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_size=draw(st.sampled_from([2, 4])),
        vocab_size=draw(st.integers(1, 13)),
        intermediate_size=tp * draw(st.integers(1, 3)),
        max_position_embeddings=16,
        use_parallel_embedding=draw(st.booleans()),
        mapping=ParallelMapping.tensor_parallel(tp),
        quantization=QuantConfig(
            quant_algo=draw(st.sampled_from(sorted(algos, key=str))),
            kv_cache_quant_algo=draw(st.sampled_from(list(KV_CACHE_QUANT_ALGOS.values()))),
        ),
        **_FAMILIES[architecture],
    )


def random_bits(specs: dict[str, TensorSpec], seed: int) -> dict[str, torch.Tensor]:
    """A tensor of random bits for each spec: any value, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in specs.items():
        bits = torch.randint(256, (spec.nbytes,), dtype=torch.uint8, generator=generator)
        tensors[name] = bits.view(spec.dtype).reshape(spec.shape)
    return tensors


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))
