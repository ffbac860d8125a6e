from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmserve import cli
from tests.models import make_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "tiny", dtype=torch.bfloat16)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_inspect_counts_what_is_on_disk(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", str(source), "--json", "--tensors")
    told, on_disk = json.loads(out), load_file(source / "model.safetensors")
    assert code == 0
    assert told["kind"] == "huggingface"
    assert told["num_parameters"] == sum(tensor.numel() for tensor in on_disk.values())
    assert told["stored_bytes"] == sum(tensor.nbytes for tensor in on_disk.values())
    assert {t["name"]: (t["dtype"], t["shape"]) for t in told["tensors"]} == {
        name: (str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        for name, tensor in on_disk.items()
    }


def test_inspect_follows_a_model_through_all_artefacts(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, engine = str(tmp_path / "c"), str(tmp_path / "e")
    assert cli.main(["convert", str(source), checkpoint, "--quant", "w8a16"]) == 0
    assert cli.main(["build", checkpoint, engine, "--max-seq-len", "64"]) == 0
    capsys.readouterr()
    described = [
        run(capsys, "inspect", str(path), "--json")[1] for path in (source, checkpoint, engine)
    ]
    kinds = [json.loads(text)["kind"] for text in described]
    assert kinds == ["huggingface", "checkpoint", "engine"]
    assert len({json.loads(text)["num_parameters"] for text in described}) == 1
    _, out, _ = run(capsys, "inspect", engine, "--tensors", "*.layers.0.mlp.fc.*")
    assert "W8A16" in out
    assert "64 tokens a request" in out
    assert out.count("mlp.fc") == 2  # the weight and its scales
    assert "int8 [96, 64]" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inspect", "nowhere"], "no directory nowhere"),
        (["inspect", "{source}", "--tensors", "nothing*"], "'nothing*' matches none"),
        (
            ["plan", "{source}", "--memory", "1GiB", "--max-seq-len", "4096"],
            "max_seq_len is 4096; it must be at most the model's max_position_embeddings, 512",
        ),
        (["plan", "{source}", "--memory", "1GiB", "--tp", "0"], "tp_size is 0; it must be at"),
        (["plan", "{checkpoint}", "--memory", "1GiB", "--quant", "w8a16"], "--quant is given, but"),
        (["plan", "{checkpoint}", "--memory", "1GiB", "--tp", "2"], "--tp is given, but"),
        (["plan", "{source}", "--memory", "1GiB", "--tp", "3"], "tp_size is 3; it must divide"),
    ],
)
def test_what_cannot_be_told_is_one_line(
    argv: list[str],
    words: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "{checkpoint}" in argv:
        cli.main(["convert", str(source), str(tmp_path / "c")])
        capsys.readouterr()
    filled = [arg.format(source=source, checkpoint=tmp_path / "c") for arg in argv]
    code, out, err = run(capsys, *filled)
    assert (code, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


def test_plan_says_whether_it_fits(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--max-num-tokens", "64", "--max-batch-size", "4"]
    code, out, _ = run(capsys, "plan", str(source), "--memory", "1GiB", *small)
    assert code == 0
    assert "fits: " in out
    code, out, _ = run(capsys, "plan", str(source), "--memory", "1GiB", *small, "--json")
    told = json.loads(out)
    # Two layers of K and V, 2 heads of 16 elements, 2 bytes each.
    assert told["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    code, out, _ = run(capsys, "plan", str(source), "--memory", "100MiB", *small)
    assert code == 1
    assert "does not fit: one request of 512 tokens needs" in out


def test_two_ranks_hold_half_of_the_linears(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*more: str) -> dict[str, int]:
        _, out, _ = run(capsys, "plan", str(source), "--memory", "1GiB", "--json", *more)
        parsed: dict[str, int] = json.loads(out)
        return parsed

    one, two = told(), told("--tp", "2")
    assert two["kv_bytes_per_token"] * 2 == one["kv_bytes_per_token"]
    assert 0.5 * one["weights_bytes"] < two["weights_bytes"] < 0.51 * one["weights_bytes"]
