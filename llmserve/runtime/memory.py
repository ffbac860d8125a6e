"""What the KV cache may take of the host's memory by default.

In a container ``/proc/meminfo`` describes the machine and not the share of it that the process may
use, so the limits of its control groups, v1 and v2, count as well, along the whole path from the
process's group up. Source: the kernel's ``admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MAX_DEFAULT_KV_BYTES = 4 * 2**30

# Per version: limit, usage, and the key in memory.stat of file pages that are dropped first.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def default_host_kv_bytes(root: Path = Path("/")) -> int:
    """The smaller of 4 GiB and half of the memory that is free, in bytes.

    Args:
        root: The file system to look at; tests pass their own.
    """
    return min(MAX_DEFAULT_KV_BYTES, free_host_bytes(root) // 2)


def free_host_bytes(root: Path = Path("/")) -> int:
    """Memory this process could still take, in bytes: the tightest of all limits.

    Raises:
        OSError: This is not Linux.
    """
    free = [_meminfo_available_bytes(root / "proc/meminfo")]
    for group, names in _memory_groups(root):
        free += _group_free_bytes(group, *names)
    return max(0, min(free))


def _meminfo_available_bytes(path: Path) -> int:
    for line in _read(path).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{path} has no line MemAvailable; this is not Linux")


def _memory_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The process's memory groups and their ancestors, each with its version's file names."""
    mount = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # Where the path is the host's, it does not exist here and only the mount itself answers.
        for depth in range(len(parts) + 1):
            if not controllers:
                yield mount.joinpath(*parts[:depth]), _V2
            elif "memory" in controllers.split(","):
                yield mount.joinpath("memory", *parts[:depth]), _V1


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
