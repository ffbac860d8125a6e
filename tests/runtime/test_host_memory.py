"""Free memory under /proc/meminfo and both versions of control groups, from made-up files."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.runtime.host import MAX_DEFAULT_KV_BYTES, default_host_kv_bytes, free_host_bytes

GIB = 2**30


def _host(root: Path, available_gib: int, cgroup: str = "", **files: str) -> Path:
    """A file system; ``__`` in the files' names is a slash below /sys/fs/cgroup."""
    _write(
        root / "proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable: {available_gib * 2**20} kB\n"
    )
    _write(root / "proc/self/cgroup", cgroup)
    for name, text in files.items():
        _write(root / "sys/fs/cgroup" / name.replace("__", "/"), text)
    return root


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _v2(prefix: str, limit: object, current: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"{prefix}memory.max": f"{limit}\n",
        f"{prefix}memory.current": f"{current}\n",
        f"{prefix}memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7\n",
    }


def test_the_host_alone(tmp_path: Path) -> None:
    assert free_host_bytes(_host(tmp_path, 6)) == 6 * GIB
    assert default_host_kv_bytes(tmp_path) == 3 * GIB


def test_the_default_stops_at_4_gib(tmp_path: Path) -> None:
    assert default_host_kv_bytes(_host(tmp_path, 100)) == MAX_DEFAULT_KV_BYTES == 4 * GIB


def test_v2_limit_less_usage_but_not_droppable_file_pages(tmp_path: Path) -> None:
    root = _host(tmp_path, 100, "0::/\n", **_v2("", 8 * GIB, 3 * GIB, inactive=2 * GIB))
    assert free_host_bytes(root) == 7 * GIB


def test_v2_the_tightest_ancestor_counts(tmp_path: Path) -> None:
    files = (
        _v2("", "max", GIB) | _v2("jobs__", 4 * GIB, 2 * GIB) | _v2("jobs__mine__", 3 * GIB, 1024)
    )
    assert free_host_bytes(_host(tmp_path, 100, "0::/jobs/mine\n", **files)) == 2 * GIB


def test_v1(tmp_path: Path) -> None:
    files = {
        "memory__docker__memory.limit_in_bytes": str(2 * GIB),
        "memory__docker__memory.usage_in_bytes": str(GIB),
        "memory__docker__memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
        "memory__memory.limit_in_bytes": str(2**63 - 4096),
        "memory__memory.usage_in_bytes": str(GIB),
    }
    cgroup = "5:cpu,cpuacct:/docker\n4:memory:/docker\n0::/\n"
    assert free_host_bytes(_host(tmp_path, 100, cgroup, **files)) == GIB + GIB // 2


def test_more_used_than_allowed_is_nothing_free(tmp_path: Path) -> None:
    root = _host(tmp_path, 100, "0::/\n", **_v2("", GIB, 2 * GIB))
    assert default_host_kv_bytes(root) == 0


def test_elsewhere_than_on_linux(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="MemAvailable"):
        free_host_bytes(tmp_path)


def test_here() -> None:
    assert 0 < default_host_kv_bytes() <= MAX_DEFAULT_KV_BYTES
