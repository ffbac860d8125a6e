import importlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmserve import cli
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.cli.progress import ProgressReport
from llmserve.config import BuildConfig
from tests.models import make_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "tiny", dtype=torch.bfloat16)


def test_from_source_to_engine(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, engine = str(tmp_path / "c"), str(tmp_path / "e")
    assert cli.main(["convert", str(source), checkpoint, "--quant", "w8a16"]) == 0
    assert f"llmserve build {checkpoint}" in capsys.readouterr().out
    limits = ["--max-batch-size", "4", "--max-num-tokens", "64", "--max-seq-len", "32"]
    assert cli.main(["build", checkpoint, engine, *limits, "--tokens-per-block", "8"]) == 0
    assert f"llmserve serve {engine}" in capsys.readouterr().out

    config, build_config = read_engine(tmp_path / "e")
    assert config.quantization.quant_algo == "W8A16"
    assert build_config == BuildConfig(
        max_batch_size=4, max_num_tokens=64, max_seq_len=32, tokens_per_block=8
    )


def test_dtype_is_passed_on(source: Path, tmp_path: Path) -> None:
    assert cli.main(["convert", str(source), str(tmp_path / "c"), "--dtype", "float32"]) == 0
    assert json.loads((tmp_path / "c" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    "arguments",
    [
        ["convert", "/no/where/at/all", "OUT"],
        ["build", "/no/where/at/all", "OUT"],
        ["build", "SOURCE", "OUT"],
        ["build", "SOURCE", "OUT", "--max-batch-size", "0"],
    ],
)
def test_an_error_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    names = {"SOURCE": str(source), "OUT": str(tmp_path / "out")}
    assert cli.main([names.get(argument, argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("llmserve: error: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["frobnicate"], ["convert"], ["convert", "a", "b", "--quant", "int3"]]
)
def test_wrong_usage_is_argparses(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: llmserve" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"1.2.3 of {name}")
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert not caught.value.code
    assert capsys.readouterr().out == "llmserve 1.2.3 of llmserve\n"


def test_ctrl_c_is_no_traceback(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmserve.cli.convert.run", interrupted)
    assert cli.main(["convert", "a", "b"]) == 130
    assert capsys.readouterr().err == "llmserve: interrupted\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_light_to_import_and_has_its_help(name: str) -> None:
    code = (
        "import sys; from llmserve.cli import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'fastapi', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: llmserve {name}" in done.stdout


def test_help_imports_no_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(name))
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert not caught.value.code
    out = capsys.readouterr().out
    assert all(name in out and summary in out for name, summary in cli.COMMANDS.items())


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmserve", "convert", "/no/where/at/all", "/no/where/out"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("llmserve: error: there is no directory /no/where/at/all")


def test_progress_is_plain_lines_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressReport() as report:
        for done in range(1, 101):
            report("convert", done * 2**20, 100 * 2**20)
        report("build", 2**20, 2**20)
    lines = capsys.readouterr().err.splitlines()
    percents = [line.split(" %")[0] for line in lines]
    assert percents == [
        *("convert: 1", "convert: 25", "convert: 50", "convert: 75", "convert: 100"),
        "build: 100",
    ]
    assert lines[1] == "convert: 25 % (25.0 of 100.0 MiB)"


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressReport() as report:
        report("convert", 2**20, 2**21)
        report("convert", 2**21, 2**21)
    assert "\r" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


@pytest.mark.parametrize("command", ["convert", "build"])
def test_a_wrong_path_is_answered_before_torch_is_imported(command: str, tmp_path: Path) -> None:
    code = (
        "import sys; from llmserve.cli import main\n"
        f"code = main(['{command}', '/no/where/at/all', '{tmp_path}/out'])\n"
        "assert (code, 'torch' in sys.modules) == (1, False)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_tilde_is_the_home_directory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["convert", str(source), "~/c"]) == 0
    assert cli.main(["build", "~/c", "~/e"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "e"]
