"""The evaluation asks a server over HTTP and counts right, wrong and changed answers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import demo_data
import evaluate
import pytest

EXAMPLES = demo_data.held_out_examples(64)
ANSWERS = {example.prompt: example.answer for example in EXAMPLES}


class _Handler(BaseHTTPRequestHandler):
    """Answers chat requests from the server's ``answer`` function."""

    def do_GET(self) -> None:
        self._reply({"data": [{"id": "fake"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions"
        assert (body["model"], body["temperature"]) == ("fake", 0)
        text = self.server.answer(body["messages"][-1]["content"])
        message = {"role": "assistant", "content": text}
        self._reply({"choices": [{"message": message}], "usage": {"completion_tokens": 10}})

    def _reply(self, content: dict[str, object]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        """Keeps the test output quiet."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[str], str]], str]]:
    running: list[tuple[_Server, threading.Thread]] = []

    def start(answer: Callable[[str], str]) -> str:
        server = _Server(answer)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def test_counts_by_category(serve: Callable[[Callable[[str], str]], str]) -> None:
    url = serve(lambda prompt: "" if "-" in ANSWERS[prompt] else ANSWERS[prompt])
    result = evaluate.measure(url, EXAMPLES, label="fake", concurrency=8)
    right = [("-" not in example.answer) for example in EXAMPLES]
    assert result.correct() == right
    match = result.exact_match()
    assert match["total"] == pytest.approx(100 * sum(right) / len(right))
    assert match["notice"] == 0
    assert result.output_tokens == 10 * len(EXAMPLES)


def test_changed_lost_and_gained() -> None:
    right = [example.answer for example in EXAMPLES]
    base = evaluate.Measurement("none", EXAMPLES, ["x", *right[1:]], 1, 1.0)
    other = evaluate.Measurement("w8a16", EXAMPLES, [right[0], "y", "z", *right[3:]], 1, 1.0)
    assert evaluate.compare(base, other) == {"changed": 3, "lost": 2, "gained": 1}
    assert evaluate.compare(base, base) == {"changed": 0, "lost": 0, "gained": 0}


def test_main_with_url_ends_with_one_json_line(
    serve: Callable[[Callable[[str], str]], str], capsys: pytest.CaptureFixture[str]
) -> None:
    url = serve(ANSWERS.__getitem__)
    assert evaluate.main(["--url", url, "--inputs", "64", "--minimum", "100"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    record = json.loads(lines[-1])["measurements"][0]
    assert record["inputs"] == 64
    assert record["exact_match"]["total"] == 100
    assert any(line.startswith("exact match, notice") for line in lines[:-1])


def test_below_the_minimum_main_returns_one(
    serve: Callable[[Callable[[str], str]], str],
) -> None:
    url = serve(lambda prompt: "wrong")
    assert evaluate.main(["--url", url, "--inputs", "8", "--minimum", "95"]) == 1


def test_only_calibrated_formats_are_given_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    for quant in evaluate.QUANT_MODES:
        evaluate.build_engine(tmp_path / "hf", quant, tmp_path, tmp_path / "calib.jsonl")
    converted = [command for command in commands if "convert" in command]
    given = {command[command.index("--quant") + 1]: "--calib" in command for command in converted}
    assert given == {
        "none": False, "w8a16": False, "fp8_rowwise": False, "fp8": True, "int8_sq": True
    }  # fmt: skip


def test_a_server_that_ends_early_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.Popen

    def broken(command: list[str], **kwargs: object) -> subprocess.Popen[bytes]:
        assert command[1:4] == ["-m", "llmserve", "serve"]
        return real([sys.executable, "-c", "print('no engine here')"], **kwargs)

    monkeypatch.setattr(subprocess, "Popen", broken)
    with (
        pytest.raises(RuntimeError, match="no engine here"),
        evaluate.served(tmp_path, tmp_path / "server.log"),
    ):
        pass
