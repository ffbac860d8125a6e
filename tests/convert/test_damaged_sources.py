"""Sources that are not whole, and outputs that cannot be: one sentence each, and nothing left."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.checkpoint.writer import StreamingWriter
from llmserve.convert.converter import convert
from llmserve.errors import CheckpointError, CheckpointNotFoundError, UnsupportedCheckpointError
from tests.models import make_llama

_QKV = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "hf", max_shard_size="60KB", tokenizer=False)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "hf", tokenizer=False)


def _refused(source: Path, error: type[Exception], words: str) -> None:
    out = source.parent / "out"
    with pytest.raises(error, match=words) as caught:
        convert(source, out, quant="fp8_rowwise")
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not list(source.parent.glob(".out*"))


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", CheckpointNotFoundError, "no directory .*nothing")


def test_a_file_instead_of_its_directory(single: Path) -> None:
    _refused(single / "model.safetensors", CheckpointError, "give the directory")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe{\x00}\x00", b"[]", b"[" * 100_000])
def test_a_config_that_is_no_json_object(single: Path, content: bytes) -> None:
    (single / "config.json").write_bytes(content)
    _refused(single, CheckpointError, r"config\.json (cannot be read as JSON|holds no JSON object)")


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[2]
    shard.unlink()
    _refused(sharded, CheckpointNotFoundError, f"{shard.name}.*download it again")


def test_a_truncated_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    _refused(sharded, CheckpointError, f"{shard.name} is cut short.*download it again")


def test_a_missing_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    _refused(sharded, CheckpointNotFoundError, "no model.safetensors.index.json")


def test_an_index_that_disagrees_with_its_shards(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shard = index["weight_map"].pop(_QKV)
    path.write_text(json.dumps(index))
    _refused(sharded, CheckpointError, f"{_QKV} is not in the index")
    index["weight_map"] |= {_QKV: shard, "model.more.weight": shard}
    path.write_text(json.dumps(index))
    _refused(sharded, CheckpointError, "model.more.weight is not in it")
    path.write_text('{"weight_map": 5}')
    _refused(sharded, CheckpointError, "no weight_map")


def test_pickles(single: Path) -> None:
    (single / "model.safetensors").rename(single / "pytorch_model.bin")
    _refused(single, UnsupportedCheckpointError, "pickles .*save_pretrained")


def test_no_weights_at_all(single: Path) -> None:
    (single / "model.safetensors").unlink()
    _refused(single, CheckpointNotFoundError, "no weights to read")


def _with(single: Path, **tensors: torch.Tensor | None) -> None:
    state = load_file(single / "model.safetensors")
    for name, tensor in tensors.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, single / "model.safetensors")


def test_a_missing_tensor(single: Path) -> None:
    _with(single, **{_QKV: None})
    _refused(single, CheckpointError, f"lacks the tensor {_QKV}")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "no place"),
        ("model.layers.0.self_attn.q_proj.bias", "attention_bias"),
        ("model.layers.2.input_layernorm.weight", "num_hidden_layers 2"),
    ],
)
def test_a_tensor_left_over(single: Path, name: str, why: str) -> None:
    _with(single, **{name: torch.ones(64)})
    _refused(single, CheckpointError, f"{name} left over: .*{why}")


def test_a_tensor_of_the_wrong_shape(single: Path) -> None:
    # q 48 and k 48 rows sum up to what q 64 and k 32 do, and are still wrong.
    _with(
        single,
        **{
            "model.layers.1.self_attn.q_proj.weight": torch.ones(48, 64),
            _QKV: torch.ones(48, 64),
        },
    )
    _refused(single, CheckpointError, r"q_proj.weight .* shape \[48, 64\].*\[64, 64\]")


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_a_tensor_that_is_quantised_already(single: Path, dtype: str) -> None:
    _with(single, **{_QKV: torch.ones(32, 64).to(getattr(torch, dtype))})
    _refused(single, UnsupportedCheckpointError, f"{_QKV} .*{dtype}.*floating point")


def test_shards_in_odd_order_and_a_tensor_of_another_dtype(single: Path, tmp_path: Path) -> None:
    """What is where, and in which float, does not matter: values and names do."""
    plain = load_file(single / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    plain[name] = plain[name].double()
    other = tmp_path / "odd"
    other.mkdir()
    (other / "config.json").write_bytes((single / "config.json").read_bytes())
    # q, k and v in files of their own, against the order of layers and of the alphabet.
    where = {name: f"model-{(i * 7) % 5}.safetensors" for i, name in enumerate(reversed(plain))}
    for file in sorted(set(where.values()), reverse=True):
        chosen = {name: plain[name] for name in where if where[name] == file}
        save_file(chosen, other / file)
    index = {"weight_map": where}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    for quant in ("none", "fp8_rowwise"):
        files = [
            convert(source, tmp_path / f"{source.name}-{quant}", quant=quant) / "rank0.safetensors"
            for source in (single, other)
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", [_QKV, "model.norm.weight", "model.embed_tokens.weight"])
def test_nan_and_infinity(single: Path, name: str, value: float) -> None:
    tensor = load_file(single / "model.safetensors")[name]
    tensor.view(-1)[7] = value
    _with(single, **{name: tensor})
    _refused(single, CheckpointError, f"{name} .*NaN or infinity")


def test_a_disk_that_runs_full_on_the_way(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append, written = StreamingWriter.append, 0

    def full(self: StreamingWriter, name: str, values: torch.Tensor) -> None:
        nonlocal written
        written += 1
        if written > 5:
            raise OSError(28, "No space left on device")
        append(self, name, values)

    monkeypatch.setattr(StreamingWriter, "append", full)
    _refused(single, CheckpointError, "disk is full; free some space")
    assert written > 5


def test_the_kernel_refuses_to_write_on(single: Path) -> None:
    out = single.parent / "out"
    limit = 64 * 1024
    command = [sys.executable, "-m", "llmserve", "convert", str(single), str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"llmserve: error: {out} cannot be written: the file size limit")
    assert "Traceback" not in done.stderr
    assert [file.name for file in single.parent.iterdir()] == ["hf"]


def test_an_output_that_exists_is_kept(single: Path) -> None:
    out = single.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already; remove it"):
        convert(single, out)
    assert [file.name for file in out.iterdir()] == ["notes.txt"]
