"""``llmserve quality``: what a model lost against the one it was made from."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmserve.cli import COMMANDS, Subparsers
from llmserve.cli.calibration_options import add_limits
from llmserve.cli.progress import ProgressReport
from llmserve.config import QualityConfig

if TYPE_CHECKING:
    from llmserve.checkpoint.quality_file import Measurement, Quality

_WORST_ERRORS = 5

_DESCRIPTION = """\
Run two models on the same held-out text and compare what they predict: perplexity of both, mean KL
divergence per token, and how often the likeliest token is the same. Each may be a Hugging Face
checkpoint, a TensorRT-LLM checkpoint or a native engine. The figures are kept in the candidate's
quality.json.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add ``quality REFERENCE CANDIDATE``."""
    parser = subparsers.add_parser(
        "quality",
        help=COMMANDS["quality"],
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = QualityConfig()
    parser.add_argument("reference", help="the model before quantisation, or its Hub id")
    parser.add_argument("candidate", type=Path, help="the model that is judged")
    parser.add_argument(
        "--text",
        type=Path,
        help="a .jsonl or .txt file or a directory of these (default: a small text of llmserve's "
        "own, which no calibration has seen)",
    )
    parser.add_argument(
        "--samples", type=int, default=default.samples, help="most samples (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-len",
        type=int,
        default=default.seq_len,
        help="most tokens of a sample (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=default.seed,
        help="of the choice among more documents than samples (default: %(default)s)",
    )
    add_limits(parser.add_argument_group("limits", "exit code 1 if one is missed"))
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure, tell, and keep it in the candidate's quality.json."""
    config = QualityConfig(
        measure=True,
        text=args.text,
        samples=args.samples,
        seq_len=args.seq_len,
        seed=args.seed,
        max_kl=args.max_kl,
        min_top1=args.min_top1,
    )
    from llmserve.checkpoint.config_file import artifact_kind
    from llmserve.checkpoint.quality_file import Quality, read_quality, write_measurement
    from llmserve.convert.hub import locate

    # Looked at before torch is imported, so that a wrong path is answered at once.
    reference, candidate = locate(args.reference), args.candidate.expanduser()
    for path in (reference, candidate):
        artifact_kind(path)
    before = read_quality(candidate) or Quality()
    from llmserve.convert.artifact import open_artifact
    from llmserve.convert.quality import check_limits, held_out_samples, measure

    with (
        open_artifact(reference) as first,
        open_artifact(candidate) as second,
        ProgressReport() as report,
    ):
        samples = held_out_samples(config, reference, first.config, chat_renderer(reference))
        measurement = measure(first, second, samples, report=report)
    if args.json:
        print(json.dumps(asdict(measurement)))
    else:
        print(format_quality(measurement, before))
    write_measurement(candidate, measurement)
    check_limits(measurement, config.max_kl, config.min_top1)
    return 0


def chat_renderer(directory: Path) -> Callable[[Sequence[Mapping[str, Any]]], str] | None:
    """How a model writes messages: its own chat template, None if it has none."""
    from llmserve.errors import CheckpointNotFoundError
    from llmserve.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.from_directory(directory)
    except CheckpointNotFoundError:
        return None
    if not tokenizer.chat_templates:
        return None
    return lambda messages: tokenizer.render_chat(messages, add_generation_prompt=False)


def format_quality(measurement: Measurement, quality: Quality) -> str:
    """The table for a terminal.

    Args:
        measurement: What was measured.
        quality: What the conversion has told of the candidate, for the errors of its weights.
    """
    before, after = measurement.reference_perplexity, measurement.perplexity
    lines = [
        f"{measurement.candidate} against {measurement.reference}, {measurement.num_tokens:,} "
        f"tokens in {measurement.num_samples:,} samples of {measurement.text}",
        f"  perplexity       {before:.4f} -> {after:.4f} ({after / before - 1:+.2%})",
        f"  KL divergence    {measurement.mean_kl:.6f} nats a token, {measurement.max_kl:.4f} at "
        "the most",
        f"  top-1 agreement  {measurement.top1_agreement:.2%}",
    ]
    worst = sorted(quality.quantization_error.items(), key=lambda item: -item[1])
    if worst:
        lines.append(f"  largest errors of {len(worst):,} quantised weights, |w - w'| / |w|")
        lines += [f"    {error:.5f}  {name}" for name, error in worst[:_WORST_ERRORS]]
    return "\n".join(lines)
