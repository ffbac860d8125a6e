import json
from typing import Any

import pytest

from llmserve.checkpoint.config import ParallelMapping, PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.errors import CheckpointError, UnsupportedCheckpointError
from tests.checkpoint.factories import FAMILY_CONFIGS, pretrained_config
from tests.models import LINEAR_ROPE, LLAMA3_ROPE

_QKV = "transformer.layers.0.attention.qkv"
_FC = "transformer.layers.0.mlp.fc"


@pytest.mark.parametrize(
    "config",
    [
        pretrained_config(),
        pretrained_config(rotary_scaling=LLAMA3_ROPE, attn_bias=True, share_embedding_table=True),
        pretrained_config(quantization=QuantConfig(quant_algo="W8A16")),
        pretrained_config(mapping=ParallelMapping.tensor_parallel(2)),
        *FAMILY_CONFIGS,
    ],
)
def test_a_config_survives_json(config: PretrainedConfig) -> None:
    assert PretrainedConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_left_out_keys_take_tensorrt_llms_defaults() -> None:
    minimal = {
        "architecture": "LlamaForCausalLM",
        "dtype": "float16",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 32,
        "hidden_act": "silu",
        "position_embedding_type": "rope_gpt_neox",
    }
    config = PretrainedConfig.from_dict(minimal)
    assert (config.num_key_value_heads, config.intermediate_size, config.head_size) == (4, 256, 16)
    assert (config.norm_epsilon, config.rotary_base) == (1e-5, 10000.0)
    # gelu and learned positions are the defaults there: leaving these out asks for them.
    for key in ("hidden_act", "position_embedding_type"):
        with pytest.raises(UnsupportedCheckpointError, match=key):
            PretrainedConfig.from_dict({k: v for k, v in minimal.items() if k != key})


def test_what_other_writers_add_and_means_nothing_passes() -> None:
    extra = {
        "producer": {"name": "modelopt", "version": "0.40"},
        "rotary_embedding_dim": 16,
        "moe": {"num_experts": 0, "top_k": 0},
        "residual_mlp": False,
        "num_key_value_heads": None,
    }
    data = {**pretrained_config().to_dict(), **extra}
    assert PretrainedConfig.from_dict(data) == pretrained_config(num_key_value_heads=4)


