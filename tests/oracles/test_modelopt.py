"""Our checkpoints against those of nvidia-modelopt, NVIDIA's own quantiser: byte for byte.

modelopt needs transformers below 5, so it lives in a virtual environment of its own,
``.venv-modelopt`` in the repository's root, which the first run makes (about 1 GB, with torch).
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmserve.build.native import build
from llmserve.convert.converter import convert
from tests.models import LINEAR_ROPE, LLAMA3_ROPE, make_llama

_ROOT = Path(__file__).parents[2]
_VENV = _ROOT / ".venv-modelopt"
_REQUIREMENTS = (
    *("nvidia-modelopt==0.47.0", "torch==2.13.0", "transformers>=4.57,<5", "safetensors"),
)
_VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mqa_wide_heads": {"num_key_value_heads": 1, "head_dim": 32},
    "tied_llama3_rope_odd_vocab": {
        "tie_word_embeddings": True,
        "rope_scaling": LLAMA3_ROPE,
        "vocab_size": 321,
    },
    "mha_attention_bias_linear_rope": {
        "num_key_value_heads": 4,
        "attention_bias": True,
        "rope_scaling": LINEAR_ROPE,
    },
    "mlp_bias": {"mlp_bias": True},
}
_CASES = list(itertools.product(_VARIANTS, ("none", "fp8_rowwise"), ("bfloat16", "float16")))
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
    for name, overrides in _VARIANTS.items():
        paths[name] = make_llama(root / name, seed=5, dtype=torch.bfloat16, **overrides)
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
) -> dict[tuple[str, str, str], Path]:
    """What modelopt makes of every case, in one process: it takes seconds to import."""
    root = tmp_path_factory.mktemp("modelopt")
    outs = {case: root / "-".join(case) for case in _CASES}
    jobs = [
        {"source": str(sources[name]), "out": str(out), "quant": quant, "dtype": dtype}
        for (name, quant, dtype), out in outs.items()
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


@pytest.mark.parametrize("case", _CASES, ids="-".join)
def test_a_checkpoint_is_modelopts(
    case: tuple[str, str, str],
    sources: dict[str, Path],
    exports: dict[tuple[str, str, str], Path],
    tmp_path: Path,
) -> None:
    name, quant, dtype = case
    out = convert(sources[name], tmp_path / "out", quant=quant, dtype=dtype)  # type: ignore[arg-type]

    ours = load_file(out / "rank0.safetensors")
    theirs = load_file(exports[case] / "rank0.safetensors")
    if name.startswith("tied"):
        # TensorRT-LLM takes the embedding where there is no lm_head.
        assert torch.equal(theirs.pop("lm_head.weight"), ours["transformer.vocab_embedding.weight"])
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key].shape, ours[key].dtype) == (tensor.shape, tensor.dtype), key
        assert _bytes(ours[key]) == _bytes(tensor), key

    our_config = json.loads((out / "config.json").read_text())
    their_config = json.loads((exports[case] / "config.json").read_text())
    assert their_config["bias"] == our_config["attn_bias"]
    described = their_config.keys() - _ITS_OWN_WAY
    assert described >= {"architecture", "dtype", "head_size", "norm_epsilon", "rotary_base"}
    assert {key: our_config[key] for key in described} == {
        key: their_config[key] for key in described
    }
    assert our_config["mapping"].items() >= their_config["mapping"].items()
    for key in ("quant_algo", "kv_cache_quant_algo"):
        assert our_config["quantization"][key] == their_config["quantization"][key]


@pytest.mark.parametrize("quant", ["none", "fp8_rowwise"])
def test_an_engine_is_built_from_modelopts_checkpoint(
    quant: str, sources: dict[str, Path], exports: dict[tuple[str, str, str], Path], tmp_path: Path
) -> None:
    ours = build(convert(sources["gqa"], tmp_path / "c", quant=quant), tmp_path / "ours")
    theirs = build(exports["gqa", quant, "bfloat16"], tmp_path / "theirs")
    file = "rank0.safetensors"
    assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
