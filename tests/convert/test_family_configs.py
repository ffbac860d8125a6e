"""Every family: what a Hugging Face config.json says, in TensorRT-LLM's words, or why not."""

import json
from typing import Any

import pytest
from transformers import AutoConfig

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert.families import MODEL_TYPES, family
from llmserve.errors import CheckpointError
from tests.models import LLAMA3_ROPE, model_config


def _converted(hf: dict[str, Any]) -> PretrainedConfig:
    return family(hf).pretrained_config(hf, "bfloat16", QuantConfig())


# The same models as transformers 4.57 writes their config.json: keys to drop, keys to set.
_VERSION_4: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "llama": ((), {"rope_theta": 10000.0, "rope_scaling": None}),
    "mistral": ((), {"rope_theta": 10000.0, "head_dim": None}),
    "mixtral": ((), {"rope_theta": 1e6, "head_dim": None}),
    "qwen2": ((), {"rope_theta": 10000.0, "rope_scaling": None}),
    "qwen3": ((), {"rope_theta": 10000.0, "rope_scaling": None}),
    "qwen3_moe": (("num_local_experts",), {"rope_theta": 10000.0, "num_experts": 8}),
    # It leaves tie_word_embeddings out where it is on.
    "gemma": (("tie_word_embeddings",), {"rope_theta": 10000.0, "hidden_activation": None}),
    "gemma2": (("tie_word_embeddings",), {"rope_theta": 10000.0}),
    "gemma3_text": (
        ("tie_word_embeddings",),
        {
            "rope_theta": 1e6,
            "rope_local_base_freq": 100.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "phi3": (
        (),
        {
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
                "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
            },
        },
    ),
}


def _saved(model_type: str) -> dict[str, Any]:
    """config.json as transformers 5 writes it."""
    saved: dict[str, Any] = json.loads(model_config(model_type).to_json_string())
    return saved


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_familys_config_survives_json(model_type: str) -> None:
    config = _converted(_saved(model_type))
    assert PretrainedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("with_layer_types", [True, False])
def test_version_4s_spelling_says_the_same(model_type: str, with_layer_types: bool) -> None:
    hf = _saved(model_type)
    drop, changes = _VERSION_4[model_type]
    older = {key: value for key, value in hf.items() if key not in (*drop, "rope_parameters")}
    if not with_layer_types:  # 4.5 and before
        older.pop("layer_types", None)
    assert _converted(older | changes) == _converted(hf)


# Keys of well-known checkpoints as they stand on the Hub, cut to what is read; what they must give.
_SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 96,
    "num_attention_heads": 32,
    "vocab_size": 320,
}
_HUB: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "mistral 7B v0.1": (
        {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 4096},
        {"num_key_value_heads": 8, "sliding_window": 4096, "rotary_base": 10000.0},
    ),
    "mistral 7B v0.3": (
        {
            "model_type": "mistral",
            "num_hidden_layers": 2,
            "sliding_window": None,
            "rope_theta": 1e6,
            "num_key_value_heads": 4,
        },
        {"sliding_window": None, "rotary_base": 1e6},
    ),
    "qwen 2.5 7B": (
        {
            "model_type": "qwen2",
            "num_hidden_layers": 28,
            "use_sliding_window": False,
            "sliding_window": 131072,
            "max_window_layers": 28,
            "rope_theta": 1e6,
            "num_key_value_heads": 4,
        },
        {"sliding_window": None, "max_window_layers": None, "attn_bias": True},
    ),
    "qwen 3 30B A3B": (
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 48,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "moe_intermediate_size": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 48,
        },
        {"expert_size": 768, "head_size": 128, "dense_bias": False, "num_key_value_heads": 4},
    ),
    "gemma 2B": (
        {
            "model_type": "gemma",
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "head_dim": 256,
        },
        {
            "hidden_act": "gelu_pytorch_tanh",
            "share_embedding_table": True,
            "embedding_scale": 2048**0.5,
        },
    ),
    "gemma 2 2B": (
        {
            "model_type": "gemma2",
            "num_hidden_layers": 26,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
            "cache_implementation": "hybrid",
        },
        {"sliding_window_pattern": 2, "attention_scale": 1 / 16, "share_embedding_table": True},
    ),
    "gemma 3 1B": (
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "max_position_embeddings": 32768,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
        {
            "sliding_window_pattern": 6,
            "rope_local_base_freq": 10000.0,
            "rotary_base": 1e6,
            "rotary_scaling": None,
            "head_size": 256,
        },
    ),
    "phi 3 mini 4k": (
        {
            "model_type": "phi3",
            "num_hidden_layers": 32,
            "sliding_window": 2047,
            "rope_scaling": None,
            "original_max_position_embeddings": 4096,
        },
        {
            "position_embedding_type": "rope_gpt_neox",
            "num_key_value_heads": 32,
            "original_max_position_embeddings": None,
            "sliding_window": 2047,
        },
    ),
    "phi 3 mini 128k, first form": (
        {
            "model_type": "phi3",
            "num_hidden_layers": 2,
            "max_position_embeddings": 131072,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
        },
        {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": 4096,
            "longrope_scaling_long_factors": [2.0] * 32,
            "rotary_dim": 64,
        },
    ),
}


