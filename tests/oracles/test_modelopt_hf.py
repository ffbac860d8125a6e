"""Our quantised Hugging Face checkpoints against nvidia-modelopt's: byte for byte.

On purpose they differ in these, and each is checked here for being just that:

- FP8: modelopt gives q, k, v and gate, up a scale each, and every reader has to bring them to one
  and round again; ours have one from the start. It also rounds the quotient to the model's dtype
  before it rounds to e4m3, of an fp16 or bf16 model; ours is rounded once.
- W8A16: modelopt divides by 127, TensorRT-LLM's own quantiser and ours by 128.
- Experts with a scale a row: modelopt gives row i of gate and row i of up the larger of their
  scales; ours have their own.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from llmserve.build.native import build
from llmserve.checkpoint.decoder_tensors import layer_linears, layer_prefix
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.config import CalibrationConfig, ConvertConfig
from llmserve.convert.artifact import open_artifact
from llmserve.convert.calibrate import ActivationRanges
from llmserve.convert.converter import convert
from llmserve.convert.quality import measure
from llmserve.convert.samples import Samples
from llmserve.convert.target_config import target_config
from tests.models import VOCAB_SIZE, make_model
from tests.oracles.test_modelopt import modelopt_python  # noqa: F401 - a fixture

_CONFIGS = {
    "w8a16": "INT8_WEIGHT_ONLY_CFG",
    "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8": "FP8_DEFAULT_CFG",
}
_MODULES = {
    "attention.qkv": r"self_attn\.q_proj",
    "attention.dense": r"self_attn\.o_proj",
    "mlp.fc": r"(mlp\.gate_proj|experts\.\d+\.w1)",
    "mlp.gate": r"mlp\.up_proj",
    "mlp.proj": r"(mlp\.down_proj|experts\.\d+\.w2)",
}

pytestmark = pytest.mark.full


class Case(NamedTuple):
    """An export of modelopt's."""

    family: str
    quant: str
    dtype: str
    one_scale: bool = False

    @property
    def id(self) -> str:
        return "-".join([self.family, self.quant, self.dtype, *["one_scale"] * self.one_scale])


_FAMILIES = ("llama", "qwen3", "mixtral", "gemma")
_CASES = [
    *(Case(family, quant, "bfloat16") for family in _FAMILIES for quant in _CONFIGS),
    *(
        Case(family, "fp8", dtype, True)
        for family in _FAMILIES
        for dtype in ("float32", "bfloat16")
    ),
]
Tensors = dict[str, torch.Tensor]


def _ids(case: Case) -> str:
    return case.id


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("hf")
    paths = {}
    for family, _, dtype, _ in _CASES:
        path = root / f"{family}-{dtype}"
        if not path.exists():
            make_model(path, family, seed=5, dtype=getattr(torch, dtype))
            config = json.loads((path / "config.json").read_text())
            rope = config.pop("rope_parameters")  # as transformers 4 has it
            config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
            (path / "config.json").write_text(json.dumps(config))
        paths[family, dtype] = path
    return paths


