"""What a build writes, against the checkpoint it was made from."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.build.native import build
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.config import BuildConfig
from llmserve.convert.converter import convert
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from llmserve.quantization import w8a16
from tests.models import make_llama
from tests.sharded import shard_checkpoint

_LINEARS = ("qkv.weight", "dense.weight", "fc.weight", "gate.weight", "proj.weight")
_QKV = "transformer.layers.0.attention.qkv.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "source"
    return make_llama(path, seed=5, dtype=torch.bfloat16, attention_bias=True)


@pytest.fixture
def w8a16_checkpoint(source: Path, tmp_path: Path) -> Path:
    return convert(source, tmp_path / "checkpoint", quant="w8a16")


def _rank(path: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(path / f"rank{rank}.safetensors")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("quant", ["none", "fp8_rowwise"])
def test_what_is_ready_is_copied(source: Path, tmp_path: Path, quant: str) -> None:
    checkpoint = convert(source, tmp_path / "checkpoint", quant=quant)
    engine = build(checkpoint, tmp_path / "engine")
    before, after = _rank(checkpoint), _rank(engine)
    assert before.keys() == after.keys()
    assert all(_equal(before[name], after[name]) for name in before)


def test_w8a16_is_quantised_here(w8a16_checkpoint: Path, tmp_path: Path) -> None:
    before, after = _rank(w8a16_checkpoint), _rank(build(w8a16_checkpoint, tmp_path / "engine"))
    for name, plain in before.items():
        if not name.endswith(_LINEARS):
            assert _equal(after.pop(name), plain), name
            continue
        expected = w8a16.quantize(plain)
        assert after[name].dtype == torch.int8
        assert _equal(after.pop(name), expected["weight"]), name
        scale = after.pop(name.replace("weight", "per_channel_scale"))
        assert _equal(scale, expected["per_channel_scale"]), name
    assert not after


@pytest.mark.parametrize(
    ("quant", "per_weight"), [("none", 1.0), ("w8a16", 0.5), ("fp8_rowwise", 0.5)]
)
def test_an_engine_is_half_as_large(tmp_path: Path, quant: str, per_weight: float) -> None:
    # Few tokens and wide layers, as in a real model: nearly all weights are linear.
    shape = {"vocab_size": 32, "hidden_size": 256, "intermediate_size": 1024}
    hf = make_llama(tmp_path / "hf", dtype=torch.float16, tokenizer=False, **shape)
    engine = build(convert(hf, tmp_path / "c", quant=quant), tmp_path / "engine")
    size = (engine / "rank0.safetensors").stat().st_size
    assert size / (hf / "model.safetensors").stat().st_size == pytest.approx(per_weight, abs=0.03)


def test_a_tied_head_is_stored_once(tmp_path: Path) -> None:
    hf = make_llama(tmp_path / "hf", tie_word_embeddings=True, tokenizer=False)
    engine = build(convert(hf, tmp_path / "c"), tmp_path / "engine")
    assert "lm_head.weight" not in _rank(engine)
    assert read_engine(engine)[0].share_embedding_table


def test_a_missing_head_means_tied_as_tensorrt_llm_takes_it(source: Path, tmp_path: Path) -> None:
    checkpoint = convert(source, tmp_path / "c")
    tensors = _rank(checkpoint)
    del tensors["lm_head.weight"]
    save_file(tensors, checkpoint / "rank0.safetensors")
    assert read_engine(build(checkpoint, tmp_path / "engine"))[0].share_embedding_table


def _edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            value = {**config[key], **value}
        config[key] = value
    (path / "config.json").write_text(json.dumps(config))


def test_every_rank_is_built_by_itself(w8a16_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shard_checkpoint(w8a16_checkpoint, tmp_path / "ranks", 2)
    engine = build(checkpoint, tmp_path / "engine")
    assert read_engine(engine)[0].tp_size == 2
    for rank in range(2):
        before, after = _rank(checkpoint, rank), _rank(engine, rank)
        for name, plain in before.items():
            expected = {"weight": plain}
            if name.endswith(_LINEARS):
                # The columns of a rank have scales of their own, as at TensorRT-LLM's load.
                expected = w8a16.quantize(plain)
            for suffix, tensor in expected.items():
                stored = name if name.endswith(".bias") else name.replace("weight", suffix)
                assert _equal(after.pop(stored), tensor), stored
        assert not after
    names = sorted(path.name for path in engine.glob("rank*"))
    assert names == ["rank0.safetensors", "rank1.safetensors"]


def test_a_rank_that_does_not_fit_is_named(w8a16_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shard_checkpoint(w8a16_checkpoint, tmp_path / "ranks", 2)
    _edit_config(checkpoint, mapping={"world_size": 4, "tp_size": 4})
    _refused(checkpoint, CheckpointError, r"rank2\.safetensors: the weights of rank 2 of 4")
    _edit_config(checkpoint, mapping={"world_size": 3, "tp_size": 3})
    _refused(checkpoint, CheckpointError, "tp_size is 3; it must divide num_attention_heads, 4")
    _edit_config(checkpoint, mapping={"world_size": 2, "tp_size": 2})
    shutil.copy(w8a16_checkpoint / "rank0.safetensors", checkpoint / "rank1.safetensors")
    sizes = r"is bfloat16 \[320, 64\]; by config\.json it is bfloat16 \[160, 64\]"
    _refused(checkpoint, CheckpointError, rf"vocab_embedding\.weight in .*rank1\.\S+ {sizes}")


def test_excluded_modules_stay_plain(w8a16_checkpoint: Path, tmp_path: Path) -> None:
    _edit_config(w8a16_checkpoint, quantization={"exclude_modules": ["*.0.attention.qkv"]})
    after = _rank(build(w8a16_checkpoint, tmp_path / "engine"))
    assert after[_QKV].dtype == torch.bfloat16
    assert after[_QKV.replace("layers.0", "layers.1")].dtype == torch.int8
    # Not in the list, which replaces the defaults; the head and the embedding still stay plain.
    assert after["lm_head.weight"].dtype == torch.bfloat16
    assert after["transformer.vocab_embedding.weight"].dtype == torch.bfloat16


def test_limits_are_written(w8a16_checkpoint: Path, tmp_path: Path) -> None:
    limits = BuildConfig(max_batch_size=4, max_num_tokens=64, tokens_per_block=16)
    config, written = read_engine(build(w8a16_checkpoint, tmp_path / "engine", limits))
    assert written == BuildConfig(
        max_batch_size=4, max_num_tokens=64, max_seq_len=512, tokens_per_block=16
    )
    assert config.quantization.quant_algo == "W8A16"
    assert json.loads((tmp_path / "engine" / "config.json").read_text())["backend"] == "native"


def test_max_seq_len_beyond_the_model_is_refused(w8a16_checkpoint: Path, tmp_path: Path) -> None:
    build(w8a16_checkpoint, tmp_path / "engine", BuildConfig(max_seq_len=512))
    with pytest.raises(ConfigError, match=r"max_seq_len is 513; .* 512"):
        build(w8a16_checkpoint, tmp_path / "engine2", BuildConfig(max_seq_len=513))
    assert not (tmp_path / "engine2").exists()


def test_tokenizer_files_travel_along(w8a16_checkpoint: Path, tmp_path: Path) -> None:
    engine = build(w8a16_checkpoint, tmp_path / "engine")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (engine / name).read_bytes() == (w8a16_checkpoint / name).read_bytes()


def _refused(checkpoint: Path, error: type[Exception], words: str) -> None:
    engine = checkpoint.parent / "refused"
    with pytest.raises(error, match=words):
        build(checkpoint, engine)
    assert not engine.exists()
    assert not list(checkpoint.parent.glob(".refused*"))


def test_damaged_checkpoints_are_named(w8a16_checkpoint: Path, source: Path) -> None:
    path = w8a16_checkpoint / "rank0.safetensors"
    whole = _rank(w8a16_checkpoint)
    without = {name: tensor for name, tensor in whole.items() if name != _QKV}

    save_file(without, path)
    _refused(w8a16_checkpoint, CheckpointError, f"lacks the tensor {_QKV}")
    save_file({**whole, "transformer.more": torch.ones(1)}, path)
    _refused(w8a16_checkpoint, CheckpointError, r"the tensor transformer\.more")
    save_file({**without, _QKV: torch.ones(3, 3)}, path)
    _refused(w8a16_checkpoint, CheckpointError, rf"{_QKV} .* float32 \[3, 3\]")
    # convert_checkpoint.py's own int8, interleaved for one GPU generation.
    save_file({**without, _QKV: torch.ones(64, 128, dtype=torch.int8)}, path)
    _refused(w8a16_checkpoint, UnsupportedCheckpointError, f"{_QKV} .* int8 already")
    nan = whole[_QKV].clone()
    nan[3, 3] = float("nan")
    save_file({**without, _QKV: nan}, path)
    _refused(w8a16_checkpoint, CheckpointError, f"{_QKV}: .*row 3 .*NaN")
    path.write_bytes(path.read_bytes()[:-1])
    _refused(w8a16_checkpoint, CheckpointError, "cut short")
    path.unlink()
    _refused(w8a16_checkpoint, CheckpointError, "no file .*rank0")


def test_other_artefacts_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="llmserve convert"):
        build(source, tmp_path / "engine")
    engine = build(convert(source, tmp_path / "checkpoint"), tmp_path / "engine")
    with pytest.raises(CheckpointError, match="but an engine"):
        build(engine, tmp_path / "engine2")
