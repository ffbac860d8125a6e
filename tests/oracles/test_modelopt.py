"""Our checkpoints against those of nvidia-modelopt, NVIDIA's own quantiser: byte for byte.

modelopt needs transformers below 5, so it lives in a virtual environment of its own,
``.venv-modelopt`` in the repository's root, which the first run makes (about 1 GB, with torch).
"""

import itertools
import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from llmserve.build.native import build
from llmserve.config import CalibrationConfig
from llmserve.convert.converter import convert
from tests.models import LINEAR_ROPE, LLAMA3_ROPE, make_model

_ROOT = Path(__file__).parents[2]
_VENV = _ROOT / ".venv-modelopt"
_REQUIREMENTS = (
    *("nvidia-modelopt==0.47.0", "torch==2.13.0", "transformers>=4.57,<5", "safetensors"),
)
# By name: the family, modelopt's name for its decoder, what differs from its model in tests.models.
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", {}),
    "mistral": ("mistral", "llama", {}),
    "mixtral": ("mixtral", "llama", {}),
    "qwen2": ("qwen2", "qwen", {}),
    "qwen3": ("qwen3", "qwen", {}),
    "gemma": ("gemma", "gemma", {}),
    "mqa_wide_heads": ("llama", "llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "tied_llama3_rope_odd_vocab": (
        *("llama", "llama"),
        {"tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE, "vocab_size": 321},
    ),
    "mha_attention_bias_linear_rope": (
        *("llama", "llama"),
        {"num_key_value_heads": 4, "attention_bias": True, "rope_scaling": LINEAR_ROPE},
    ),
    "mlp_bias": ("llama", "llama", {"mlp_bias": True}),
}
_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma")
# How weights and the KV cache are quantised.
_QUANTS = (
    *(("none", "auto"), ("fp8", "auto"), ("fp8", "fp8"), ("fp8_rowwise", "auto")),
    *(("int8_sq", "auto"), ("none", "int8")),
)
_CALIBRATED = ("fp8", "int8_sq")


class _Case(NamedTuple):
    model: str
    quant: str
    kv_cache: str
    dtype: str
    tp: int
    alpha: float = 1.0  # modelopt's own for SmoothQuant

    def __str__(self) -> str:
        return "-".join(map(str, self))


# modelopt fails to export a mixture in FP8 rowwise and with SmoothQuant.
_CASES = [
    _Case(name, quant, kv_cache, "float16" if tp == 1 else "bfloat16", tp)
    for name, (quant, kv_cache), tp in itertools.product(_FAMILIES, _QUANTS, (1, 2))
    if name != "mixtral" or quant in ("none", "fp8")
]
_CASES += [
    _Case(name, quant, "auto", dtype, 1)
    for name in _MODELS
    for quant, dtype in itertools.product(("none", "fp8_rowwise"), ("bfloat16", "float16"))
    if name == "llama" or name not in _FAMILIES
    if (name, quant, "auto", dtype, 1, 1.0) not in _CASES
]
_CASES.append(_Case("llama", "int8_sq", "auto", "bfloat16", 1, 0.5))
# Without TensorRT-LLM beside it, modelopt writes its own description of the decoder, and these
# keys its own way: attn_bias as `bias`; logits in half precision; the embedding split over ranks,
# of which there is one; an lm_head of its own for a tied model.
_ITS_OWN_WAY = {
    *("producer", "bias", "decoder", "rank", "rmsnorm", "lm_head_bias", "residual_mlp"),
    *("rotary_pct", "logits_dtype", "use_parallel_embedding", "share_embedding_table"),
    *("mapping", "quantization"),
}

pytestmark = pytest.mark.full


@pytest.fixture(scope="session")
def modelopt_python() -> Path:
    """The Python that has modelopt; made once and kept."""
    python = _VENV / "bin" / "python"
    # Written last: an environment that was interrupted in the making lacks it, or has another.
    stamp, wanted = _VENV / "requirements.txt", "\n".join(_REQUIREMENTS)
    if not stamp.is_file() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(_VENV)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", *_REQUIREMENTS]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no output").splitlines()[-1]
            pytest.skip(f"pip cannot install nvidia-modelopt: {last}")
        stamp.write_text(wanted)
    return python


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    paths = {}
    for name, (family, _, overrides) in _MODELS.items():
        paths[name] = make_model(root / name, family, seed=5, dtype=torch.bfloat16, **overrides)
        _describe_as_transformers_4_does(paths[name] / "config.json")
    return paths