@pytest.fixture(scope="module")
def exports(
    modelopt_python: Path,  # noqa: F811
    sources: dict[tuple[str, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[Case, Path]:
    root = tmp_path_factory.mktemp("modelopt")
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB_SIZE, (3, 40), generator=generator).tolist()
    jobs = [
        {
            "source": str(sources[case.family, case.dtype]),
            "out": str(root / case.id),
            "ranges": str(root / f"{case.id}.json"),
            "config": _CONFIGS[case.quant],
            "fp8_kv": case.quant == "fp8",
            "one_scale": case.one_scale,
            "tokens": tokens,
        }
        for case in _CASES
    ]
    script = Path(__file__).with_name("modelopt_hf_export.py")
    done = subprocess.run(
        [str(modelopt_python), str(script)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {case: root / case.id for case in _CASES}


def _settings(source: Path, export: Path, quant: str) -> dict[str, Any]:
    """Of a conversion with modelopt's ranges of activations."""
    if quant != "fp8":
        return {"quant": quant}
    found = json.loads(export.with_name(f"{export.name}.json").read_text())
    with HuggingFaceCheckpoint(source) as checkpoint:
        config = target_config(checkpoint, ConvertConfig())
    layers = range(config.num_hidden_layers)
    inputs = {}
    for layer in layers:
        for name, linear in layer_linears(config).items():
            pattern = rf"model\.layers\.{layer}\.(\w+\.)?{_MODULES[name]}\.input_quantizer"
            amax = max(value for key, value in found.items() if re.fullmatch(pattern, key))
            inputs[f"{layer_prefix(layer)}.{name}"] = torch.full(linear.weight[-1:], amax)
    keys, values = (
        torch.tensor([found[f"model.layers.{i}.self_attn.{x}_bmm_quantizer"] for i in layers])
        for x in "kv"
    )
    file = export.with_name(f"{export.name}.safetensors")
    ActivationRanges(inputs, keys, values, torch.ones(len(layers), 3)).save(file)
    calibration = CalibrationConfig(path=file)
    return {"quant": "fp8", "kv_cache_dtype": "fp8", "calibration": calibration}


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _differ(ours: Tensors, theirs: Tensors) -> set[str]:
    """Names of tensors with other bytes; names, shapes and dtypes are the same."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (tensor.shape, tensor.dtype), name
    return {name for name in ours if _bytes(ours[name]) != _bytes(theirs[name])}


@pytest.mark.parametrize("case", _CASES, ids=_ids)
def test_an_export_is_modelopts(
    case: Case,
    sources: dict[tuple[str, str], Path],
    exports: dict[Case, Path],
    tmp_path: Path,
) -> None:
    source, export = sources[case.family, case.dtype], exports[case]
    settings = _settings(source, export, case.quant)
    out = convert(source, tmp_path / "out", checkpoint_format="hf", **settings)
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, export))
    differ = _differ(ours, theirs)
    plain = load_file(source / "model.safetensors")
    linears = {name for name, tensor in ours.items() if tensor.dtype.itemsize == 1}
    scale_of = {name: name.replace(".weight", ".weight_scale") for name in linears}
    assert len(linears) >= 14
    if case.quant == "w8a16":
        gates_and_ups = {n for n in linears if re.search(r"experts\.\d+\.w[13]\.", n)}
        for name in linears - gates_and_ups:
            scale = plain[name].float().abs().amax(1) / 127
            assert torch.equal(theirs[scale_of[name]], scale)
            torch.testing.assert_close(ours[scale_of[name]] * 128 / 127, scale, rtol=1e-6, atol=0)
            steps = (ours[name].int() - theirs[name].int()).abs()
            assert steps.max() <= 1
        assert differ == linears | set(scale_of.values())
    elif case.quant == "fp8_rowwise":
        gates_and_ups = {n for n in linears if re.search(r"experts\.\d+\.w[13]\.", n)}
        assert differ == gates_and_ups | {scale_of[name] for name in gates_and_ups}
        for name in gates_and_ups:
            gate, up = (ours[scale_of[re.sub(r"w[13]", w, name)]] for w in ("w1", "w3"))
            assert torch.equal(theirs[scale_of[name]], torch.maximum(gate, up))
    elif case.one_scale and case.dtype == "float32":
        assert not differ
    elif case.one_scale:
        assert differ <= linears
        for name in linears:
            quotient = plain[name].float() / theirs[scale_of[name]]
            assert _bytes(ours[name]) == _bytes(quotient.to(torch.float8_e4m3fn))
            assert _bytes(theirs[name]) == _bytes(quotient.bfloat16().to(torch.float8_e4m3fn))
    else:
        fused = r"\.(q_proj|k_proj|v_proj|gate_proj|up_proj)\.weight(_scale)?$"
        scales = differ - linears
        assert all(re.search(fused, name) for name in scales)
        for name in scales:
            assert ours[name] >= theirs[name]

    described, wanted = (
        json.loads((path / "hf_quant_config.json").read_text()) for path in (out, export)
    )
    assert described["quantization"] == wanted["quantization"]
    config, wanted = (json.loads((path / "config.json").read_text()) for path in (out, export))
    config["quantization_config"].pop("producer")
    wanted["quantization_config"].pop("producer")
    both = (config.keys() & wanted.keys()) - {"transformers_version"}
    assert "quantization_config" in both
    assert {key: config[key] for key in both} == {key: wanted[key] for key in both}


@pytest.mark.parametrize("case", _CASES, ids=_ids)
def test_modelopts_export_is_served(
    case: Case,
    sources: dict[tuple[str, str], Path],
    exports: dict[Case, Path],
    tmp_path: Path,
) -> None:
    """As an engine of what modelopt says, and as good as our own conversion."""
    source, export = sources[case.family, case.dtype], exports[case]
    served = build(convert(export, tmp_path / "theirs"), tmp_path / "theirs_engine")
    settings = _settings(source, export, case.quant)
    own = build(convert(source, tmp_path / "ours", **settings), tmp_path / "ours_engine")
    theirs, ours = (load_file(path / "rank0.safetensors") for path in (served, own))
    differ = _differ(ours, theirs)
    if case.one_scale and case.dtype == "float32":
        assert not differ
    if case.quant == "fp8_rowwise" and case.family != "mixtral":
        assert not differ
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB_SIZE, (4, 40), generator=generator).tolist()
    samples = Samples("random", tuple(map(tuple, tokens)))
    with (
        open_artifact(source) as plain,
        open_artifact(export) as read,
        open_artifact(served) as engine,
        open_artifact(own) as converted,
    ):
        as_read = measure(plain, read, samples, device="cpu")
        as_engine = measure(plain, engine, samples, device="cpu")
        as_ours = measure(plain, converted, samples, device="cpu")
    print(case.id, as_engine, as_ours)
    assert as_read.mean_kl == as_engine.mean_kl
    assert as_engine.mean_kl < 2 * as_ours.mean_kl + 1e-6
    assert as_ours.mean_kl < 2 * as_engine.mean_kl + 1e-6
