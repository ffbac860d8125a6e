"""The quantised Hugging Face format, both ways, against values worked out here."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from llmserve.artifacts import ensure_engine
from llmserve.build.native import build
from llmserve.config import BuildConfig, CalibrationConfig
from llmserve.convert import export_hf
from llmserve.convert.converter import convert
from llmserve.convert.plain_tensors import PlainTensors
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from llmserve.llm import LLM
from tests.models import FAMILIES, load_model, make_llama, make_model

Tensors = dict[str, torch.Tensor]

_CALIBRATION = CalibrationConfig(samples=2, seq_len=32)
_LINEAR = re.compile(r"(.*\.layers\.\d+\.(?:self_attn|mlp|block_sparse_moe)\..*)\.weight")
# Linears that every reader computes as one, and which therefore have one scale in FP8.
_ONE_SCALE = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
_RANGE_OF = (
    (r"self_attn\.(q|k|v|qkv)_proj", "attention.qkv"),
    (r"self_attn\.o_proj", "attention.dense"),
    (r"mlp\.(gate_proj|up_proj|gate_up_proj)", "mlp.fc"),
    (r"experts\.\d+\.(gate_proj|up_proj|w1|w3)", "mlp.fc"),
    (r"(mlp\.down_proj|experts\.\d+\.(down_proj|w2))", "mlp.proj"),
)
_QUANTS = {
    "w8a16": {"quant": "w8a16"},
    "fp8_rowwise": {"quant": "fp8_rowwise"},
    "fp8": {"quant": "fp8"},
    "fp8_kv": {"quant": "fp8", "kv_cache_dtype": "fp8"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {
        family: make_model(root / family, family, seed=2, dtype=torch.bfloat16)
        for family in FAMILIES
    }


def _export(source: Path, out: Path, quant: str) -> Path:
    settings: dict[str, Any] = dict(_QUANTS[quant])
    if quant.startswith("fp8") and quant != "fp8_rowwise":
        settings["calibration"] = _CALIBRATION
    return convert(source, out, checkpoint_format="hf", **settings)


def _direct(source: Path, export: Path, out: Path, quant: str, **changes: Any) -> Path:
    """The TensorRT-LLM checkpoint of the same source, by the same ranges."""
    settings: dict[str, Any] = _QUANTS[quant] | changes
    if (ranges := export / "calibration" / "activation_ranges.safetensors").exists():
        settings["calibration"] = CalibrationConfig(path=ranges)
    return convert(source, out, **settings)


def _is_linear(name: str) -> bool:
    router = name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))
    return _LINEAR.fullmatch(name) is not None and "norm" not in name and not router


def _expected(source: Tensors, quant: str, ranges: Tensors) -> Tensors:
    """What each format stores, by its definition."""
    result: Tensors = {}
    for name, tensor in source.items():
        if not _is_linear(name):
            result[name] = tensor
            continue
        module, weight = name.removesuffix(".weight"), tensor.float()
        if quant == "w8a16":
            scale = weight.abs().amax(1) / 128
            result[name] = (weight / scale[:, None]).round().clamp(-128, 127).to(torch.int8)
            result[f"{module}.weight_scale"] = scale
        elif quant == "fp8_rowwise":
            scale = weight.abs().amax(1) / 448
            result[name] = (weight / scale[:, None]).to(torch.float8_e4m3fn)
            result[f"{module}.weight_scale"] = scale
        else:
            parent, _, linear = module.rpartition(".")
            together = next((g for g in _ONE_SCALE if linear in g), (linear,))
            amax = max(source[f"{parent}.{one}.weight"].abs().max().item() for one in together)
            result[name] = (weight / torch.tensor(amax / 448)).to(torch.float8_e4m3fn)
            result[f"{module}.weight_scale"] = torch.tensor(amax / 448)
            ((trt,),) = [[t] for pattern, t in _RANGE_OF if re.search(pattern + "$", module)]
            layer = re.search(r"layers\.(\d+)\.", name)[1]  # type: ignore[index]
            seen = ranges[f"transformer.layers.{layer}.{trt}.input_amax"].max()
            result[f"{module}.input_scale"] = seen / 448
    if quant == "fp8_kv":
        for layer, (key, value) in enumerate(zip(ranges["keys"], ranges["values"], strict=True)):
            result[f"model.layers.{layer}.self_attn.k_proj.k_scale"] = key / 448
            result[f"model.layers.{layer}.self_attn.v_proj.v_scale"] = value / 448
    return result


def _assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert _bytes(found[name]) == _bytes(tensor), name


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensors(path: Path) -> Tensors:
    return {
        k: t for file in sorted(path.glob("model*.safetensors")) for k, t in load_file(file).items()
    }


@pytest.mark.parametrize(
    ("family", "quant"),
    [("llama", "fp8"), *itertools.product(FAMILIES, ("w8a16", "fp8_rowwise", "fp8_kv"))],
)
def test_every_family_both_ways(
    family: str, quant: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = sources[family]
    out = _export(source, tmp_path / "hf", quant)
    file = out / "calibration" / "activation_ranges.safetensors"
    ranges = load_file(file) if file.exists() else {}
    plain = _tensors(source)
    _assert_same(_tensors(out), _expected(plain, quant, ranges))
    # vLLM, SGLang and TensorRT-LLM load every .safetensors that is beside config.json.
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert bool(ranges) == (quant in ("fp8", "fp8_kv"))

    algo = {"w8a16": "W8A16", "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN"}.get(quant, "FP8")
    kv = "FP8" if quant == "fp8_kv" else None
    exclude = ["lm_head", "model.embed_tokens"]
    exclude += sorted(
        n.removesuffix(".weight") for n in plain if re.search(r"(mlp|moe)\.gate\.", n)
    )
    described = json.loads((out / "hf_quant_config.json").read_text())
    assert described["producer"]["name"] == "llmserve"
    assert described["quantization"] == {
        "quant_algo": algo,
        "kv_cache_quant_algo": kv,
        "exclude_modules": exclude,
    }
    config = json.loads((out / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    static = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": static, "weights": static, "targets": ["Linear"]}
    assert said.pop("producer") == described["producer"]
    assert said == {
        "quant_method": "modelopt",
        "quant_algo": algo,
        "ignore": exclude,
        **({"config_groups": {"group_0": group}} if algo == "FP8" else {}),
        **({"kv_cache_scheme": static} if kv else {}),
    }

    # Back: the same bytes as without the detour.
    back = convert(out, tmp_path / "back")
    direct = _direct(source, out, tmp_path / "direct", quant)
    if quant == "w8a16":  # TensorRT-LLM's own checkpoint has plain weights
        back, direct = build(back, tmp_path / "e1"), build(direct, tmp_path / "e2")
    assert (back / "config.json").read_bytes() == (direct / "config.json").read_bytes()
    _assert_same(load_file(back / "rank0.safetensors"), load_file(direct / "rank0.safetensors"))


@pytest.mark.parametrize("quant", ["fp8_rowwise", "fp8_kv"])
def test_two_ranks_come_of_it_as_of_the_source(
    quant: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    out = _export(sources["mixtral"], tmp_path / "hf", quant)
    back = convert(out, tmp_path / "back", tp_size=2)
    direct = _direct(sources["mixtral"], out, tmp_path / "direct", quant, tp_size=2)
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        _assert_same(load_file(back / rank), load_file(direct / rank))


@pytest.mark.parametrize(
    "odd",
    [
        {"hidden_size": 60, "intermediate_size": 50, "num_attention_heads": 3, "head_dim": 20,
         "num_key_value_heads": 1, "vocab_size": 323, "attention_bias": True, "mlp_bias": True},
        {"tie_word_embeddings": True, "num_hidden_layers": 11},
    ],
)  # fmt: skip
def test_odd_sizes_biases_tied_embeddings(odd: dict[str, Any], tmp_path: Path) -> None:
    source = make_llama(tmp_path / "src", dtype=torch.float16, **odd)
    for quant in ("w8a16", "fp8_rowwise"):
        out = _export(source, tmp_path / quant, quant)
        _assert_same(_tensors(out), _expected(_tensors(source), quant, {}))
        back = build(convert(out, tmp_path / f"{quant}-c"), tmp_path / f"{quant}-e")
        direct = build(
            convert(source, tmp_path / f"{quant}-d", quant=quant), tmp_path / f"{quant}-f"
        )
        _assert_same(load_file(back / "rank0.safetensors"), load_file(direct / "rank0.safetensors"))


def test_a_source_in_another_dtype(tmp_path: Path) -> None:
    """Rounded to the model's dtype first, as everywhere else; both names of the key say it."""
    source = make_llama(tmp_path / "src")
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = config["dtype"]
    (source / "config.json").write_text(json.dumps(config))
    out = convert(source, tmp_path / "o", quant="w8a16", dtype="float16", checkpoint_format="hf")
    halves = {name: tensor.half() for name, tensor in _tensors(source).items()}
    _assert_same(_tensors(out), _expected(halves, "w8a16", {}))
    written = json.loads((out / "config.json").read_text())
    assert written["dtype"] == written["torch_dtype"] == "float16"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("quant", ["fp8_rowwise", "fp8"])
