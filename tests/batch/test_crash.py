"""Jobs that are killed: nothing lost, nothing repeated, the same files as undisturbed."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmserve.batch.format import JsonObject, Response
from llmserve.batch.job import run_job
from llmserve.batch.journal import Journal
from tests.batch.jobs import FakeResponder, chat_line, make_job, write_jobs

NAMES = [f"line {i}" for i in range(60)]


def start(directory: Path, seed: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.batch.killable_job", str(directory), str(seed)],
        stderr=subprocess.DEVNULL,
    )


def submissions(directory: Path) -> list[str]:
    log = directory / "submissions.log"
    return log.read_text().splitlines() if log.exists() else []


def durable(directory: Path) -> set[str]:
    path = directory / "answers.jsonl.journal"
    if not path.exists():
        return set()
    with Journal.open(path) as journal:
        return set(journal.entries)


@pytest.mark.parametrize(
    "seed",
    [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(2, 20))],
)
def test_killed_again_and_again_it_ends_as_if_undisturbed(tmp_path: Path, seed: int) -> None:
    """About five kills a job, each after a random number of lines handed to the engine."""
    dice = random.Random(seed)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    for directory in (killed, undisturbed):
        directory.mkdir()
        write_jobs(directory / "jobs.jsonl", [chat_line(name, content=name) for name in NAMES])
    assert start(undisturbed, seed).wait(timeout=30) == 0

    kills = 0
    allowed: Counter[str] = Counter()
    while True:
        done, before = durable(killed), len(submissions(killed))
        allowed.update(name for name in NAMES if name not in done)
        process = start(killed, seed + kills)
        target = before + dice.randint(1, 16)
        while process.poll() is None and len(submissions(killed)) < target:
            time.sleep(0.002)
        time.sleep(dice.random() * 0.01)
        process.kill()
        code = process.wait(timeout=30)
        this_run = submissions(killed)[before:]
        # What was durable is never computed again, and no run computes a line twice.
        assert not done & set(this_run)
        assert len(this_run) == len(set(this_run))
        if code == 0 or (killed / "answers.jsonl").exists():
            break
        kills += 1
        assert not (killed / "errors.jsonl").exists() or durable(killed) == set(NAMES)
    if code != 0:
        assert start(killed, seed).wait(timeout=30) == 0

    assert kills >= 2
    for name in ("answers.jsonl", "errors.jsonl"):
        assert (killed / name).read_bytes() == (undisturbed / name).read_bytes()
    assert Counter(submissions(killed)) <= allowed
    assert set(submissions(killed)) == set(NAMES)
    assert set(os.listdir(killed)) == set(os.listdir(undisturbed))


class Killed(BaseException):
    """Stands for SIGKILL: from here on this process touches the disk no more."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, *, after: bool) -> Callable[[], int]:
    """Die at the given call that changes the disk, before or after it takes effect.

    A write that dies "after" is a torn one: half of its bytes are there.

    Returns:
        A function that tells how many such calls there were.
    """
    count = 0

    def replace_call(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > step or (count == step and not after):
                raise Killed
            if count == step and name == "pwrite":
                fd, content, offset = args
                real(fd, content[: len(content) // 2], offset)
                raise Killed
            result = real(*args, **kwargs)
            if count == step:
                raise Killed
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "ftruncate", "fdatasync", "fsync", "replace", "unlink"):
        replace_call(name)
    return lambda: count


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_every_single_step_it_ends_as_if_undisturbed(tmp_path: Path, after: bool) -> None:
    names = ["a", "b", "c"]

    def behave(body: JsonObject, tries: int) -> Response | None:
        return Response(400, {}) if body["messages"][0]["content"] == "b" else None  # type: ignore[index]

    def run(directory: Path, step: int) -> tuple[bool, int, FakeResponder]:
        responder = FakeResponder(behave)
        with pytest.MonkeyPatch.context() as monkeypatch:
            num_calls = kill_at(monkeypatch, step, after=after)
            try:
                asyncio.run(run_job(make_job(directory, concurrency=1), responder))
            except Killed:
                return False, num_calls(), responder
            return True, num_calls(), responder

    def make_directory(name: str) -> Path:
        (tmp_path / name).mkdir()
        lines = [chat_line(name, content=name) for name in names]
        write_jobs(tmp_path / name / "jobs.jsonl", lines)
        return tmp_path / name

    undisturbed = make_directory("undisturbed")
    complete, num_steps, _ = run(undisturbed, 1_000_000)
    assert complete
    assert num_steps > 10
    for step in range(1, num_steps + 1):
        directory = make_directory(f"killed at {step}")
        complete, _, _ = run(directory, step)
        assert not complete
        done = durable(directory) if not (directory / "answers.jsonl").exists() else set(names)
        complete, _, second = run(directory, 1_000_000)
        assert complete
        assert second.submissions.total() == len(names) - len(done)
        assert {p.name: p.read_bytes() for p in directory.iterdir()} == {
            p.name: p.read_bytes() for p in undisturbed.iterdir()
        }
