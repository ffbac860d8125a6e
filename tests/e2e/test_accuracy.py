"""What quantisation costs, on the demo model: exact matches on held-out inputs, through the API."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import DEMO, Server, serve


def evaluate(*args: object) -> list[dict[str, Any]]:
    """Run evaluate.py, show its table, and return the figures of its last line."""
    command = [sys.executable, DEMO / "evaluate.py", *args]
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=580, check=False
    )
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    measurements: list[dict[str, Any]] = json.loads(result.stdout.splitlines()[-1])["measurements"]
    return measurements


def test_the_demo_model_answers_right(server: Server) -> None:
    (figures,) = evaluate("--url", server.url, "--inputs", 200)
    assert figures["exact_match"]["total"] >= 95


@pytest.mark.full
def test_quantisation_costs_less_than_a_point_on_2000_inputs(
    demo_engines: dict[str, Path], tmp_path: Path
) -> None:
    matches = {}
    for quant in ("none", "w8a16", "fp8_rowwise"):
        with serve(demo_engines[quant], tmp_path / quant) as server:
            (figures,) = evaluate("--url", server.url, "--inputs", 2000)
        matches[quant] = figures["exact_match"]["total"]
    assert min(matches.values()) >= 95, matches
    assert max(matches.values()) - min(matches.values()) <= 1, matches
