"""``llmserve serve``: its options, and how it ends when it cannot begin."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve.cli import main, serve
from llmserve.errors import ConfigError
from llmserve.server.run import bind
from tests.engines import ScriptedEngine


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *arguments])


def test_defaults_are_safe() -> None:
    args = parse("model")
    assert (args.host, args.port, args.dtype, args.quant) == ("127.0.0.1", 8000, "auto", None)


@pytest.mark.parametrize(
    "bad", [["--kv-cache-memory", "much"], ["--quant", "w3"], ["--port", "x"], ["--nothing"]]
)
def test_wrong_usage(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("model", *bad)
    assert caught.value.code == 2
    assert bad[-1] in capsys.readouterr().err


def test_keys_come_from_options_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.API_KEY_VARIABLE, raising=False)
    assert serve._api_keys([]) == ()
    assert serve._api_keys(["a", "b"]) == ("a", "b")
    monkeypatch.setenv(serve.API_KEY_VARIABLE, "c")
    assert serve._api_keys(["a"]) == ("a", "c")
    for bad in ("", " ", "ké"):
        with pytest.raises(ConfigError):
            serve._api_keys([bad])


def test_capacity_in_one_line() -> None:
    text = serve.describe_capacity(ScriptedEngine().info)
    assert "\n" not in text
    assert "2,048 tokens" in text  # 64 blocks of 32
    assert "8 requests of the full 256 tokens" in text


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = str(sock.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmserve: error: cannot listen on 127.0.0.1")
    assert error.count("\n") == 1


def test_a_wrong_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmserve: error: ")
    assert error.count("\n") == 1


def test_the_api_process_does_without_torch() -> None:
    modules = "llmserve.artifacts, llmserve.llm, llmserve.server.run, llmserve.cli.serve"
    modules += ", llmserve.engine.process"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