@pytest.mark.parametrize("name", _HUB)
def test_configs_of_the_hub(name: str) -> None:
    hf, expected = _HUB[name]
    config = _converted(_SIZES | hf)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_missing_keys_are_taken_as_transformers_takes_them(model_type: str) -> None:
    sizes = _SIZES | {"num_hidden_layers": 30}
    filled = json.loads(AutoConfig.for_model(model_type, **sizes).to_json_string(use_diff=False))
    assert filled.keys() > sizes.keys()
    assert _converted(sizes | {"model_type": model_type}) == _converted(filled)


_S, _F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("model_type", "layer_types", "windows"),
    [
        ("qwen2", [_S, _S, _S], [8, 8, 8]),
        ("qwen2", [_F, _F, _S], [None, None, 8]),
        ("qwen3", [_S, _F, _S], [8, None, 8]),
        ("qwen3", [_F, _F, _F], [None, None, None]),
        ("gemma2", [_S, _S, _F], [8, 8, None]),
        ("gemma3_text", [_F, _S, _S], [None, 8, 8]),
    ],
)
def test_layer_types_count(model_type: str, layer_types: list[str], windows: list[Any]) -> None:
    hf = model_config(model_type, num_hidden_layers=3).to_dict()
    hf |= {"use_sliding_window": True, "sliding_window": 8, "layer_types": layer_types}
    config = _converted(hf)
    assert [config.window(layer) for layer in range(3)] == windows


_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"mlp_bias": 3}, "mlp_bias 3"),
    ("mistral", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("mistral", {"sliding_window": 0}, "sliding_window is 0"),
    ("mistral", {"sliding_window": "4096"}, "sliding_window '4096'"),
    ("mistral", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ("mistral", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "keep one of them"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act 'gelu'.*must be 'silu'"),
    ("mixtral", {"num_experts_per_tok": 5}, "top_k is 5"),
    ("qwen2", {"layer_types": [_S, _F, _F]}, "order that is not implemented"),
    ("qwen2", {"layer_types": [_F, _S]}, "must be a list of num_hidden_layers, 3"),
    ("qwen2", {"layer_types": [_F, _S, "linear_attention"]}, "type 'linear_attention'"),
    ("qwen2", {"use_sliding_window": False}, "no sliding_window"),
    (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0}},
        "rotary_base is 1.0; with rotary scaling 'yarn'",
    ),
    ("qwen3", {"attention_bias": True}, "attention_bias True"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias True"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
    ("qwen3_moe", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act 'silu'"),
    ("gemma", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
    ("gemma2", {"attention_bias": True}, "attention_bias True"),
    ("gemma2", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
    (
        "gemma3_text",
        {"rope_parameters": {_F: {"rope_type": "default"}, _S: LLAMA3_ROPE}},
        "scaled angles for sliding layers",
    ),
    ("gemma3_text", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("phi3", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("phi3", {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "type 'linear'"),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "attention_factor": 1.5}},
        r"attention_factor 1\.5.*must be 1\.34",
    ),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "factor": 32.0}},
        r"factor 32\.0.*must be 16\.0",
    ),
    (
        "phi3",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "must be 8 positive numbers",
    ),
    ("phi3", {"architectures": ["Phi3SmallForCausalLM"]}, "Phi3SmallForCausalLM"),
]


@pytest.mark.parametrize(("model_type", "changes", "words"), _REFUSED)
def test_what_a_family_does_not_implement(
    model_type: str, changes: dict[str, Any], words: str
) -> None:
    hf = model_config(model_type).to_dict() | changes
    with pytest.raises(CheckpointError, match=words):
        _converted(hf)


def test_yarn_stretches_what_the_model_has_unless_it_names_another_length() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    hf = json.loads(model_config("qwen2").to_json_string())
    hf |= {"max_position_embeddings": 100, "rope_parameters": yarn}
    config = family(hf).pretrained_config(hf, "float32", QuantConfig())
    assert config.rotary_scaling is not None
    assert config.rotary_scaling["original_max_position_embeddings"] == 100
    assert config.max_position_embeddings == 400
    hf["rope_parameters"] = yarn | {"original_max_position_embeddings": 50}
    config = family(hf).pretrained_config(hf, "float32", QuantConfig())
    assert config.max_position_embeddings == 200
