"""What of the host this process may use: memory and cores.

In a container ``/proc/meminfo`` and ``os.cpu_count`` describe the machine and not the share of it
that the process may use, so the limits of its control groups, v1 and v2, count as well, along the
whole path from the process's group up. Sources: the kernel's ``admin-guide/cgroup-v2.rst``,
``admin-guide/cgroup-v1/memory.rst`` and ``scheduler/sched-bwc.rst``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

MAX_DEFAULT_KV_BYTES = 4 * 2**30

# Per version: limit, usage, and the key in memory.stat of file pages that are dropped first.
_MEMORY_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_MEMORY_V2 = ("memory.max", "memory.current", "inactive_file")


def default_host_kv_bytes(root: Path = Path("/")) -> int:
    """What the KV cache takes by default: the smaller of 4 GiB and half of the free memory, bytes.

    Args:
        root: The file system to look at; tests pass their own.
    """
    return min(MAX_DEFAULT_KV_BYTES, free_host_bytes(root) // 2)


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory this process could still take, in bytes: the tightest of all limits.

    Args:
        root: The file system to look at; tests pass their own.

    Raises:
        OSError: This is not Linux.
    """
    free = [_meminfo_available_bytes(root / "proc/meminfo")]
    for group, version in _groups(root, "memory"):
        free += _group_free_bytes(group, *(_MEMORY_V2 if version == 2 else _MEMORY_V1))
    return max(0, min(free))


def available_cores(root: Path = Path("/")) -> int:
    """The CPU affinity or the tightest CPU quota, rounded up, whichever is less; at least 1.

    Args:
        root: The file system to look at; tests pass their own.
    """
    cores = [len(os.sched_getaffinity(0))]
    for group, version in _groups(root, "cpu"):
        if version == 2:
            quota_us, _, period_us = _read(group / "cpu.max").partition(" ")
        else:
            quota_us = _read(group / "cpu.cfs_quota_us")
            period_us = _read(group / "cpu.cfs_period_us")
        # v2 writes 'max' and v1 -1 for no quota, and nothing is read where there is no group.
        if quota_us.isdigit() and period_us.isdigit():
            cores.append(math.ceil(int(quota_us) / int(period_us)))
    return max(1, min(cores))


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Directories of the process's group and its ancestors that may limit it, with the version."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # Where the path is the host's, it does not exist here and only the mount itself answers.
        for depth in range(len(parts) + 1):
            if not controllers:
                yield mount.joinpath(*parts[:depth]), 2
            elif controller in controllers.split(","):
                yield mount.joinpath(controller, *parts[:depth]), 1


def _meminfo_available_bytes(path: Path) -> int:
    for line in _read(path).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no line MemAvailable; this is not Linux")


def _group_free_bytes(group: Path, limit: str, usage: str, inactive_file: str) -> list[int]:
    limit_text, usage_text = _read(group / limit), _read(group / usage)
    if not (limit_text.isdigit() and usage_text.isdigit()):  # 'max', or no such controller
        return []
    stat = dict(line.split(maxsplit=1) for line in _read(group / "memory.stat").splitlines())
    # Mapped weights are such file pages: they must not look like a full machine.
    return [int(limit_text) - max(0, int(usage_text) - int(stat.get(inactive_file, 0)))]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
