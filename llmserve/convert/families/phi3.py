"""Phi-3 and 3.5, Phi-4-mini: fused q, k, v and fused gate and up, long rope.

Hugging Face's ``model_type`` 'phi3'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families.decoder_config import decoder_config
from llmserve.convert.families.family import Family
from llmserve.convert.families.hf_config import check_key, int_key, number_key, rope_object
from llmserve.convert.families.windows import sliding_window, windows
from llmserve.errors import UnsupportedCheckpointError

_HF = "model.layers.{i}"
_TRT = "transformer.layers.{i}"

TENSORS: dict[str, str | None] = {
    "model.embed_tokens.weight": "transformer.vocab_embedding.weight",
    f"{_HF}.input_layernorm.weight": f"{_TRT}.input_layernorm.weight",
    f"{_HF}.post_attention_layernorm.weight": f"{_TRT}.post_layernorm.weight",
    f"{_HF}.self_attn.qkv_proj.weight": f"{_TRT}.attention.qkv.weight",
    f"{_HF}.self_attn.o_proj.weight": f"{_TRT}.attention.dense.weight",
    # Gate and then up; TensorRT-LLM wants up first.
    f"{_HF}.mlp.gate_up_proj.weight": f"{_TRT}.mlp.fc.weight",
    f"{_HF}.mlp.down_proj.weight": f"{_TRT}.mlp.proj.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
# What transformers takes for a key that config.json lacks.
_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
}


def pretrained_config(
    hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
) -> PretrainedConfig:
    """TensorRT-LLM's config.json for a Hugging Face one; see ``decoder_config``."""
    hf = _DEFAULTS | dict(hf)
    check_key(hf, "hidden_act", "silu")
    hf["layer_types"] = None  # transformers does not read it for this model
    rope = rope_object(hf)
    return decoder_config(
        hf,
        dtype,
        quantization,
        architecture="Phi3ForCausalLM",
        hidden_act="swiglu",
        rotary_base=number_key(rope, "rope_theta", number_key(hf, "rope_theta", 10000.0)),
        rotary_scaling=None,
        rotary_pct=number_key(
            rope, "partial_rotary_factor", number_key(hf, "partial_rotary_factor", 1.0)
        ),
        **_long_rope(hf, rope),
        **windows(hf, sliding_window(hf)),
    )


def _long_rope(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a ``PretrainedConfig`` for stretched angles, none where they are plain."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    # su is what long rope was called at first; transformers takes yarn for it in this model.
    if kind not in ("longrope", "su", "yarn"):
        raise UnsupportedCheckpointError(
            f"config.json has rotary scaling of type {kind!r}, which is not implemented for "
            "model_type 'phi3'; it must be longrope"
        )
    original = int_key(hf, "original_max_position_embeddings")
    _check_attention_factor(
        rope, int_key(hf, "max_position_embeddings") / max(original, 1), original
    )
    return {
        "position_embedding_type": "long_rope",
        "original_max_position_embeddings": original,
        "longrope_scaling_short_factors": rope.get("short_factor"),
        "longrope_scaling_long_factors": rope.get("long_factor"),
    }


def _check_attention_factor(rope: Mapping[str, Any], factor: float, original: int) -> None:
    """The factor of cosines and sines follows from the two lengths; refuse what says otherwise."""
    stretched = factor > 1 and original > 1
    derived = math.sqrt(1 + math.log(factor) / math.log(original)) if stretched else 1.0
    for key, value in (("factor", factor), ("attention_factor", derived)):
        if not math.isclose(number_key(rope, key, value), value, rel_tol=1e-6):
            raise UnsupportedCheckpointError(
                f"config.json has a long rope with {key} {rope[key]!r}, which is not implemented; "
                f"it must be {value}, what follows from max_position_embeddings and "
                f"original_max_position_embeddings, {original}"
            )


FAMILY = Family(
    architecture="Phi3ForCausalLM",
    tensors=TENSORS,
    pretrained_config=pretrained_config,
    swapped_halves=frozenset({f"{_HF}.mlp.gate_up_proj.weight"}),
)
