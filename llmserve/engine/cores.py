"""How many cores the compute process may keep busy.

In a container ``os.cpu_count`` describes the machine and not the share of it that the process may
use. Source: the kernel's ``admin-guide/cgroup-v2.rst`` and ``scheduler/sched-bwc.rst``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path


def available_cores(root: Path = Path("/")) -> int:
    """The CPU affinity or the tightest CPU quota, rounded up, whichever is less; at least 1.

    Args:
        root: The file system to look at; tests pass their own.
    """
    cores = [len(os.sched_getaffinity(0))]
    for quota_us, period_us in _quotas(root):
        # v2 writes 'max' and v1 -1 for no quota, and nothing is read where there is no group.
        if quota_us.isdigit() and period_us.isdigit():
            cores.append(math.ceil(int(quota_us) / int(period_us)))
    return max(1, min(cores))


def _quotas(root: Path) -> Iterator[tuple[str, str]]:
    """Quota and period of the process's CPU groups, of both versions, and of their ancestors."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # Where the path is the host's, it does not exist here and only the mount itself answers.
        for depth in range(len(parts) + 1):
            if not controllers:
                text = _read(mount.joinpath(*parts[:depth], "cpu.max"))
                quota_us, _, period_us = text.partition(" ")
                yield quota_us, period_us
            elif "cpu" in controllers.split(","):
                group = mount.joinpath("cpu", *parts[:depth])
                yield _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
