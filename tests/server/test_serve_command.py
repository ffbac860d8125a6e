"""``llmserve serve``: its options, and how it ends when it cannot begin."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve.cli import main, serve
from llmserve.cli.engine_options import engine_config
from llmserve.config import EngineConfig, KvCacheConfig, NGramDecodingConfig
from llmserve.errors import ConfigError
from llmserve.server.run import bind
from tests.engines import ScriptedEngine

Capture = pytest.CaptureFixture[str]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_parser(parser.add_subparsers())
    return parser.parse_args(["serve", *arguments])


def test_defaults_are_safe() -> None:
    args = parse("model")
    assert (args.host, args.port, args.dtype, args.quant) == ("127.0.0.1", 8000, "auto", None)


def config(*arguments: str) -> EngineConfig:
    return engine_config(parse("model", *arguments))


def test_engine_options_become_an_engine_config() -> None:
    assert config() == EngineConfig()
    assert config(
        *("--max-batch-size", "4", "--max-num-tokens", "64", "--max-seq-len", "99"),
        *("--tokens-per-block", "16", "--no-block-reuse", "--no-partial-reuse", "--threads", "2"),
        *("--capacity-scheduler-policy", "max_utilization", "--deterministic"),
        *("--speculative", "ngram", "--max-draft-len", "5", "--kv-cache-memory", "2GiB"),
    ) == EngineConfig(
        max_batch_size=4,
        max_num_tokens=64,
        max_seq_len=99,
        kv_cache=KvCacheConfig(
            enable_block_reuse=False,
            enable_partial_reuse=False,
            tokens_per_block=16,
            max_total_bytes=2 * 2**30,
        ),
        capacity_scheduler_policy="max_utilization",
        speculative=NGramDecodingConfig(max_draft_len=5),
        deterministic=True,
        threads=2,
    )
    assert config("--speculative", "ngram").speculative == NGramDecodingConfig()


@pytest.mark.parametrize(("given", "share"), [("50%", 0.5), (" 12.5% ", 0.125), ("100%", 1.0)])
def test_memory_of_the_kv_cache_may_be_a_share(given: str, share: float) -> None:
    cache = config("--kv-cache-memory", given).kv_cache
    assert (cache.memory_fraction, cache.max_total_bytes) == (share, None)


def test_a_draft_length_needs_speculation() -> None:
    with pytest.raises(ConfigError, match="only allowed with --speculative"):
        config("--max-draft-len", "4")


def test_a_request_timeout_is_more_than_nothing(tmp_path: Path, capsys: Capture) -> None:
    assert main(["serve", str(tmp_path), "--request-timeout", "0", "--port", "0"]) == 1
    assert "request_timeout_s is 0.0; it must be at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    [
        *(["--kv-cache-memory", share] for share in ("0%", "101%", "%", "5%%", "nan%")),
        ["--speculative", "eagle"],
    ],
)
def test_wrong_values(bad: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("model", *bad)
    assert caught.value.code == 2
    assert bad[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad", [["--kv-cache-memory", "much"], ["--quant", "w3"], ["--port", "x"], ["--nothing"]]
)
def test_wrong_usage(bad: list[str], capsys: Capture) -> None:
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


def test_a_port_in_use_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    with bind("127.0.0.1", 0) as sock:
        sock.listen()
        port = str(sock.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmserve: error: cannot listen on 127.0.0.1")
    assert error.count("\n") == 1


def test_a_wrong_path_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llmserve: error: ")
    assert error.count("\n") == 1


def test_the_api_process_does_without_torch() -> None:
    modules = "llmserve.artifacts, llmserve.llm, llmserve.server.run, llmserve.cli.serve"
    modules += ", llmserve.engine.process"
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