def test_what_tensorrt_llms_own_llama_writes_is_read() -> None:
    # All attributes of its LLaMAConfig go to config.json, those that do nothing too.
    extra = {
        **dict.fromkeys(("embedding_multiplier", "attention_multiplier"), 1.0),
        **dict.fromkeys(("residual_multiplier", "output_multiplier_scale"), 1.0),
        **dict.fromkeys(("residual_mlp", "remove_duplicated_kv_heads", "fc_after_embed"), False),
        **dict.fromkeys(("use_input_layernorm_in_first_layer", "use_last_layernorm"), True),
        "rotary_embedding_dim": 16,
        "runtime_defaults": None,
        "disable_weight_only_quant_plugin": False,
        "layer_idx_offset": 0,
        "moe": {"num_experts": 0, "top_k": 0, "normalization_mode": None},
        "tie_word_embeddings": True,
    }
    data = {**pretrained_config().to_dict(), **extra}
    assert PretrainedConfig.from_dict(data) == pretrained_config()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"architecture": "BertForCausalLM"}, UnsupportedCheckpointError, "'BertForCausalLM'"),
        ({"architecture": "MixtralForCausalLM"}, UnsupportedCheckpointError, "hidden_act 'silu'"),
        ({"dtype": "float8"}, UnsupportedCheckpointError, "dtype 'float8'"),
        ({"hidden_act": "gelu"}, UnsupportedCheckpointError, "hidden_act 'gelu'"),
        ({"hidden_act": "swiglu"}, UnsupportedCheckpointError, "hidden_act 'swiglu'"),
        ({"qk_layernorm": True}, UnsupportedCheckpointError, "qk_layernorm True"),
        ({"inter_layernorms": True}, UnsupportedCheckpointError, "inter_layernorms True"),
        ({"sliding_window": 8}, UnsupportedCheckpointError, "sliding_window 8"),
        ({"rope_local_base_freq": 1e4}, UnsupportedCheckpointError, "rope_local_base_freq 10000"),
        ({"rotary_pct": 0.5}, UnsupportedCheckpointError, "rotary_pct 0.5"),
        ({"qwen_type": "qwen2"}, UnsupportedCheckpointError, "qwen_type 'qwen2'"),
        ({"moe": {"num_experts": 8}}, CheckpointError, "moe lacks top_k"),
        ({"moe": {"num_experts": 8, "top_k": 2}}, UnsupportedCheckpointError, "^moe .*for Llama"),
        ({"rotary_embedding_dim": 8}, UnsupportedCheckpointError, "rotary_embedding_dim 8"),
        ({"attn_logit_softcapping": 50.0}, UnsupportedCheckpointError, "attn_logit_softcapping"),
        ({"residual_mlp": True}, UnsupportedCheckpointError, "residual_mlp"),
        ({"attention_multiplier": 0.5}, UnsupportedCheckpointError, "attention_multiplier 0.5"),
        ({"mapping": {"world_size": 2, "tp_size": 1}}, CheckpointError, "world_size is 2"),
        ({"mapping": {"world_size": 2, "pp_size": 2}}, UnsupportedCheckpointError, "pp_size is 2"),
        ({"mapping": {"world_size": 2, "cp_size": 2}}, UnsupportedCheckpointError, "cp_size is 2"),
        ({"hidden_size": None}, CheckpointError, "lacks hidden_size"),
        ({"hidden_size": "64"}, CheckpointError, "hidden_size is '64'"),
        ({"hidden_size": "64", "head_size": None}, CheckpointError, "hidden_size is '64'"),
        ({"num_attention_heads": "4", "head_size": None}, CheckpointError, "heads is '4'"),
        ({"hidden_size": True}, CheckpointError, "hidden_size is True"),
        ({"vocab_size": 0}, CheckpointError, "vocab_size is 0"),
        ({"num_key_value_heads": 3}, CheckpointError, "multiple of"),
        ({"head_size": 15}, CheckpointError, "head_size is 15"),
        ({"quantization": {"quant_algo": "NVFP4"}}, UnsupportedCheckpointError, "'NVFP4'"),
        ({"quantization": {"kv_cache_quant_algo": "NVFP4"}}, UnsupportedCheckpointError, "NVFP4"),
        ({"quantization": {"use_meta_recipe": True}}, UnsupportedCheckpointError, "meta"),
        ({"quantization": {"quant_algorithm": "W8A16"}}, CheckpointError, "quant_algorithm"),
        (
            {"quantization": {"mamba_ssm_cache_dtype": "float16"}},
            UnsupportedCheckpointError,
            "mamba_ssm_cache_dtype 'float16'",
        ),
        ({"quantization": {"exclude_modules": [1]}}, CheckpointError, "exclude_modules"),
        ({"quantization": "W8A16"}, CheckpointError, "quantization is 'W8A16'"),
    ],
)
def test_what_cannot_be_run_is_named(
    change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        PretrainedConfig.from_dict({**pretrained_config().to_dict(), **change})


@pytest.mark.parametrize(
    ("family", "change", "error", "words"),
    [
        ("Mixtral", {"moe": None}, CheckpointError, "lacks moe"),
        ("Mixtral", {"moe": {"num_experts": 4}}, CheckpointError, "lacks top_k"),
        ("Mixtral", {"moe": {"num_experts": 4, "top_k": 5}}, CheckpointError, "top_k is 5"),
        (
            "Mixtral",
            {"moe": {"num_experts": 4, "top_k": 2, "shared_expert_intermediate_size": 8}},
            UnsupportedCheckpointError,
            "shared_expert_intermediate_size 8",
        ),
        (
            "Mixtral",
            {"moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 2}},
            UnsupportedCheckpointError,
            "normalization_mode 2",
        ),
        ("Mixtral", {"mlp_bias": True}, UnsupportedCheckpointError, "mlp_bias True"),
        ("Qwen3", {"attn_bias": True}, UnsupportedCheckpointError, "attn_bias True"),
        (
            "Qwen3Moe",
            {"mlp_only_layers": [1]},
            UnsupportedCheckpointError,
            r"mlp_only_layers \[1\]",
        ),
        ("Qwen3", {"qwen_type": "qwen2"}, CheckpointError, "must be 'qwen3'"),
        ("Gemma", {"hidden_act": "silu"}, UnsupportedCheckpointError, "be gelu_pytorch_tanh"),
        ("Gemma2", {"inter_layernorms": False}, CheckpointError, "lacks inter_layernorms"),
        ("Gemma2", {"query_pre_attn_scalar": None}, CheckpointError, "lacks query_pre_attn"),
        ("Gemma2", {"attn_logit_softcapping": 0.0}, CheckpointError, "softcapping is 0.0"),
        ("Gemma3", {"attn_logit_softcapping": 9.0}, UnsupportedCheckpointError, "softcapping 9.0"),
        ("Gemma3", {"sliding_window": -1}, CheckpointError, "sliding_window is -1"),
        ("Phi3", {"rotary_pct": 1.5}, CheckpointError, "rotary_pct 1.5"),
        ("Phi3", {"longrope_scaling_long_factors": [1.0]}, CheckpointError, "be 6 positive"),
        ("Phi3", {"longrope_scaling_short_factors": None}, CheckpointError, "short_factors is"),
        ("Phi3", {"original_max_position_embeddings": None}, CheckpointError, "embeddings is None"),
        ("Phi3", {"original_max_position_embeddings": 1}, CheckpointError, "at least 2"),
        ("Phi3", {"position_embedding_type": "rope_gpt_neox"}, CheckpointError, "be 'long_rope'"),
        ("Phi3", {"rotary_scaling": LINEAR_ROPE}, UnsupportedCheckpointError, "rotary_scaling"),
    ],
)
def test_what_cannot_be_run_of_a_family_is_named(
    family: str, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    (config,) = (c for c in FAMILY_CONFIGS if c.architecture == f"{family}ForCausalLM")
    with pytest.raises(error, match=words):
        PretrainedConfig.from_dict({**config.to_dict(), **change})


def test_families_are_read_as_tensorrt_llms_own_classes_read_them() -> None:
    by_name = {config.architecture: config for config in FAMILY_CONFIGS}
    # Its QWenConfig has biases where config.json says nothing, and goes by qwen_type for q_norm.
    qwen2 = by_name["Qwen2ForCausalLM"].to_dict()
    del qwen2["attn_bias"]
    assert PretrainedConfig.from_dict(qwen2) == by_name["Qwen2ForCausalLM"]
    qwen3 = {**by_name["Qwen3ForCausalLM"].to_dict(), "qk_layernorm": False}
    qwen3 |= {"seq_length": 8192, "use_logn_attn": False, "num_labels": 1}
    qwen3 |= {"moe": {"num_experts": 0}, "moe_intermediate_size": 0}
    qwen3 |= {"moe_shared_expert_intermediate_size": 0, "tie_word_embeddings": False}
    qwen3 |= {"mlp_only_layers": [], "decoder_sparse_step": 1}
    assert PretrainedConfig.from_dict(qwen3) == by_name["Qwen3ForCausalLM"]
    # Its Gemma always shares the embedding.
    gemma = by_name["GemmaForCausalLM"].to_dict()
    del gemma["share_embedding_table"]
    assert PretrainedConfig.from_dict(gemma) == by_name["GemmaForCausalLM"]
    gemma3 = by_name["Gemma3ForCausalLM"].to_dict()
    assert gemma3["_sliding_window_pattern"] == 3  # its name of it in 1.2
    gemma3["sliding_window_pattern"] = gemma3.pop("_sliding_window_pattern")  # and before
    assert PretrainedConfig.from_dict(gemma3) == by_name["Gemma3ForCausalLM"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sliding_window": 8}, [8, 8, 8, 8]),
        ({"sliding_window": 8, "max_window_layers": 3}, [None, None, None, 8]),
        ({"sliding_window": 8, "sliding_window_pattern": 2}, [8, None, 8, None]),
        ({"sliding_window": 8, "sliding_window_pattern": 6}, [8, 8, 8, 8]),
        ({"sliding_window_pattern": 2}, [None] * 4),
    ],
)
def test_window_of_a_layer(settings: dict[str, Any], expected: list[int | None]) -> None:
    config = pretrained_config(architecture="Gemma2ForCausalLM", **settings)
    assert [config.window(layer) for layer in range(4)] == expected


@pytest.mark.parametrize(
    "scaling",
    [
        LLAMA3_ROPE,
        LINEAR_ROPE,
        {"type": "linear", "factor": 4},
        {"type": "dynamic", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512},
    ],
)
def test_rotary_scalings_that_are_implemented(scaling: dict[str, Any]) -> None:
    config = pretrained_config(rotary_scaling=scaling)
    assert PretrainedConfig.from_dict(config.to_dict()).rotary_scaling == scaling


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn' has original_max_position_embeddings"),
        ({"rope_type": "longrope"}, "'longrope' is not implemented"),
        ({"rope_type": "linear"}, "factor None"),
        ({"rope_type": "linear", "factor": 0}, "factor 0"),
        ({**LLAMA3_ROPE, "low_freq_factor": None}, "low_freq_factor None"),
        ({**LLAMA3_ROPE, "low_freq_factor": 4.0}, "must exceed"),
        ({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}, "up to"),
    ],
)
def test_rotary_scalings_that_are_refused(scaling: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        PretrainedConfig.from_dict(pretrained_config(rotary_scaling=scaling).to_dict())


def test_the_newest_tensorrt_llms_key_is_read_and_not_written() -> None:
    config = QuantConfig.from_dict({"quant_algo": "FP8", "mamba_ssm_cache_dtype": None})
    assert config == QuantConfig(quant_algo="FP8")


def test_w8a16_matches_linear_and_weight_names() -> None:
    assert QuantConfig(quant_algo="W8A16").quantizes(_QKV)
    assert not QuantConfig().quantizes(_QKV)
    for pattern in ("*attention.qkv", "*qkv.weight", _QKV):
        config = QuantConfig(quant_algo="W8A16", exclude_modules=[pattern])
        assert not config.quantizes(_QKV)
        assert config.quantizes(_FC)
    # The linear's own name counts, not its parent's, and fnmatchcase is about case.
    for pattern in ("*attention", "*QKV"):
        assert QuantConfig(quant_algo="W8A16", exclude_modules=[pattern]).quantizes(_QKV)


def test_fp8_rowwise_matches_whole_modules() -> None:
    algo = "FP8_PER_CHANNEL_PER_TOKEN"
    assert QuantConfig(quant_algo=algo).quantizes(_QKV)
    excluded = QuantConfig(quant_algo=algo, exclude_modules=["*ln_f", "*.0.attention"])
    assert not excluded.quantizes(_QKV)
    assert excluded.quantizes(_FC)
    assert excluded.quantizes("transformer.layers.1.attention.qkv")
