"""``llmserve convert``: a Hugging Face checkpoint to a TensorRT-LLM checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from llmserve.cli import COMMANDS, Subparsers
from llmserve.cli.conversion import run_conversion
from llmserve.config import QUANT_ALGOS, DType


def add_parser(subparsers: Subparsers) -> None:
    """Add ``convert SRC OUT``."""
    parser = subparsers.add_parser("convert", help=COMMANDS["convert"])
    parser.add_argument(
        "source", help="checkpoint directory, or Hub id: owner/name or owner/name@revision"
    )
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


def run(args: argparse.Namespace) -> int:
    """Convert, and print where the result is."""
    out = run_conversion(args.source, args.output, quant=args.quant, dtype=args.dtype)
    print(f"wrote the checkpoint {out}; next: llmserve build {out} ENGINE")
    return 0
