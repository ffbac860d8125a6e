"""kill -9 of the engine: streams end with an error, the API lives, the engine comes back."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.serving import Server, serve


def stream_until_it_ends(server: Server, events: list[dict[str, object]]) -> None:
    body = {
        "model": "demo",
        "prompt": "seven",
        "max_tokens": 2000,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        events.extend(
            json.loads(line.removeprefix("data: "))
            for line in response.iter_lines()
            if line.startswith("data: {")
        )


def test_kill_9_of_the_engine_in_mid_stream(demo_engines: dict[str, Path], tmp_path: Path) -> None:
    with serve(demo_engines["w8a16"], tmp_path / "log", "--served-model-name", "demo") as server:
        streams: list[list[dict[str, object]]] = [[] for _ in range(8)]
        threads = [
            threading.Thread(target=stream_until_it_ends, args=(server, events))
            for events in streams
        ]
        for thread in threads:
            thread.start()
        while not all(streams):
            time.sleep(0.005)
        old = server.engine_pid()
        os.kill(old, signal.SIGKILL)
        killed = time.monotonic()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        for events in streams:
            assert all("choices" in event for event in events[:-1])
            assert "error" in events[-1]
        # The streams end at once, long before the engine is back.
        assert server.health() == 503
        while server.health() != 200:
            assert time.monotonic() - killed < 10, server.log.read_text()
            time.sleep(0.05)
        assert server.engine_pid() != old
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = client.completions.create(model="demo", prompt="a", max_tokens=3)
        assert answer.usage is not None
        assert answer.usage.completion_tokens >= 1


@pytest.mark.full
def test_killed_again_and_again(demo_engines: dict[str, Path], tmp_path: Path) -> None:
    with serve(demo_engines["w8a16"], tmp_path / "log", "--served-model-name", "demo") as server:
        # Pauses before a restart double, from 0.25 s to 4 s here.
        for _ in range(5):
            os.kill(server.engine_pid(), signal.SIGKILL)
            while server.health() == 200:  # its death is not noticed yet
                time.sleep(0.005)
            server.wait_until_healthy(30)
            good = {"model": "demo", "prompt": "a", "max_tokens": 2}
            response = httpx.post(f"{server.url}/v1/completions", json=good, timeout=30)
            assert response.status_code == 200
