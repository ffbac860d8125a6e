"""What conversion writes, against the source byte for byte."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.convert.converter import convert
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from tests.models import LINEAR_ROPE, LLAMA3_ROPE, load_llama, make_llama

_HF, _TRT = "model.layers.{i}.", "transformer.layers.{i}."
# Written out here again: the oracle must not be the table under test. Each target's parts in order.
_PARTS = {
    "transformer.vocab_embedding.weight": ["model.embed_tokens.weight"],
    "transformer.ln_f.weight": ["model.norm.weight"],
    "lm_head.weight": ["lm_head.weight"],
    _TRT + "input_layernorm.weight": [_HF + "input_layernorm.weight"],
    _TRT + "post_layernorm.weight": [_HF + "post_attention_layernorm.weight"],
    **{
        f"{_TRT}{target}.{kind}": [f"{_HF}{part}.{kind}" for part in parts]
        for kind in ("weight", "bias")
        for target, parts in {
            "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attention.dense": ["self_attn.o_proj"],
            "mlp.fc": ["mlp.gate_proj"],
            "mlp.gate": ["mlp.up_proj"],
            "mlp.proj": ["mlp.down_proj"],
        }.items()
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa_wide_heads": {"num_key_value_heads": 1, "head_dim": 32},
    "tied_llama3_rope": {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE},
    "biases_linear_rope": {"attention_bias": True, "mlp_bias": True, "rope_scaling": LINEAR_ROPE},
}


def _expected(source: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    state = load_llama(source).state_dict()
    expected = {}
    for target, parts in _PARTS.items():
        for layer in range(2) if "{i}" in target else (0,):
            names = [part.replace("{i}", str(layer)) for part in parts]
            if names[0] in state:
                tensor = torch.cat([state[name] for name in names]).to(dtype)
                expected[target.replace("{i}", str(layer))] = tensor
    return expected


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.fixture(params=VARIANTS, scope="module")
def variant(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / request.param
    return make_llama(
        path, seed=3, dtype=torch.bfloat16, max_shard_size="60KB", **VARIANTS[request.param]
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "tiny", seed=4, dtype=torch.bfloat16)


@pytest.mark.parametrize("quant", ["none", "w8a16"])
def test_plain_tensors_are_the_sources_bytes(variant: Path, tmp_path: Path, quant: str) -> None:
    out = convert(variant, tmp_path / "out", quant=quant)

    read = load_file(out / "rank0.safetensors")
    expected = _expected(variant, torch.bfloat16)
    if "tied" in variant.name:
        del expected["lm_head.weight"]
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert _bytes(read[name]) == _bytes(tensor), name


def test_fp8_tensors_are_modelopts_bytes(variant: Path, tmp_path: Path) -> None:
    out = convert(variant, tmp_path / "out", quant="fp8_rowwise")

    read = load_file(out / "rank0.safetensors")
    for name, tensor in _expected(variant, torch.bfloat16).items():
        if name == "lm_head.weight" and "tied" in variant.name:
            continue
        if "layers" not in name or "norm" in name or name.endswith("bias"):
            assert _bytes(read.pop(name)) == _bytes(tensor), name
            continue
        scale = tensor.float().abs().amax(dim=1) / 448
        weight = (tensor.float() / scale[:, None]).to(torch.float8_e4m3fn)
        scale_name = name.removesuffix("weight") + "per_channel_scale"
        assert _bytes(read.pop(scale_name)) == _bytes(scale), name
        assert _bytes(read.pop(name)) == _bytes(weight), name
    assert not read


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("none", {"quant_algo": None, "exclude_modules": None, "clamp_val": None}),
        ("w8a16", {"quant_algo": "W8A16", "exclude_modules": None, "clamp_val": None}),
        (
            "fp8_rowwise",
            {
                "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
                "exclude_modules": ["*ln_f", "*ln_embed", "*lm_head"],
                "clamp_val": [-1200.0, 1200.0],
            },
        ),
    ],
)
def test_quantization_is_written_as_tensorrt_llm_reads_it(
    source: Path, tmp_path: Path, quant: str, expected: dict[str, Any]
) -> None:
    out = convert(source, tmp_path / "out", quant=quant)
    written = json.loads((out / "config.json").read_text())["quantization"]
    assert {key: written[key] for key in expected} == expected
    assert written["kv_cache_quant_algo"] is None
    # TensorRT-LLM raises on a key it does not know, so none may be added.
    assert set(written) == {
        *("quant_algo", "kv_cache_quant_algo", "group_size", "smoothquant_val", "clamp_val"),
        *("use_meta_recipe", "has_zero_point", "pre_quant_scale", "exclude_modules"),
    }


def test_config_says_what_the_model_is(variant: Path, tmp_path: Path) -> None:
    config = json.loads((convert(variant, tmp_path / "o") / "config.json").read_text())
    overrides = VARIANTS[variant.name]
    expected = {
        "architecture": "LlamaForCausalLM",
        "dtype": "bfloat16",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": overrides.get("num_key_value_heads", 2),
        "head_size": overrides.get("head_dim", 16),
        "intermediate_size": 96,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": 10000.0,
        "rotary_scaling": overrides.get("rope_scaling"),
        "attn_bias": overrides.get("attention_bias", False),
        "mlp_bias": overrides.get("mlp_bias", False),
        "share_embedding_table": overrides.get("tie_word_embeddings", False),
    }
    assert {key: config[key] for key in expected} == expected
    assert config["mapping"]["world_size"] == 1


def _edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        config.pop(key, None)
        if value is not None:
            config[key] = value
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("type_key", ["rope_type", "type"])
def test_rope_is_read_as_old_versions_of_transformers_wrote_it(
    tmp_path: Path, type_key: str
) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    scaling = {type_key: "linear", "factor": 2.0}
    _edit_config(path, rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    config = json.loads((convert(path, tmp_path / "out") / "config.json").read_text())
    assert (config["rotary_base"], config["rotary_scaling"]) == (5e5, scaling)


def test_dynamic_rope_as_transformers_writes_it(tmp_path: Path) -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    path = make_llama(tmp_path / "hf", tokenizer=False, rope_scaling=dynamic)
    config = json.loads((convert(path, tmp_path / "out") / "config.json").read_text())
    assert config["max_position_embeddings"] == 512
    assert PretrainedConfig.from_dict(config).rotary_scaling is not None


def test_dynamic_rope_limits_the_model_to_its_original_length(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    dynamic = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 128}
    _edit_config(path, rope_parameters=None, rope_scaling=dynamic)
    config = json.loads((convert(path, tmp_path / "out") / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert PretrainedConfig.from_dict(config).rotary_scaling == dynamic


@pytest.mark.parametrize(
    ("stored", "asked", "written"),
    [
        (torch.bfloat16, "auto", "bfloat16"),
        (torch.float32, "auto", "float32"),
        (torch.float32, "float16", "float16"),
        (torch.float16, "bfloat16", "bfloat16"),
    ],
)
def test_dtype(tmp_path: Path, stored: torch.dtype, asked: Any, written: str) -> None:
    path = make_llama(tmp_path / "hf", dtype=stored, tokenizer=False)
    out = convert(path, tmp_path / "out", dtype=asked)
    assert json.loads((out / "config.json").read_text())["dtype"] == written
    read = load_file(out / "rank0.safetensors")
    expected = _expected(path, getattr(torch, written))
    assert all(_bytes(read[name]) == _bytes(tensor) for name, tensor in expected.items())


def test_dtype_without_a_word_in_config_is_the_tensors(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", dtype=torch.float16, tokenizer=False)
    _edit_config(path, dtype=None, torch_dtype=None)
    config = json.loads((convert(path, tmp_path / "out") / "config.json").read_text())
    assert config["dtype"] == "float16"


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    state = load_file(path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = 70000.0
    _save(state, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*bfloat16"):
        convert(path, tmp_path / "out", dtype="float16")
    convert(path, tmp_path / "out", dtype="bfloat16")
    state["model.layers.1.mlp.up_proj.weight"][3, 3] = 3.4e38
    _save(state, path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.*float32"):
        convert(path, tmp_path / "out2", dtype="bfloat16")


def _save(state: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path / "model.safetensors", metadata={"format": "pt"})


def test_tokenizer_and_generation_files_travel_along(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (path / "README.md").write_text("stays")
    (path / "pytorch_model.bin").write_bytes(b"stays")
    out = convert(path, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == [
        *("additional_chat_templates", "chat_template.jinja", "config.json"),
        *("generation_config.json", "quality.json", "rank0.safetensors"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    templates = out / "additional_chat_templates"
    assert (templates / "tools.jinja").read_text() == "{{ tools }}"


def test_eos_of_config_json_is_kept_where_there_is_no_generation_config(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", eos_token_id=[1, 4])
    (path / "generation_config.json").unlink()
    out = convert(path, tmp_path / "out")
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": [1, 4]}


def test_inv_freq_of_old_checkpoints_is_dropped(source: Path, tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    state = load_file(path / "model.safetensors")
    for layer in range(2):
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    _save(state, path)
    read = load_file(convert(path, tmp_path / "out") / "rank0.safetensors")
    assert not [name for name in read if "inv_freq" in name]


def test_a_tied_checkpoint_may_store_its_lm_head_if_it_is_the_same(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False, tie_word_embeddings=True)
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    _save(state, path)
    read = load_file(convert(path, tmp_path / "out") / "rank0.safetensors")
    assert "lm_head.weight" not in read
    state["lm_head.weight"][5, 5] += 1
    _save(state, path)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        convert(path, tmp_path / "out2")


def test_progress_is_told_to_the_last_byte(source: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    out = convert(source, tmp_path / "o", report=lambda *progress: told.append(progress))
    total = sum(t.nbytes for t in load_file(out / "rank0.safetensors").values())
    assert told[-1] == ("convert", total, total)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert len(told) == len(load_file(out / "rank0.safetensors"))


def test_settings_that_do_not_exist_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quant is 'int3'"):
        convert(source, tmp_path / "out", quant="int3")
    with pytest.raises(ConfigError, match="dtype is 'float64'"):
        convert(source, tmp_path / "out", dtype="float64")  # type: ignore[arg-type]


def test_a_converted_checkpoint_is_not_converted_again(source: Path, tmp_path: Path) -> None:
    out = convert(source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no Hugging Face checkpoint"):
        convert(out, tmp_path / "again")


YARN_WITH_MSCALE = {
    "rope_type": "yarn",
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "mscale": 0.7,
}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, None, "Falcon"),
        ({"architectures": ["LlamaForSequenceClassification"]}, None, "SequenceClassification"),
        ({"quantization_config": {"quant_method": "gptq"}}, None, "quantised already"),
        ({"rope_parameters": YARN_WITH_MSCALE}, None, "mscale"),
        ({"hidden_act": "gelu"}, None, "gelu"),
        ({"pretraining_tp": 2}, None, "pretraining_tp"),
        ({"partial_rotary_factor": 0.5}, None, "partial_rotary_factor"),
        ({"hidden_size": None}, CheckpointError, "hidden_size None"),
        ({"hidden_size": "big"}, CheckpointError, "hidden_size 'big'"),
        ({"attention_bias": "yes"}, CheckpointError, "attention_bias 'yes'"),
        ({"rope_parameters": 5}, CheckpointError, "rope_parameters 5"),
        ({"rope_parameters": None, "rope_scaling": {"factor": 2.0}}, None, "without a rope_type"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
            None,
            "without a rope_type.*full_attention",
        ),
        ({"rms_norm_eps": float("nan")}, CheckpointError, "NaN is no number"),
        ({"model_type": ["llama"]}, None, "model_type"),
        ({"num_attention_heads": 0, "head_dim": None}, CheckpointError, "num_attention_heads is 0"),
        ({"num_hidden_layers": 10**9}, CheckpointError, "num_hidden_layers .* at most 10000"),
    ],
)
def test_configs_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception] | None, words: str
) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    _edit_config(path, **changes)
    with pytest.raises(error or UnsupportedCheckpointError, match=words):
        convert(path, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if "RssAnon" in line)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("quant", ["none", "fp8_rowwise"])
def test_memory_holds_one_tensor_and_not_the_model(
    tmp_path: Path, quant: str, two_threads: None
) -> None:
    source = make_llama(
        tmp_path / "hf",
        dtype=torch.float32,
        tokenizer=False,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=6,
    )
    size = (source / "model.safetensors").stat().st_size
    before, peak = _anonymous_bytes(), 0

    def watch(stage: str, done: int, total: int) -> None:
        nonlocal peak
        peak = max(peak, _anonymous_bytes())

    # In another dtype, so that no tensor is only mapped.
    convert(source, tmp_path / "out", quant=quant, dtype="bfloat16", report=watch)

    assert size > 90 * 2**20
    # The largest tensor is 4 MiB in float32; three threads hold some chunks of 2 MiB each.
    assert peak - before < 32 * 2**20
