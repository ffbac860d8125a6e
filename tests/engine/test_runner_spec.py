from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.engine import worker_process
from llmserve.engine.runner_spec import TorchRunnerSpec
from tests.engine.factories import make_spec


def make_engine(path: Path, *rank_bytes: int) -> TorchRunnerSpec:
    for rank, size in enumerate(rank_bytes):
        with (path / f"rank{rank}.safetensors").open("wb") as file:
            file.truncate(size)  # takes no disk
    return TorchRunnerSpec(str(path))


@pytest.mark.parametrize(
    ("rank_bytes", "cores", "threads"),
    [
        ((8 * 2**20,), 16, 1),
        ((2**30,), 1, 1),
        ((2**30,), 2, 2),
        ((2**30,), 16, 15),
        ((20 * 2**20, 20 * 2**20), 2, 2),
        ((), 8, 1),  # no engine at all: whoever loads it says so
    ],
)
def test_threads_are_as_many_as_the_model_is_worth(
    tmp_path: Path, rank_bytes: tuple[int, ...], cores: int, threads: int
) -> None:
    assert make_engine(tmp_path, *rank_bytes).compute_threads(cores) == threads


def test_who_asks_for_threads_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    large = make_engine(tmp_path, 2**30)
    assert worker_process._threads(None, large) == 7
    assert worker_process._threads(None, make_spec()) == 1
    assert worker_process._threads(3, large) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert worker_process._threads(None, large) == 5
    assert worker_process._threads(3, large) == 3
