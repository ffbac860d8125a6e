"""The soak, for a third of a minute instead of half an hour."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_mixed_overload_with_kills_loses_nothing() -> None:
    command = [sys.executable, ROOT / "scripts" / "soak.py", "--minutes", "0.3"]
    command += ["--calibration-s", "2", "--kill-every-s", "7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["wrong"] == []
    assert report["deaths"] == report["kills"] > 0
    # Each thing that can happen to a request did.
    outcomes = report["outcomes"]
    assert {"length", "stop", "abort", "timeout", "left", "cancelled"} <= outcomes.keys()
    assert {"refused: EngineOverloadedError", "failed: EngineDeadError"} <= outcomes.keys()
    assert {"refused: ContextLengthError", "refused: InvalidRequestError"} <= outcomes.keys()
