"""``llmserve batch run`` in this process, with an engine that follows a script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llmserve import artifacts
from llmserve.batch import responder
from llmserve.cli import main
from llmserve.config import EngineConfig
from llmserve.llm import AsyncLLM
from llmserve.tokenizer import GenerationConfig, Tokenizer
from tests.batch.jobs import MODEL, chat_line, read_lines, write_jobs
from tests.engines import ScriptedEngine
from tests.tokenizer_files import write_tokenizer


class Fixture:
    """A directory with a model called demo, and how often its engine was started."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.model = write_tokenizer(path / MODEL)
        self.engine = ScriptedEngine()
        self.configs: list[EngineConfig] = []
        monkeypatch.setattr(artifacts, "ensure_engine", lambda model, **_: Path(model))
        monkeypatch.setattr(responder, "open_llm", self._open_llm)
        monkeypatch.chdir(path)

    async def _open_llm(self, model: Path, *, engine_config: EngineConfig) -> AsyncLLM:
        self.configs.append(engine_config)
        self.engine.shut_down = False
        await self.engine.start()
        tokenizer = Tokenizer.from_directory(model)
        generation_config = GenerationConfig.from_directory(model, tokenizer)
        return AsyncLLM(self.engine, tokenizer, generation_config, model)

    def run(self, *args: str) -> int:
        command = ["batch", "run", "jobs.jsonl", "-o", "answers.jsonl", "--model", MODEL]
        return main([*command, *args])


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fixture:
    return Fixture(tmp_path, monkeypatch)


def test_a_whole_job(program: Fixture, capsys: pytest.CaptureFixture[str]) -> None:
    write_jobs(Path("jobs.jsonl"), [chat_line(f"{i}", max_tokens=3) for i in range(5)])
    assert program.run("--max-batch-size", "3", "--kv-cache-memory", "1MiB") == 0
    assert "5 of 5 answers are in answers.jsonl" in capsys.readouterr().out
    assert [a["custom_id"] for a in read_lines(Path("answers.jsonl"))] == list("01234")
    assert program.engine.shut_down
    [config] = program.configs
    assert (config.max_batch_size, config.kv_cache.max_total_bytes) == (3, 1 << 20)

    assert program.run() == 0
    assert "answers every line of jobs.jsonl already" in capsys.readouterr().out
    assert len(program.configs) == 1


def test_failed_lines_have_an_exit_code_and_a_file(
    program: Fixture, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [chat_line("good", max_tokens=3), chat_line("bad", max_tokens=3, temperature=9)]
    write_jobs(Path("jobs.jsonl"), lines)
    assert program.run() == 3
    assert "1 of 2 answers are in answers.jsonl, 1 failed lines in" in capsys.readouterr().out
    assert [a["custom_id"] for a in read_lines(Path("answers.errors.jsonl"))] == ["bad"]
    assert program.run() == 3


def test_the_error_files_place_can_be_chosen(program: Fixture) -> None:
    write_jobs(Path("jobs.jsonl"), [chat_line("bad", temperature=9)])
    assert program.run("--error-file", "wrong.jsonl") == 3
    assert len(read_lines(Path("wrong.jsonl"))) == 1
    assert Path("answers.jsonl").read_bytes() == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_the_same_command_goes_on(
    program: Fixture, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    names = [f"{i}" for i in range(30)]
    write_jobs(Path("jobs.jsonl"), [chat_line(name, max_tokens=4) for name in names])
    script = program.engine.script

    def signal_at_the_tenth(request: object) -> list[int]:
        if len(program.engine.requests) == 10:
            os.kill(os.getpid(), number)
        return list(script(request))  # type: ignore[arg-type]

    program.engine.script = signal_at_the_tenth
    assert program.run("--concurrency", "2") == 130
    assert program.engine.shut_down
    assert not program.engine.open
    assert "interrupted; finished answers are in answers.jsonl.journal" in capsys.readouterr().err
    assert not Path("answers.jsonl").exists()
    program.engine.script = script
    first = len(program.engine.requests)
    assert program.run("--concurrency", "2") == 0
    assert 30 <= len(program.engine.requests) <= 32
    assert len(program.engine.requests) > first
    assert [a["custom_id"] for a in read_lines(Path("answers.jsonl"))] == names


def test_errors_are_one_line_and_exit_code_1(
    program: Fixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jobs(Path("jobs.jsonl"), [chat_line("a", model="gpt")])
    assert program.run() == 1
    err = capsys.readouterr().err
    assert err.startswith(
        "llmserve: error: jobs.jsonl cannot be run:\n  line 1: body.model is 'gpt'"
    )
    assert "--served-model-name" in err
    assert program.run("--concurrency", "0") == 1
    assert "--concurrency is 0; it must be at least 1" in capsys.readouterr().err
    for output in (".", "/"):
        assert program.run("-o", output) == 1
        assert f"--output is '{output}'; it must name a file" in capsys.readouterr().err
    assert program.configs == []


def test_the_served_name_can_be_set(program: Fixture) -> None:
    write_jobs(Path("jobs.jsonl"), [chat_line("a", model="gpt-4o-mini", max_tokens=1)])
    assert program.run("--served-model-name", "gpt-4o-mini") == 0
    [answer] = read_lines(Path("answers.jsonl"))
    assert answer["response"]["body"]["model"] == "gpt-4o-mini"


def test_a_job_is_not_finished_by_another_model(
    program: Fixture, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jobs(Path("jobs.jsonl"), [chat_line(f"{i}", max_tokens=4) for i in range(9)])
    program.engine.script = lambda request: (
        (os.kill(os.getpid(), signal.SIGINT) if len(program.engine.requests) == 5 else None) or [7]
    )
    assert program.run("--concurrency", "1") == 130
    (program.model / "config.json").write_text("{}")
    assert program.run() == 1
    assert "another job: the model changed since" in capsys.readouterr().err
    assert program.run("--max-seq-len", "99") == 1
    assert "the model, --max-seq-len changed since" in capsys.readouterr().err


def test_importing_it_brings_neither_torch_nor_fastapi() -> None:
    code = (
        "import sys, llmserve.cli.batch, llmserve.batch.job, llmserve.batch.responder\n"
        "print({'torch', 'fastapi', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
