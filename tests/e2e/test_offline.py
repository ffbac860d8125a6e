"""Without a server: the Python API from a plain script, batch files, and accuracy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.e2e.serving import DEMO, llmserve

# No main guard, as in the first lines of any notebook.
SCRIPT = """
import sys
from llmserve import LLM, SamplingParams

with LLM(sys.argv[1], max_seq_len=256) as llm:
    outputs = llm.generate(["seven", [5, 6, 7]], SamplingParams(max_tokens=8, logprobs=2))
    for output in outputs:
        print(len(output.outputs[0].token_ids), output.outputs[0].finish_reason)
    assert "torch" not in sys.modules
"""


def test_llm_from_a_plain_script(demo_engines: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    result = subprocess.run(
        [sys.executable, "-W", "error", script, demo_engines["w8a16"]],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2


def test_engines_are_as_large_as_their_weights_should_be(demo_engines: dict[str, Path]) -> None:
    """Linears at 1 byte instead of 2 a weight, plus 4 bytes of scale a row; the rest as it was."""
    sizes = {q: (d / "rank0.safetensors").stat().st_size for q, d in demo_engines.items()}
    linear_weights = rows = 0
    with safe_open(demo_engines["none"] / "rank0.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
            shape = file.get_slice(name).get_shape()
            if name.startswith("transformer.layers.") and len(shape) == 2:
                linear_weights += shape[0] * shape[1]
                rows += shape[0]
    saved = linear_weights - 4 * rows
    for quant in ("w8a16", "fp8_rowwise"):
        header = 16_384  # names and offsets of the scales
        assert abs(sizes["none"] - saved - sizes[quant]) <= header, sizes


def jobs(path: Path, number: int) -> Path:
    """A batch file of questions with temperature, so that equal answers show equal seeds."""
    with path.open("w") as file:
        for index in range(number):
            body = {
                "model": "demo",
                "messages": [{"role": "user", "content": f"Translate to German: {index}"}],
                "max_tokens": 40,
                "temperature": 0.8,
            }
            line = {
                "custom_id": f"job-{index}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": body,
            }
            file.write(json.dumps(line) + "\n")
    return path


def answers(path: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines
    }
    assert len(found) == len(lines)
    return found


def batch(engine: Path, source: Path, out: Path) -> list[str]:
    command = ["batch", "run", source, "-o", out, "--model", engine, "--served-model-name", "demo"]
    return list(map(str, command))


def test_batch_killed_and_resumed_equals_an_undisturbed_one(
    demo_engines: dict[str, Path], tmp_path: Path
) -> None:
    source = jobs(tmp_path / "jobs.jsonl", 400)
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    result = llmserve(*batch(demo_engines["w8a16"], source, whole))
    assert result.returncode == 0, result.stderr
    expected = answers(whole)
    assert list(expected) == [f"job-{index}" for index in range(400)]

    command = [sys.executable, "-m", "llmserve", *batch(demo_engines["w8a16"], source, broken)]
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            # Longer each time: the first are killed while loading, the later ones midway.
            process.wait(0.8 + 0.2 * kills)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            # A late kill may find the job written and its engine stopping: whole, or not there.
            assert not broken.exists() or answers(broken) == expected
        else:
            break
    assert process.returncode == 0
    assert kills > 0
    assert answers(broken) == expected


@pytest.mark.parametrize("quant", ["w8a16", "fp8_rowwise", "none"])
def test_the_three_artefacts_all_serve(quant: str, tmp_path: Path) -> None:
    """A Hugging Face directory goes straight to answers; what was made is kept and found again."""
    source = jobs(tmp_path / "jobs.jsonl", 2)
    environment = os.environ | {"LLMSERVE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "llmserve", *batch(DEMO, source, tmp_path / "out.jsonl")]
    for _ in range(2):
        start = time.monotonic()
        result = subprocess.run(
            [*command, "--quant", quant],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert result.returncode == 0, result.stderr
        assert time.monotonic() - start < 60
        assert len(answers(tmp_path / "out.jsonl")) == 2
