from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmserve.runtime.host import available_cores


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def test_without_a_quota_it_is_the_affinity(tmp_path: Path) -> None:
    assert available_cores(tmp_path) == 8
    files = {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}
    assert available_cores(write(tmp_path, files)) == 8


def test_v2_takes_the_tightest_group_on_the_path_rounded_up(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/outer/inner",
        "sys/fs/cgroup/outer/cpu.max": "250000 100000",
        "sys/fs/cgroup/outer/inner/cpu.max": "600000 100000",
    }
    assert available_cores(write(tmp_path, files)) == 3


def test_in_a_container_without_its_own_namespace_the_mount_answers(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/system.slice/docker-abc.scope",
        "sys/fs/cgroup/cpu.max": "200000 100000",
    }
    assert available_cores(write(tmp_path, files)) == 2


def test_v1(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n0::/",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
    }
    assert available_cores(write(tmp_path, files)) == 1
