"""The whole program with a real engine: killed with -9 in mid-job, and its engine killed, too."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.batch.jobs import chat_line, read_lines, write_jobs
from tests.models import make_llama
from tests.processes import has_ended

NAMES = [f"line {i}" for i in range(150)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("program")
    make_llama(directory / "demo")
    # Long enough that a kill finds it in the middle; half of the lines are sampled.
    lines = [
        chat_line(name, content=name, max_tokens=60, temperature=float(i % 2))
        for i, name in enumerate(NAMES)
    ]
    write_jobs(directory / "jobs.jsonl", lines)
    return directory


@contextlib.contextmanager
def job(directory: Path, output: str) -> Iterator[subprocess.Popen[bytes]]:
    """A running job, which outlives no failed test."""
    command = [sys.executable, "-m", "llmserve", "batch", "run", str(directory / "jobs.jsonl")]
    command += ["-o", str(directory / output), "--model", str(directory / "demo")]
    command += ["--threads", "1", "--concurrency", "16"]
    environment = {**os.environ, "LLMSERVE_CACHE": str(directory / "cache")}
    with subprocess.Popen(command, env=environment) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_answers(process: subprocess.Popen[bytes], journal: Path, at_least: int) -> None:
    limit = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") <= at_least:
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < limit
        time.sleep(0.01)


def engine_pid(process: subprocess.Popen[bytes]) -> int:
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    [pid] = [int(child) for task in tasks for child in task.read_text().split()]
    return pid


def choices(directory: Path, output: str) -> dict[str, Any]:
    answers = read_lines(directory / output)
    return {a["custom_id"]: a["response"]["body"]["choices"] for a in answers}


@pytest.fixture(scope="module")
def killed(directory: Path) -> dict[str, Any]:
    """The answers of a job that was killed, and whose engine was killed when it went on."""
    journal = directory / "killed.jsonl.journal"
    with job(directory, "killed.jsonl") as process:
        wait_for_answers(process, journal, 20)
        engine = engine_pid(process)
        process.kill()
    num_before = journal.read_bytes().count(b"\n")
    assert not (directory / "killed.jsonl").exists()

    with job(directory, "killed.jsonl") as process:
        wait_for_answers(process, journal, num_before + 20)
        # The first engine has not outlived its program.
        assert engine_pid(process) != engine
        assert has_ended(engine)
        os.kill(engine_pid(process), signal.SIGKILL)
        assert process.wait(120) == 0
    assert not journal.exists()
    return choices(directory, "killed.jsonl")


def test_killed_the_program_and_then_its_engine_every_line_has_its_answer(
    killed: dict[str, Any],
) -> None:
    assert list(killed) == NAMES


@pytest.mark.full
def test_and_it_is_the_answer_of_an_undisturbed_job(
    directory: Path, killed: dict[str, Any]
) -> None:
    with job(directory, "undisturbed.jsonl") as process:
        assert process.wait(120) == 0
    assert choices(directory, "undisturbed.jsonl") == killed
