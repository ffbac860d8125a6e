"""Every family: what is written against transformers' own tensors, and config.json by key.

The rule of each family is stated here again, from TensorRT-LLM's sources: the oracle must not be
the table under test.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
)

from llmserve.convert.converter import convert
from llmserve.convert.families import MODEL_TYPES
from llmserve.errors import CheckpointError, UnsupportedCheckpointError
from tests.models import FAMILIES, load_model, make_model, model_config
from tests.runtime.test_logits import VARIANTS as LOGITS_VARIANTS

_NORMS = {
    "input_layernorm.weight": ["input_layernorm.weight"],
    "post_layernorm.weight": ["post_attention_layernorm.weight"],
}
_MORE_NORMS = {
    "pre_feedforward_layernorm.weight": ["pre_feedforward_layernorm.weight"],
    "post_feedforward_layernorm.weight": ["post_feedforward_layernorm.weight"],
}
_HEAD_NORMS = {
    "attention.q_layernorm.weight": ["self_attn.q_norm.weight"],
    "attention.k_layernorm.weight": ["self_attn.k_norm.weight"],
}
_DENSE = {"attention.dense.weight": ["self_attn.o_proj.weight"]}
_ATTENTION = _DENSE | {
    "attention.qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
}
_MLP = {
    "mlp.fc.weight": ["mlp.gate_proj.weight"],
    "mlp.gate.weight": ["mlp.up_proj.weight"],
    "mlp.proj.weight": ["mlp.down_proj.weight"],
}
# transformers 5 holds all experts in one tensor, gate and then up, which are stored as up and gate.
_EXPERTS = {
    "mlp.router.weight": ["mlp.gate.weight"],
    "mlp.fc.weight": ["mlp.experts.gate_up_proj"],
    "mlp.proj.weight": ["mlp.experts.down_proj"],
}
_LLAMA = _NORMS | _ATTENTION | _MLP
# A layer's TensorRT-LLM name -> the tensors of transformers' state_dict it is made of, in order.
LAYERS: dict[str, dict[str, list[str]]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _NORMS | _ATTENTION | _EXPERTS,
    "qwen2": _LLAMA | {"attention.qkv.bias": [f"self_attn.{part}_proj.bias" for part in "qkv"]},
    "qwen3": _LLAMA | _HEAD_NORMS,
    "qwen3_moe": _NORMS | _HEAD_NORMS | _ATTENTION | _EXPERTS,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | _MORE_NORMS,
    "gemma3_text": _LLAMA | _MORE_NORMS | _HEAD_NORMS,
    "phi3": {
        **_NORMS,
        **_DENSE,
        "attention.qkv.weight": ["self_attn.qkv_proj.weight"],
        "mlp.fc.weight": ["mlp.gate_up_proj.weight"],
        "mlp.proj.weight": ["mlp.down_proj.weight"],
    },
}


def _expected(
    path: Path, model_type: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    state = load_model(path).state_dict()
    layers = model_config(model_type).num_hidden_layers
    names = {
        f"transformer.layers.{i}.{target}": [f"model.layers.{i}.{part}" for part in parts]
        for i in range(layers)
        for target, parts in LAYERS[model_type].items()
    }
    names["transformer.vocab_embedding.weight"] = ["model.embed_tokens.weight"]
    names["transformer.ln_f.weight"] = ["model.norm.weight"]
    if not model_type.startswith("gemma"):
        names["lm_head.weight"] = ["lm_head.weight"]
    tensors = {
        target: torch.cat([state[part] for part in parts]) for target, parts in names.items()
    }
    for target, parts in names.items():
        if "gate_up_proj" in parts[0]:
            gate, up = tensors[target].chunk(2, dim=-2)
            tensors[target] = torch.cat((up, gate), dim=-2)
        if model_type.startswith("gemma") and "norm" in parts[0]:
            tensors[target] = tensors[target] + 1
    return {
        target: tensor if "router" in target else tensor.to(dtype)
        for target, tensor in tensors.items()
    }


@pytest.fixture(scope="module", params=MODEL_TYPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of each family in bfloat16; its directory's name is the model_type."""
    path: Path = tmp_path_factory.mktemp("hf") / request.param
    return make_model(path, request.param, seed=5, dtype=torch.bfloat16, max_shard_size="70KB")


