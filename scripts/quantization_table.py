#!/usr/bin/env python3
"""The demo model in every quantisation: size, accuracy, flips, divergence, speed.

Each is converted (calibrated on checkpoints/demo/calib.jsonl), judged on heldout.jsonl, built, and
asked the same held-out inputs, greedily. The table is put into docs/quantization.md between its
marks; the last line printed is one JSON object.

    python scripts/quantization_table.py                  # all, 2,000 inputs: some minutes
    python scripts/quantization_table.py --inputs 200 --stdout
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from machine import cpu_name

from llmserve import LLM, SamplingParams
from llmserve.build.native import build
from llmserve.checkpoint.quality_file import read_quality
from llmserve.cli.conversion import run_conversion
from llmserve.config import CalibrationConfig, ConvertConfig, QualityConfig

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "checkpoints" / "demo"
PAGE = ROOT / "docs" / "quantization.md"
BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"
# Weights, and K and V.
MODES = (
    *(("none", "auto"), ("w8a16", "auto"), ("fp8_rowwise", "auto"), ("fp8", "auto")),
    *(("int8_sq", "auto"), ("none", "fp8"), ("none", "int8"), ("fp8", "fp8"), ("int8_sq", "int8")),
)
STREAMS, SPEED_ROUNDS = 32, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one quantisation gave.

    Attributes:
        quant: ``--quant``.
        kv_cache_dtype: ``--kv-cache-dtype``.
        weights_bytes: Of the engine's rank file.
        correct: Answers that are right.
        lost: Those that plain weights have right and this has not.
        gained: The other way around.
        changed: Answers that differ from those of plain weights.
        mean_kl: Nats a token on held-out text.
        top1_agreement: Share of its tokens.
        tokens_per_s: Generated tokens of all streams, median of the rounds.
    """

    quant: str
    kv_cache_dtype: str
    weights_bytes: int
    correct: int
    lost: int
    gained: int
    changed: int
    mean_kl: float
    top1_agreement: float
    tokens_per_s: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all modes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_KeepLines)
    parser.add_argument("--inputs", type=int, default=2_000, help="held-out inputs to ask")
    parser.add_argument("--stdout", action="store_true", help="print the table, write nothing")
    parser.add_argument("--threads", type=int, help="of the engine")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(DEMO))
    import demo_data

    examples = demo_data.held_out_examples(args.inputs)
    prompts = [example.prompt for example in examples]
    right = [example.answer for example in examples]
    rows: list[Row] = []
    plain: list[str] = []
    with tempfile.TemporaryDirectory(prefix="llmserve-quantization-") as folder:
        for quant, kv_cache_dtype in MODES:
            engine, quality = _make(Path(folder), quant, kv_cache_dtype)
            answers, speed = _ask(engine, prompts, args.threads)
            plain = plain or answers
            rows.append(_row(quant, kv_cache_dtype, engine, quality, answers, plain, right, speed))
            print(f"{quant}, K and V {kv_cache_dtype}: {rows[-1]}", file=sys.stderr)
    table = _table(rows, args.inputs)
    if args.stdout:
        print(table)
    else:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n{table}{END}{after}", encoding="utf-8")
    print(json.dumps({"inputs": args.inputs, "cpu": cpu_name(), "rows": [asdict(r) for r in rows]}))
    return 0


class _KeepLines(argparse.RawDescriptionHelpFormatter):
    pass


def _make(folder: Path, quant: str, kv_cache_dtype: str) -> tuple[Path, tuple[float, float]]:
    """Convert, judge and build; the engine, and mean KL and top-1 agreement."""
    name = f"{quant}-{kv_cache_dtype}"
    settings = ConvertConfig(quant=quant, kv_cache_dtype=kv_cache_dtype)
    checkpoint = run_conversion(
        str(DEMO),
        folder / name,
        settings,
        calibration=CalibrationConfig(path=DEMO / "calib.jsonl") if settings.calibrated else None,
        quality=QualityConfig(measure=True, text=DEMO / "heldout.jsonl", samples=256),
    )
    quality = read_quality(checkpoint)
    assert quality is not None
    assert quality.measurement is not None
    engine = build(checkpoint, folder / f"{name}-engine")
    return engine, (quality.measurement.mean_kl, quality.measurement.top1_agreement)


def _ask(engine: Path, prompts: Sequence[str], threads: int | None) -> tuple[list[str], float]:
    """Every answer, and tokens/s of as many streams as ``STREAMS``."""
    params = SamplingParams(max_tokens=96)
    with LLM(engine, threads=threads) as llm:
        texts = [
            llm.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True
            )
            for prompt in prompts
        ]
        answers = [output.outputs[0].text for output in llm.generate(texts, params)]
        speeds = []
        for _ in range(SPEED_ROUNDS):
            long = SamplingParams(max_tokens=64, ignore_eos=True)
            start = time.perf_counter()
            outputs = llm.generate(texts[:STREAMS], long)
            tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
            speeds.append(tokens / (time.perf_counter() - start))
    return answers, statistics.median(speeds)


def _row(
    quant: str,
    kv_cache_dtype: str,
    engine: Path,
    quality: tuple[float, float],
    answers: Sequence[str],
    plain: Sequence[str],
    right: Sequence[str],
    speed: float,
) -> Row:
    judged = [answer == wanted for answer, wanted in zip(answers, right, strict=True)]
    before = [answer == wanted for answer, wanted in zip(plain, right, strict=True)]
    return Row(
        quant=quant,
        kv_cache_dtype=kv_cache_dtype,
        weights_bytes=(engine / "rank0.safetensors").stat().st_size,
        correct=sum(judged),
        lost=sum(b and not now for b, now in zip(before, judged, strict=True)),
        gained=sum(now and not b for b, now in zip(before, judged, strict=True)),
        changed=sum(a != p for a, p in zip(answers, plain, strict=True)),
        mean_kl=quality[0],
        top1_agreement=quality[1],
        tokens_per_s=speed,
    )


def _table(rows: Sequence[Row], inputs: int) -> str:
    lines = [
        "| `--quant` | `--kv-cache-dtype` | weights | right | lost, gained, changed | "
        "KL, nats a token | top-1 | speed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_line(row, rows[0].tokens_per_s, inputs) for row in rows]
    lines.append("")
    lines.append(
        f"{inputs:,} held-out inputs, {STREAMS} streams for the speed, which is relative to the "
        f"first row ({rows[0].tokens_per_s:,.0f} tokens/s on {cpu_name()}, torch "
        f"{_version('torch')})."
    )
    return "\n".join(lines) + "\n"


def _line(row: Row, plain_tokens_per_s: float, inputs: int) -> str:
    return (
        f"| `{row.quant}` | `{row.kv_cache_dtype}` | {row.weights_bytes / 2**20:.2f} MiB | "
        f"{100 * row.correct / inputs:.2f} % | {row.lost}, {row.gained}, {row.changed} | "
        f"{row.mean_kl:.2e} | {100 * row.top1_agreement:.2f} % | "
        f"{row.tokens_per_s / plain_tokens_per_s:.2f} |"
    )


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    sys.exit(main())
