#!/usr/bin/env python3
"""Hugging Face checkpoint -> quantised TensorRT-LLM checkpoint, with quantize.py's flags.

--qformat fp8, fp8_pc_pt, int8_sq, int8_wo and full_prec, and --kv_cache_dtype. int8_wo writes plain
weights that the build quantises, and int8_sq takes SmoothQuant's alpha as 1, both as NVIDIA's own
does. --calib_dataset is a text of your own. A flag that is not implemented is refused by name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmserve.cli import run_reporting
from llmserve.cli.conversion import run_conversion
from llmserve.cli.tensorrt_llm_flags import (
    add_calibration_flags,
    calibration_of,
    flag_parser,
    refuse_all_but,
    refuse_switches,
    refuse_values,
)
from llmserve.config import ConvertConfig

_QUANT_OF_QFORMAT = {
    "fp8": "fp8",
    "fp8_pc_pt": "fp8_rowwise",
    "int8_sq": "int8_sq",
    "int8_wo": "w8a16",
    "full_prec": "none",
}
_OTHER_QFORMATS = ("int4_awq", "w4a8_awq", "int4_wo", "nvfp4")


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
    flags.add_argument("--kv_cache_dtype", choices=("int8", "fp8"), help="of K and V (the model's)")
    flags.add_argument("--tp_size", type=int, default=1, help="tensor-parallel ranks")
    add_calibration_flags(flags, length="--calib_max_seq_length")
    flags.add_argument("--seed", type=int, default=1234, help="of the choice of samples")
    refuse_values(
        flags,
        {
            # Calibration runs on the GPU where there is one.
            "--device": ("cuda", "cpu"),
            **dict.fromkeys(("--pp_size", "--cp_size", "--batch_size"), ("1",)),
            "--awq_block_size": ("128",),
            "--tokenizer_max_seq_length": ("2048",),
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
    settings = ConvertConfig(
        quant=_QUANT_OF_QFORMAT[args.qformat],
        kv_cache_dtype=args.kv_cache_dtype or "auto",
        dtype=args.dtype,
        tp_size=args.tp_size,
        smoothquant_val=1.0 if args.qformat == "int8_sq" else ConvertConfig().smoothquant_val,
    )
    out = run_conversion(
        args.model_dir,
        args.output_dir,
        settings,
        calibration=calibration_of(args, settings),
        halve_float32=True,
    )
    print(f"wrote the checkpoint {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; one line and exit code 1 for an error."""
    return run_reporting(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