def test_experts_stored_as_one_are_written_one_by_one(
    family: str, quant: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    """As transformers 5 holds them: (experts, gate then up, hidden)."""
    source = shutil.copytree(sources[family], tmp_path / "src")
    plain = _tensors(source)
    up, gate, down = ("w3", "w1", "w2")
    if family == "qwen3_moe":
        up, gate, down = "up_proj", "gate_proj", "down_proj"
    fused = {k: t for k, t in plain.items() if ".experts." not in k}
    for layer in range(2):
        old = f"model.layers.{layer}.{'block_sparse_moe' if family == 'mixtral' else 'mlp'}"
        new = f"model.layers.{layer}.mlp"
        count = sum(f"{old}.experts." in k for k in plain) // 3
        experts = [f"{old}.experts.{e}" for e in range(count)]
        fused[f"{new}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([plain[f"{e}.{gate}.weight"], plain[f"{e}.{up}.weight"]]) for e in experts]
        )
        fused[f"{new}.experts.down_proj"] = torch.stack(
            [plain[f"{e}.{down}.weight"] for e in experts]
        )
        fused[f"{new}.gate.weight"] = fused.pop(f"{old}.gate.weight")
    save_file(fused, source / "model.safetensors", {"format": "pt"})
    one_by_one = _export(sources[family], tmp_path / "a", quant)
    settings: dict[str, Any] = {}
    if quant == "fp8":
        ranges = one_by_one / "calibration" / "activation_ranges.safetensors"
        settings["calibration"] = CalibrationConfig(path=ranges)
    as_one = convert(source, tmp_path / "b", quant=quant, checkpoint_format="hf", **settings)
    _assert_same(_tensors(as_one), _tensors(one_by_one))


def test_a_large_model_is_several_files(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _export(sources["llama"], tmp_path / "whole", "w8a16")
    monkeypatch.setattr(export_hf, "_SHARD_BYTES", 30_000)
    out = _export(sources["llama"], tmp_path / "out", "w8a16")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    sizes = [sum(t.nbytes for t in load_file(out / file).values()) for file in files]
    largest = max(tensor.nbytes for tensor in _tensors(whole).values())
    assert max(sizes) <= max(30_000, largest)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert index["weight_map"] == {k: file for file in files for k in load_file(out / file)}
    _assert_same(_tensors(out), _tensors(whole))
    monkeypatch.undo()
    _assert_same(
        load_file(convert(out, tmp_path / "c1") / "rank0.safetensors"),
        load_file(convert(whole, tmp_path / "c2") / "rank0.safetensors"),
    )


@pytest.mark.parametrize("quant", ["w8a16", "fp8"])
def test_it_is_recorded_what_was_read_written_and_lost(
    quant: str, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_hf, "_CHUNK_ROWS", 40)
    out = _export(sources["mixtral"], tmp_path / "out", quant)
    record = json.loads((out / "quality.json").read_text())
    for side, directory in (("source", sources["mixtral"]), ("result", out)):
        digests = record[side]["model.safetensors"]["tensors"]
        assert digests == {k: blake3(_bytes(t)).hexdigest() for k, t in _tensors(directory).items()}
    plain, stored = _tensors(sources["mixtral"]), _tensors(out)
    linears = {name for name in plain if _is_linear(name)}
    assert record["quantization_error"].keys() == linears
    for name in linears:
        weight, scale = plain[name].double(), stored[name.replace(".weight", ".weight_scale")]
        error = weight - stored[name].double() * (scale[:, None] if scale.dim() else scale)
        expected = float(error.norm() / weight.norm())
        assert record["quantization_error"][name] == pytest.approx(expected, rel=1e-5)


def test_what_is_made_of_it_is_recorded(sources: dict[str, Path], tmp_path: Path) -> None:
    source = _export(sources["llama"], tmp_path / "hf", "w8a16")
    out = convert(source, tmp_path / "out", tp_size=2)
    record = json.loads((out / "quality.json").read_text())
    files = {"source": [source / "model.safetensors"], "result": sorted(out.glob("rank*"))}
    for side, paths in files.items():
        assert record[side].keys() == {path.name for path in paths}
        for path in paths:
            expected = {k: blake3(_bytes(t)).hexdigest() for k, t in load_file(path).items()}
            assert record[side][path.name]["tensors"] == expected
    assert record["quantization_error"] == {}  # what it was before is not known


def test_rowwise_formats_hold_a_tensor_at_a_time(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all experts of a layer, which are one weight in TensorRT-LLM."""
    sizes = []
    read = PlainTensors.tensor

    def seen(self: PlainTensors, name: str) -> torch.Tensor:
        tensor = read(self, name)
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(PlainTensors, "tensor", seen)
    out = _export(sources["mixtral"], tmp_path / "out", "w8a16")
    stored = {k: t for k, t in _tensors(out).items() if not k.endswith("_scale")}
    assert sorted(sizes) == sorted(tensor.numel() for tensor in stored.values())


def test_it_is_served_as_transformers_computes_it(tmp_path: Path) -> None:
    """Greedy tokens of the exported directory, and of its dequantised weights in transformers."""
    source = make_llama(tmp_path / "src", seed=4)
    out = convert(source, tmp_path / "hf", quant="fp8_rowwise", checkpoint_format="hf")
    model = load_model(source)
    stored = _tensors(out)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            tensor = stored[name].float()
            if (scale := stored.get(name.replace(".weight", ".weight_scale"))) is not None:
                tensor *= scale[:, None]
            parameter.copy_(tensor)
    prompt = list(range(5, 25))
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    engine = ensure_engine(
        out, build_config=BuildConfig(max_seq_len=64), cache_dir=tmp_path / "cache"
    )
    _assert_same(
        load_file(engine / "rank0.safetensors"),
        load_file(
            build(convert(source, tmp_path / "c", quant="fp8_rowwise"), tmp_path / "e")
            / "rank0.safetensors"
        ),
    )
    with LLM(str(engine), device="cpu") as llm:  # there weights alone are rounded
        output = llm.generate(prompt, SamplingParams(max_tokens=12, temperature=0.0))
    answer = output.outputs[0].token_ids  # type: ignore[union-attr]
    assert list(answer) == expected[0, len(prompt) :].tolist()[: len(answer)]
    assert len(answer) >= 2


class TestOfOtherTools:
    """Checkpoints that were not written by llmserve."""

    @pytest.fixture
    def fp8(self, sources: dict[str, Path], tmp_path: Path) -> Path:
        return _export(sources["llama"], tmp_path / "hf", "fp8_kv")

    @pytest.fixture
    def w8a16(self, sources: dict[str, Path], tmp_path: Path) -> Path:
        return _export(sources["llama"], tmp_path / "hf", "w8a16")

    def _change(self, path: Path, **tensors: torch.Tensor | None) -> None:
        file = path / "model.safetensors"
        changed = load_file(file) | {k.replace("__", "."): t for k, t in tensors.items()}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, file, {"format": "pt"})

    def _describe(self, path: Path, **changes: Any) -> None:
        described = json.loads((path / "hf_quant_config.json").read_text())
        described["quantization"] |= changes
        (path / "hf_quant_config.json").write_text(json.dumps(described))

    def _refused(self, path: Path, error: type[Exception], words: str, **settings: Any) -> None:
        with pytest.raises(error, match=words) as caught:
            convert(path, path.parent / "out", **settings)
        assert "\n" not in str(caught.value)
        assert not (path.parent / "out").exists()

    def test_scales_that_differ_are_brought_to_the_largest(
        self, fp8: Path, sources: dict[str, Path], tmp_path: Path
    ) -> None:
        """As modelopt writes them. A value moves by half a step of e4m3 at most."""
        plain, prefix = _tensors(sources["llama"]), "model.layers.0"
        changes: Tensors = {}
        modules = [f"{prefix}.self_attn.{x}_proj" for x in "qkv"]
        modules += [f"{prefix}.mlp.{x}_proj" for x in ("gate", "up")]
        factors = dict(zip(modules, (1.0, 0.71, 0.33, 0.6, 1.0), strict=True))
        for module, factor in factors.items():
            weight = plain[f"{module}.weight"].float() * factor
            scale = weight.abs().max() / 448
            changes[f"{module}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
            changes[f"{module}.weight_scale"] = scale
        changes[f"{modules[3]}.input_scale"] = torch.tensor(0.25)
        self._change(fp8, **changes)
        back = load_file(convert(fp8, tmp_path / "c") / "rank0.safetensors")
        layer = "transformer.layers.0"
        assert back[f"{layer}.mlp.fc.activation_scaling_factor"].item() == 0.25
        assert back[f"{layer}.mlp.gate.activation_scaling_factor"].item() == 0.25
        for group, names in (
            (modules[:3], ["attention.qkv"]),
            (modules[3:], ["mlp.fc", "mlp.gate"]),
        ):
            scales = [changes[f"{m}.weight_scale"] for m in group]
            largest = max(scales)
            assert len({float(s) for s in scales}) == len(group)
            found = torch.cat([back[f"{layer}.{name}.weight"] for name in names]).float()
            for name in names:
                assert back[f"{layer}.{name}.weights_scaling_factor"].item() == largest
            given = torch.cat(
                [changes[f"{m}.weight"].float() * s for m, s in zip(group, scales, strict=True)]
            )
            error = (found * largest - given).abs()
            assert bool((error <= torch.maximum(given.abs() / 16, largest / 1024) * 1.0001).all())
            assert error.max() > 0
            kept = 0
            for module, scale in zip(group, scales, strict=True):
                rows = changes[f"{module}.weight"]
                if scale == largest:
                    assert torch.equal(found[kept : kept + len(rows)], rows.float())
                kept += len(rows)

    def test_scales_of_rows_may_be_a_column(self, w8a16: Path, tmp_path: Path) -> None:
        name = "model.layers.1.mlp.down_proj.weight_scale"
        plain = convert(w8a16, tmp_path / "a") / "rank0.safetensors"
        self._change(w8a16, **{name: _tensors(w8a16)[name][:, None]})
        other = convert(w8a16, tmp_path / "b") / "rank0.safetensors"
        assert plain.read_bytes() == other.read_bytes()

    def test_without_hf_quant_config(self, fp8: Path, tmp_path: Path) -> None:
        """config.json says it as well."""
        first = convert(fp8, tmp_path / "a")
        (fp8 / "hf_quant_config.json").unlink()
        second = convert(fp8, tmp_path / "b")
        for file in ("rank0.safetensors", "config.json"):
            assert (first / file).read_bytes() == (second / file).read_bytes()

    def test_without_scales(self, w8a16: Path) -> None:
        name = "model.layers.1.self_attn.o_proj.weight_scale"
        self._change(w8a16, **{name: None})
        self._refused(w8a16, CheckpointError, f"lacks the tensor {name}")

    def test_left_over(self, w8a16: Path) -> None:
        self._change(w8a16, **{"model.layers.0.mlp.up_proj.input_scale": torch.ones(())})
        self._refused(w8a16, CheckpointError, "up_proj.input_scale left over")

    @pytest.mark.parametrize(
        ("name", "tensor", "words"),
        [
            ("mlp.up_proj.weight", torch.zeros(96, 64), "is float32.*must be int8"),
            ("mlp.up_proj.weight", torch.zeros(96, 65).to(torch.int8), r"\[96, 65\].*\[96, 64\]"),
            ("mlp.up_proj.weight", torch.zeros(95, 64).to(torch.int8), r"\[95, 64\].*\[96, 64\]"),
            ("mlp.up_proj.weight_scale", torch.ones(95), r"\[95\].*\[96\]"),
            ("mlp.up_proj.weight_scale", torch.zeros(96), "holds 0.0; scales must be finite"),
            ("mlp.up_proj.weight_scale", torch.full((96,), torch.inf), "holds inf; scales"),
            ("input_layernorm.weight", torch.zeros(64, dtype=torch.int8), "must be bfloat16"),
            ("input_layernorm.weight", torch.full((64,), torch.nan), "holds NaN or infinity"),
        ],
    )
    def test_wrong_tensors(self, w8a16: Path, name: str, tensor: torch.Tensor, words: str) -> None:
        self._change(w8a16, **{f"model.layers.1.{name}": tensor})
        self._refused(w8a16, CheckpointError, words)

    def test_scales_of_a_tensor_that_are_several(self, fp8: Path) -> None:
        name = "model.layers.0.self_attn.q_proj.weight_scale"
        self._change(fp8, **{name: torch.ones(64)})
        self._refused(fp8, CheckpointError, rf"{name}.*has shape \[64\]; it must be of one value")

    def test_a_linear_that_is_not_quantised(self, w8a16: Path) -> None:
        self._describe(w8a16, exclude_modules=["lm_head", "model.layers.1.mlp*"])
        self._refused(w8a16, UnsupportedCheckpointError, "excludes model.layers.1.mlp.*_proj")

    def test_formats_that_are_not_implemented(self, w8a16: Path) -> None:
        for algo in ("NVFP4", "MIXED_PRECISION", "W8A8_SQ_PER_CHANNEL"):
            self._describe(w8a16, quant_algo=algo)
            self._refused(w8a16, UnsupportedCheckpointError, f"quant_algo '{algo}'")
        (w8a16 / "hf_quant_config.json").unlink()
        config = json.loads((w8a16 / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (w8a16 / "config.json").write_text(json.dumps(config))
        self._refused(w8a16, UnsupportedCheckpointError, "quantization_config of 'gptq'")

    @pytest.mark.parametrize(
        "settings", [{"quant": "fp8"}, {"kv_cache_dtype": "int8"}, {"checkpoint_format": "hf"}]
    )
    def test_another_quantisation_of_it(self, w8a16: Path, settings: dict[str, str]) -> None:
        (name,) = settings
        self._refused(w8a16, ConfigError, f"^{name} is .*quantised already \\(W8A16\\)", **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "'hf' with quant 'none'.*choose quant"),
        ({"kv_cache_dtype": "fp8"}, "'hf' with quant 'none'.*choose quant"),
        ({"quant": "int8_sq"}, "'hf' with W8A8_SQ_PER_CHANNEL.*one of W8A16, FP8"),
        ({"quant": "fp8", "kv_cache_dtype": "int8"}, "KV cache in INT8.*auto or fp8"),
        ({"quant": "fp8", "tp_size": 2}, "tp_size is 2; a Hugging Face checkpoint has no ranks"),
    ],
)
def test_what_nobody_could_read(
    settings: dict[str, Any], words: str, sources: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        convert(sources["llama"], tmp_path / "out", checkpoint_format="hf", **settings)
    assert not (tmp_path / "out").exists()
