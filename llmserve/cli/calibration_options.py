"""The options of every command that converts: what calibrated formats are calibrated on, and how
the result is judged.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmserve.config import KV_CACHE_QUANT_ALGOS, CalibrationConfig, QualityConfig
from llmserve.errors import ConfigError


def add_calibration_options(parser: argparse.ArgumentParser) -> None:
    """Add what calibrated formats need, and what is measured of the result."""
    default = CalibrationConfig()
    group = parser.add_argument_group(
        "calibration", "for fp8, int8_sq and a quantised KV cache; other formats need none"
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=list(KV_CACHE_QUANT_ALGOS),
        default="auto",
        help="how K and V are stored; auto is the model's dtype (default: %(default)s)",
    )
    group.add_argument(
        "--smoothquant",
        type=float,
        metavar="ALPHA",
        help="SmoothQuant's alpha, from 0 to 1, for int8_sq (default: 0.5)",
    )
    group.add_argument(
        "--calib",
        type=Path,
        metavar="TEXT",
        help="your own text: a .jsonl or .txt file or a directory of these; or the "
        "activation_ranges.safetensors of an earlier conversion (default: a small text of "
        "llmserve's own)",
    )
    group.add_argument(
        "--calib-samples", type=int, metavar="N", help=f"most samples (default: {default.samples})"
    )
    group.add_argument(
        "--calib-seq-len",
        type=int,
        metavar="N",
        help=f"most tokens of a sample (default: {default.seq_len})",
    )
    group.add_argument(
        "--calib-seed",
        type=int,
        metavar="N",
        help=f"of the choice among more documents than samples (default: {default.seed})",
    )
    add_quality_options(parser)


def add_quality_options(parser: argparse.ArgumentParser) -> None:
    """Add what is measured of a conversion's result."""
    group = parser.add_argument_group(
        "quality", "the result against the unquantised model; see also `llmserve quality`"
    )
    group.add_argument(
        "--quality",
        action="store_true",
        help="run both on held-out text: perplexity, KL divergence, top-1 agreement",
    )
    group.add_argument(
        "--quality-text",
        type=Path,
        metavar="TEXT",
        help="held-out text of your own: a .jsonl or .txt file or a directory of these",
    )
    add_limits(group)


def add_limits(group: argparse._ArgumentGroup) -> None:
    """Add the limits that a result must keep."""
    group.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="fail if the mean KL divergence is larger, in nats a token",
    )
    group.add_argument(
        "--min-top1",
        type=float,
        metavar="SHARE",
        help="fail if the likeliest token is the same for a smaller share, from 0 to 1",
    )


def calibration_config(args: argparse.Namespace, *, calibrated: bool) -> CalibrationConfig:
    """The settings that ``add_calibration_options`` has read.

    Args:
        args: Of a parser with these options.
        calibrated: Whether what is asked for needs calibration.

    Raises:
        ConfigError: A value is out of range, or one is given and nothing is calibrated.
    """
    given = {
        "path": args.calib,
        "samples": args.calib_samples,
        "seq_len": args.calib_seq_len,
        "seed": args.calib_seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if given and not calibrated:
        flag = "--calib" if "path" in given else f"--calib-{next(iter(given)).replace('_', '-')}"
        raise ConfigError(
            f"{flag} is given and nothing is calibrated: only --quant fp8 and int8_sq and "
            "--kv-cache-dtype int8 and fp8 are; leave it out"
        )
    return CalibrationConfig(**given)


def quality_config(args: argparse.Namespace) -> QualityConfig:
    """The settings that ``add_quality_options`` has read.

    Raises:
        ConfigError: A limit is out of range, or a text is given and nothing is measured.
    """
    config = QualityConfig(
        measure=args.quality,
        text=args.quality_text,
        max_kl=args.max_kl,
        min_top1=args.min_top1,
    )
    if config.text is not None and not config.wanted:
        raise ConfigError("--quality-text is given and nothing is measured: add --quality")
    return config