def _written(model: Path, out: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    convert(model, out)
    return json.loads((out / "config.json").read_text()), load_file(out / "rank0.safetensors")


def _check_same(read: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


def test_every_family_has_its_tests() -> None:
    """A new line in MODEL_TYPES fails here until docs/families.md's recipe is followed."""
    assert set(FAMILIES) == set(MODEL_TYPES), "tests/models.py: FAMILIES"
    assert set(LAYERS) == set(MODEL_TYPES), "LAYERS, above"
    assert set(CONFIGS) == set(MODEL_TYPES), "CONFIGS, below"
    tested = {model_type for model_type, _ in LOGITS_VARIANTS.values()}
    assert tested == set(MODEL_TYPES), "tests/runtime/test_logits.py: VARIANTS"
    table = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    assert [m for m in MODEL_TYPES if f"| `{m}` |" not in table] == [], "the table of docs"


def test_every_tensor_is_transformers_own(model: Path, tmp_path: Path) -> None:
    _, read = _written(model, tmp_path / "out")
    _check_same(read, _expected(model, model.name))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_in_one_tensor_are_read_as_well(model_type: str, tmp_path: Path) -> None:
    usual = make_model(tmp_path / "usual", model_type, seed=6, dtype=torch.bfloat16)
    fused = tmp_path / "fused"
    AutoModelForCausalLM.from_pretrained(usual).save_pretrained(fused, save_original_format=False)
    with safe_open(fused / "model.safetensors", "pt") as file:
        assert "model.layers.1.mlp.experts.gate_up_proj" in file.keys()  # noqa: SIM118
    _, read = _written(fused, tmp_path / "out")
    _check_same(read, _expected(usual, model_type))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    path = make_model(tmp_path / "hf", "mixtral")
    _edit_config(path, num_local_experts=5)
    with pytest.raises(CheckpointError, match=r"lacks .*experts\.4\.w3|gate.weight .* \[5, 64\]"):
        convert(path, tmp_path / "out")
    _edit_config(path, num_local_experts=3, num_experts_per_tok=2)
    with pytest.raises(CheckpointError, match=r"gate\.weight .* must be \[3, 64\]"):
        convert(path, tmp_path / "out")


_COMMON = {
    "dtype": "bfloat16",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_size": 16,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "norm_epsilon": 1e-5,
    "logits_dtype": "float32",
    "position_embedding_type": "rope_gpt_neox",
    "rotary_base": 10000.0,
    "rotary_scaling": None,
    "attn_bias": False,
    "mlp_bias": False,
    "qk_layernorm": False,
    "share_embedding_table": False,
    "use_parallel_embedding": False,
    "embedding_sharding_dim": 0,
}
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "share_embedding_table": True, "head_size": 32}
_GEMMA2 = _GEMMA | {"inter_layernorms": True, "query_pre_attn_scalar": 24.0, "sliding_window": 8}
_MIXTRAL_MOE = {"num_experts": 4, "top_k": 2, "normalization_mode": 1}
_QWEN_MOE = {"num_experts": 8, "top_k": 3, "normalization_mode": 1}
# What TensorRT-LLM's own config class of the family writes, but for quantization and mapping; the
# windows of all but Gemma 3 are ours, which it does not know.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "LlamaForCausalLM"},
    "mistral": {"architecture": "MistralForCausalLM", "sliding_window": 8},
    "mixtral": {
        "architecture": "MixtralForCausalLM",
        "hidden_act": "swiglu",
        "moe": _MIXTRAL_MOE,
        "rotary_base": 1e6,
        "sliding_window": 8,
    },
    "qwen2": {
        "architecture": "Qwen2ForCausalLM",
        "qwen_type": "qwen2",
        "attn_bias": True,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {
        "architecture": "Qwen3ForCausalLM",
        "qwen_type": "qwen3",
        "qk_layernorm": True,
        "head_size": 32,
    },
    "qwen3_moe": {
        "architecture": "Qwen3MoeForCausalLM",
        "qwen_type": "qwen3_moe",
        "qk_layernorm": True,
        "head_size": 32,
        "hidden_act": "swiglu",
        "moe": _QWEN_MOE,
        "moe_intermediate_size": 48,
    },
    "gemma": {"architecture": "GemmaForCausalLM", **_GEMMA},
    "gemma2": {
        **_GEMMA2,
        "architecture": "Gemma2ForCausalLM",
        "num_hidden_layers": 3,
        "_sliding_window_pattern": 2,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_GEMMA2,
        "architecture": "Gemma3ForCausalLM",
        "num_hidden_layers": 4,
        "qk_layernorm": True,
        "_sliding_window_pattern": 3,
        "rope_local_base_freq": 100.0,
        "rotary_base": 1e6,
        "rotary_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "phi3": {
        "architecture": "Phi3ForCausalLM",
        "hidden_act": "swiglu",
        "position_embedding_type": "long_rope",
        "rotary_pct": 0.75,
        "original_max_position_embeddings": 32,
        "longrope_scaling_short_factors": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
        "longrope_scaling_long_factors": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
        "sliding_window": 16,
    },
}


def test_config_json_is_tensorrt_llms(model: Path, tmp_path: Path) -> None:
    config, _ = _written(model, tmp_path / "out")
    del config["quantization"], config["mapping"]
    assert config == _COMMON | CONFIGS[model.name]


def _edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_gemma_3_with_its_eyes_is_refused_and_its_text_model_taken(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config=model_config("gemma3_text").to_dict(),
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )
    whole = Gemma3ForConditionalGeneration(config)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(UnsupportedCheckpointError, match=r"'gemma3'.*docs/families\.md"):
        convert(tmp_path / "whole", tmp_path / "out")
    # What docs/families.md says to do.
    text = Gemma3ForCausalLM(whole.config.text_config)
    text.model, text.lm_head = whole.model.language_model, whole.lm_head
    text.save_pretrained(tmp_path / "text")
    _, read = _written(tmp_path / "text", tmp_path / "out")
    _check_same(read, _expected(tmp_path / "text", "gemma3_text", torch.float32))
