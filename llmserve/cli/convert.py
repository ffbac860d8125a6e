"""``llmserve convert``: a Hugging Face checkpoint to a TensorRT-LLM checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from llmserve.cli import COMMANDS, Subparsers
from llmserve.cli.calibration_options import (
    add_calibration_options,
    calibration_config,
    quality_config,
)
from llmserve.cli.conversion import run_conversion
from llmserve.config import CHECKPOINT_FORMATS, QUANT_ALGOS, ConvertConfig, DType
from llmserve.errors import ConfigError


def add_parser(subparsers: Subparsers) -> None:
    """Add ``convert SOURCE OUT``."""
    parser = subparsers.add_parser("convert", help=COMMANDS["convert"])
    parser.add_argument("source", help="checkpoint directory, or Hub id: owner/name[@revision]")
    parser.add_argument("output", type=Path, help="directory to make; it must not exist")
    parser.add_argument(
        "--quant",
        choices=list(QUANT_ALGOS),
        default="none",
        help="weight format (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        default="auto",
        help="of all that is not quantised; auto is the source's own (default: %(default)s)",
    )
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor-parallel ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--format",
        choices=CHECKPOINT_FORMATS,
        default=CHECKPOINT_FORMATS[0],
        help="tensorrt-llm: for llmserve and TensorRT-LLM up to 1.2; hf: a quantised Hugging Face "
        "checkpoint, for TensorRT-LLM 1.3+, vLLM and SGLang (default: %(default)s)",
    )
    add_calibration_options(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and print where the result is."""
    if args.smoothquant is not None and args.quant != "int8_sq":
        raise ConfigError(f"--smoothquant is given with --quant {args.quant}; it is int8_sq's")
    settings = ConvertConfig(
        quant=args.quant,
        kv_cache_dtype=args.kv_cache_dtype,
        dtype=args.dtype,
        tp_size=args.tp,
        checkpoint_format=args.format,
        **({} if args.smoothquant is None else {"smoothquant_val": args.smoothquant}),
    )
    out = run_conversion(
        args.source,
        args.output,
        settings,
        calibration=calibration_config(args, calibrated=settings.calibrated),
        quality=quality_config(args),
    )
    then = f"build {out} ENGINE" if args.format == "tensorrt-llm" else f"serve {out}"
    print(f"wrote the checkpoint {out}; next: llmserve {then}")
    return 0
