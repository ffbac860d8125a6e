"""Whether a process of somebody else's still runs."""

from __future__ import annotations

import time

import psutil


def has_ended(pid: int, timeout_s: float = 3.0) -> bool:
    """Wait for the end of a process that need not be a child of this one.

    A zombie has ended: whether its new parent, which may be a container's first process, collects
    its exit status soon or never is no business of ours.
    """
    limit = time.monotonic() + timeout_s
    while time.monotonic() < limit:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False
