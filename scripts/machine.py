"""What a benchmark says of the machine that it ran on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def cpu_name() -> str:
    """As the kernel has it, or what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_machine(*packages: str, **more: Any) -> dict[str, Any]:
    """Hardware and versions, for a benchmark's report.

    Args:
        packages: Whose versions count, besides Python's and the kernel's.
        more: What else there is to say, such as ``threads``.
    """
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        **more,
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }
