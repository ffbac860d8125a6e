"""Runs the program as a user does: `python -m llmserve ...` in a process of its own."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


def llmserve(*args: object, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return what it printed."""
    return subprocess.run(
        [sys.executable, "-m", "llmserve", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def children(pid: int) -> list[int]:
    """Process ids of the children of a process, from /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident_bytes(pid: int) -> int:
    """Memory of a process that is its own, without mapped files."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@dataclass
class Server:
    """A running `llmserve serve`."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def engine_pid(self) -> int:
        """The engine's process: the one child of the API process."""
        pids = children(self.process.pid)
        assert len(pids) == 1, pids
        return pids[0]

    def health(self) -> int:
        """Status code of /health, or 0 while nothing listens."""
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code
        except httpx.TransportError:
            return 0

    def wait_until_healthy(self, timeout_s: float = 60) -> None:
        limit = time.monotonic() + timeout_s
        while self.health() != 200:
            if self.process.poll() is not None or time.monotonic() > limit:
                raise AssertionError(f"the server is not healthy:\n{self.log.read_text()}")
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        """Sum of a metric's samples over its labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert values, f"no metric {name} in:\n{text}"
        return sum(map(float, values))


@contextlib.contextmanager
def serve(model: Path, log: Path, *args: object) -> Iterator[Server]:
    """Serve ``model`` on a free port; stop with SIGTERM and insist on a clean exit."""
    port = free_port()
    command = [sys.executable, "-m", "llmserve", "serve", model, "--port", port, *args]
    with log.open("w") as out:
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, text=True
        )
    server = Server(process, port, log)
    try:
        server.wait_until_healthy()
        yield server
        assert process.poll() is None, f"the server died:\n{log.read_text()}"
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
        assert code == 0, f"exit code {code}:\n{log.read_text()}"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
