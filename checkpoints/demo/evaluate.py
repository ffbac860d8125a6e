"""Measures the demo model's exact match through the served OpenAI-compatible API.

This module owns the accuracy figures: it asks the held-out examples over HTTP at temperature 0
and compares each answer with the only right one.  With ``--url`` it measures a running server;
without, it converts, builds and serves the checkpoint once for each ``--quant`` and measures each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import demo_data
import httpx

CHECKPOINT = Path(__file__).resolve().parent
CALIBRATED_MODES = ("fp8", "int8_sq")
QUANT_MODES = ("none", "w8a16", "fp8_rowwise", *CALIBRATED_MODES)
MAX_ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Measurement:
    """What one server answered.

    Attributes:
        label: The quantization mode, or the URL.
        examples: What was asked.
        answers: The answers, in the order of ``examples``.
        output_tokens: Generated tokens in all.
        seconds: Wall-clock time of all requests together.
        engine_bytes: Size of the engine directory, 0 when it is not known.
    """

    label: str
    examples: Sequence[demo_data.Example]
    answers: Sequence[str]
    output_tokens: int
    seconds: float
    engine_bytes: int = 0

    def correct(self) -> list[bool]:
        """Returns for each example whether the answer matches exactly."""
        return [a == e.answer for a, e in zip(self.answers, self.examples, strict=True)]

    def exact_match(self) -> dict[str, float]:
        """Returns percent exact match by category and in "total"."""
        right: Counter[str] = Counter()
        asked: Counter[str] = Counter()
        for example, correct in zip(self.examples, self.correct(), strict=True):
            for key in (example.category, "total"):
                asked[key] += 1
                right[key] += correct
        return {
            key: 100 * right[key] / asked[key]
            for key in (*demo_data.CATEGORIES, "total")
            if asked[key]
        }


async def _ask_all(
    url: str, examples: Sequence[demo_data.Example], concurrency: int
) -> tuple[list[str], int]:
    """Asks every example, ``concurrency`` at a time; returns the answers and their tokens."""
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=300.0, limits=limits) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()["data"]
        model = models[0]["id"]

        async def ask(example: demo_data.Example) -> tuple[str, int]:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": example.prompt}],
                "temperature": 0,
                "max_tokens": MAX_ANSWER_TOKENS,
            }
            async with gate:
                response = await client.post("/v1/chat/completions", json=body)
            reply = response.raise_for_status().json()
            tokens = (reply.get("usage") or {}).get("completion_tokens", 0)
            return reply["choices"][0]["message"]["content"], tokens

        replies = await asyncio.gather(*(ask(example) for example in examples))
    return [text for text, _ in replies], sum(tokens for _, tokens in replies)


def measure(
    url: str,
    examples: Sequence[demo_data.Example],
    *,
    label: str,
    concurrency: int = 32,
    engine_bytes: int = 0,
) -> Measurement:
    """Asks the server at ``url`` every example and returns what it answered.

    Args:
        url: Base URL, without "/v1".
        examples: What to ask.
        label: Name of the measurement.
        concurrency: Requests in flight at once.
        engine_bytes: Size of the served engine, where it is known.
    """
    started = time.monotonic()
    answers, tokens = asyncio.run(_ask_all(url, examples, concurrency))
    seconds = time.monotonic() - started
    return Measurement(label, examples, answers, tokens, seconds, engine_bytes)


def free_port() -> int:
    """Returns a TCP port on which nothing listens at present."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def directory_bytes(directory: Path) -> int:
    """Returns the size of all files under ``directory``."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def build_engine(checkpoint: Path, quant: str, work: Path, calib: Path) -> Path:
    """Converts and builds ``checkpoint`` under ``work``; returns the engine directory.

    Args:
        checkpoint: Hugging Face checkpoint.
        quant: One of ``QUANT_MODES``.
        work: Where the results go.
        calib: The text for formats that are calibrated.
    """
    converted, engine = work / f"{quant}-checkpoint", work / f"{quant}-engine"
    calibration = ["--calib", str(calib)] if quant in CALIBRATED_MODES else []
    for arguments in (
        ["convert", str(checkpoint), str(converted), "--quant", quant, *calibration],
        ["build", str(converted), str(engine)],
    ):
        # Progress belongs on stderr: stdout ends with the JSON line.
        subprocess.run(
            [sys.executable, "-m", "llmserve", *arguments], check=True, stdout=sys.stderr
        )
    return engine


@contextlib.contextmanager
def served(engine: Path, log: Path, patience: float = 180.0) -> Iterator[str]:
    """Serves ``engine`` on a free port while the context lasts and yields the base URL.

    Args:
        engine: Engine directory.
        log: File for the server's output.
        patience: Seconds to wait for /health.

    Raises:
        RuntimeError: The server ended, or did not become healthy in time.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "llmserve", "serve", str(engine), "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_healthy(url, process, log, patience)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(
    url: str, process: subprocess.Popen[bytes], log: Path, patience: float
) -> None:
    """Returns once /health answers 200; raises RuntimeError with the server's last output."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended early:\n{log.read_text()[-2000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5.0).status_code == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"no healthy server after {patience} s:\n{log.read_text()[-2000:]}")


def compare(base: Measurement, other: Measurement) -> dict[str, int]:
    """Returns how many answers differ from ``base``, and how many became right or wrong."""
    changed = sum(a != b for a, b in zip(base.answers, other.answers, strict=True))
    pairs = list(zip(base.correct(), other.correct(), strict=True))
    return {
        "changed": changed,
        "lost": sum(before and not after for before, after in pairs),
        "gained": sum(after and not before for before, after in pairs),
    }


def summarize(measurements: Sequence[Measurement]) -> list[dict[str, object]]:
    """Returns one JSON-ready record per measurement; the first is the one compared against."""
    records: list[dict[str, object]] = []
    for item in measurements:
        match = {key: round(value, 3) for key, value in item.exact_match().items()}
        records.append(
            {
                "label": item.label,
                "inputs": len(item.examples),
                "exact_match": match,
                **compare(measurements[0], item),
                "engine_bytes": item.engine_bytes,
                "tokens_per_s": round(item.output_tokens / item.seconds, 1),
                "seconds": round(item.seconds, 2),
            }
        )
    return records


def format_table(records: Sequence[dict[str, object]]) -> str:
    """Returns the records as an aligned text table, one column per measurement."""
    rows: list[list[str]] = [["", *(str(record["label"]) for record in records)]]
    matches = [record["exact_match"] for record in records]
    for key in (*demo_data.CATEGORIES, "total"):
        cells = [
            f"{match[key]:.2f} %" if isinstance(match, dict) and key in match else "-"
            for match in matches
        ]
        rows.append([f"exact match, {key}", *cells])
    figures = ("inputs", "changed", "lost", "gained", "engine_bytes", "tokens_per_s", "seconds")
    rows += [[key, *(str(record[key]) for record in records)] for key in figures]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for title, *cells in rows:
        columns = [cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([title.ljust(widths[0]), *columns]))
    return "\n".join(lines)


def measure_modes(
    modes: Sequence[str], examples: Sequence[demo_data.Example], args: argparse.Namespace
) -> list[Measurement]:
    """Builds, serves and measures the checkpoint once for each quantization mode."""
    measurements = []
    with tempfile.TemporaryDirectory(prefix="demo-evaluate-") as folder:
        work = Path(folder)
        for mode in modes:
            engine = build_engine(args.checkpoint, mode, work, args.calib)
            with served(engine, work / f"{mode}.log") as url:
                measurements.append(
                    measure(
                        url,
                        examples,
                        label=mode,
                        concurrency=args.concurrency,
                        engine_bytes=directory_bytes(engine),
                    )
                )
    return measurements


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints the table and one JSON line; returns 1 below the required exact match."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="base URL of a running server, without /v1")
    parser.add_argument("--quant", nargs="+", default=list(QUANT_MODES), choices=QUANT_MODES)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument(
        "--calib",
        type=Path,
        default=CHECKPOINT / "calib.jsonl",
        help="the text that fp8 and int8_sq are calibrated on",
    )
    parser.add_argument("--inputs", type=int, default=2_400, help="held-out inputs to ask")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--minimum", type=float, default=0.0, help="required percent exact match")
    parser.add_argument("--show-wrong", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    examples = demo_data.held_out_examples(args.inputs)
    if args.url:
        url = args.url.rstrip("/")
        measurements = [measure(url, examples, label=url, concurrency=args.concurrency)]
    else:
        measurements = measure_modes(args.quant, examples, args)
    for item in measurements:
        wrong = [i for i, correct in enumerate(item.correct()) if not correct]
        for i in wrong[: args.show_wrong]:
            print(f"[{item.label}] {examples[i].prompt} => {item.answers[i]}")
            print(f"    right: {examples[i].answer}")
    records = summarize(measurements)
    print(format_table(records))
    print(json.dumps({"measurements": records}, ensure_ascii=False))
    lowest = min(item.exact_match()["total"] for item in measurements)
    return 0 if lowest >= args.minimum else 1


if __name__ == "__main__":
    sys.exit(main())
