#!/usr/bin/env python3
"""Hugging Face checkpoint -> quantised TensorRT-LLM checkpoint, with quantize.py's flags.

The formats that need no calibration: --qformat fp8_pc_pt, int8_wo and full_prec. int8_wo writes
plain weights that the build quantises, as NVIDIA's own does. A flag that is not implemented is
refused by name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmserve.cli import run_reporting
from llmserve.cli.conversion import run_conversion
from llmserve.cli.tensorrt_llm_flags import (
    flag_parser,
    refuse_all_but,
    refuse_switches,
    refuse_values,
)

_QUANT_OF_QFORMAT = {"fp8_pc_pt": "fp8_rowwise", "int8_wo": "w8a16", "full_prec": "none"}
_OTHER_QFORMATS = ("fp8", "int8_sq", "int4_awq", "w4a8_awq", "int4_wo", "nvfp4")


def parser() -> argparse.ArgumentParser:
    """All flags of quantize.py."""
    flags = flag_parser("quantize.py", "Quantise to a TensorRT-LLM checkpoint.")
    flags.add_argument("--model_dir", required=True, help="checkpoint directory, or Hub id")
    flags.add_argument("--output_dir", type=Path, default=Path("exported_model"))
    flags.add_argument(
        "--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto"
    )
    flags.add_argument(
        "--qformat", choices=(*_QUANT_OF_QFORMAT, *_OTHER_QFORMATS), default="full_prec"
    )
    refuse_values(
        flags,
        {
            # Without calibration there is nothing to run on a GPU.
            "--device": ("cuda", "cpu"),
            **dict.fromkeys(("--tp_size", "--pp_size", "--cp_size", "--batch_size"), ("1",)),
            "--kv_cache_dtype": (),
            "--awq_block_size": ("128",),
            "--calib_dataset": ("cnn_dailymail",),
            "--calib_size": ("512",),
            "--calib_max_seq_length": ("512",),
            "--tokenizer_max_seq_length": ("2048",),
            "--seed": ("1234",),
            "--autoq_format": (),
            "--auto_quantize_bits": (),
        },
    )
    refuse_switches(flags, ["--quantize_lm_head"])
    return flags


def run(argv: list[str] | None = None) -> int:
    """Parse and quantise. Returns the exit code."""
    args = parser().parse_args(argv)
    refuse_all_but("--qformat", args.qformat, _QUANT_OF_QFORMAT)
    quant = _QUANT_OF_QFORMAT[args.qformat]
    out = run_conversion(
        args.model_dir, args.output_dir, quant=quant, dtype=args.dtype, halve_float32=True
    )
    print(f"wrote the checkpoint {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; one line and exit code 1 for an error."""
    return run_reporting(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