def _describe_as_transformers_4_does(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def exports(
    modelopt_python: Path, sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[_Case, Path]:
    """What modelopt makes of every case, in one process: it takes seconds to import."""
    root = tmp_path_factory.mktemp("modelopt")
    outs = {case: root / str(case) for case in _CASES}
    jobs = [
        case._asdict()
        | {"source": str(sources[case.model]), "out": str(out), "seed": 1}
        | {"decoder_type": _MODELS[case.model][1]}
        for case, out in outs.items()
    ]
    script = Path(__file__).with_name("modelopt_export.py")
    done = subprocess.run(
        [str(modelopt_python), str(script)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return outs


def _convert(case: _Case, source: Path, export: Path, out: Path) -> Path:
    """Our checkpoint, made with the ranges of activations that modelopt found."""
    calibrated = case.quant in _CALIBRATED or case.kv_cache != "auto"
    ranges = export / "activation_ranges.safetensors"
    return convert(
        source,
        out,
        calibration=CalibrationConfig(path=ranges) if calibrated else None,
        quant=case.quant,
        kv_cache_dtype=case.kv_cache,
        dtype=case.dtype,
        tp_size=case.tp,
        **({"smoothquant_val": case.alpha} if case.quant == "int8_sq" else {}),
    )


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_a_checkpoint_is_modelopts(
    case: _Case, sources: dict[str, Path], exports: dict[_Case, Path], tmp_path: Path
) -> None:
    out = _convert(case, sources[case.model], exports[case], tmp_path / "out")
    for rank in range(case.tp):
        ours = load_file(out / f"rank{rank}.safetensors")
        theirs = load_file(exports[case] / f"rank{rank}.safetensors")
        if case.model.startswith("tied"):
            # TensorRT-LLM takes the embedding where there is no lm_head.
            lm_head = theirs.pop("lm_head.weight")
            assert torch.equal(lm_head, ours["transformer.vocab_embedding.weight"])
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
            if case.alpha < 1 and ".qkv." in key:
                continue  # modelopt takes the mean of q's, k's and v's factors
            assert _bytes(ours[key]) == _bytes(tensor), key
    our_config = json.loads((out / "config.json").read_text())
    _check_config(our_config, json.loads((exports[case] / "config.json").read_text()))


def _check_config(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if not ours["architecture"].startswith("Qwen"):
        assert theirs["bias"] == ours["attn_bias"]
    described = theirs.keys() - _ITS_OWN_WAY
    assert described >= {"architecture", "dtype", "head_size", "norm_epsilon", "rotary_base"}
    assert {key: ours[key] for key in described} == {key: theirs[key] for key in described}
    if theirs["mapping"]["tp_size"] > 1:
        assert ours["use_parallel_embedding"] == theirs["use_parallel_embedding"]
    experts = ("moe_tp_size", "moe_ep_size")  # by default tp_size and 1, as here
    assert [theirs["mapping"].pop(key, None) for key in experts] in (
        [None, None],
        [ours["mapping"]["tp_size"], 1],
    )
    assert ours["mapping"].items() >= theirs["mapping"].items()
    our_quantization, their_quantization = ours["quantization"], theirs["quantization"]
    for key in ("quant_algo", "kv_cache_quant_algo"):
        assert our_quantization[key] == their_quantization[key]
    # What it leaves alone by name, we leave alone by pattern.
    for excluded in their_quantization.get("exclude_modules") or ():
        patterns = our_quantization["exclude_modules"] or ["*lm_head"]
        assert any(fnmatchcase(excluded, pattern) for pattern in patterns), excluded


@pytest.mark.parametrize("quant", ["none", "fp8", "fp8_rowwise", "int8_sq"])
def test_an_engine_is_built_from_modelopts_checkpoint(
    quant: str, sources: dict[str, Path], exports: dict[_Case, Path], tmp_path: Path
) -> None:
    case = _Case("llama", quant, "auto", "float16", 1)
    converted = _convert(case, sources["llama"], exports[case], tmp_path / "c")
    ours = build(converted, tmp_path / "ours")
    theirs = build(exports[case], tmp_path / "theirs")
    file = "rank0.safetensors"
    assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
