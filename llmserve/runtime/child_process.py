"""How the processes of an engine live: as long as their parent, and whatever is signalled."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def live_with_parent(parent_pid: int) -> None:
    """End with the parent, whatever ends that, and leave Ctrl-C and SIGTERM to it.

    A service manager that signals every process must not cut off what the parent lets end. Call it
    first, on the main thread: Linux kills the process when the parent's *thread* that started it
    ends.

    Args:
        parent_pid: Whose child this is; the process exits with 1 if it no longer is.
    """
    for ignored in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        sys.exit(1)
