#!/usr/bin/env python3
"""Hugging Face checkpoint -> TensorRT-LLM checkpoint, with convert_checkpoint.py's flags.

The same as ``llmserve convert``, except that --dtype auto turns float32 into float16, as
TensorRT-LLM does, and that --calib_dataset is a text of your own. A flag that is not implemented is
refused by name.
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
    one_of,
    refuse_all_but,
    refuse_switches,
    refuse_values,
)
from llmserve.config import ConvertConfig
from llmserve.errors import ConfigError


def parser() -> argparse.ArgumentParser:
    """All flags of convert_checkpoint.py for Llama."""
    flags = flag_parser("convert_checkpoint.py", "Convert to a TensorRT-LLM checkpoint.")
    flags.add_argument("--model_dir", required=True, help="checkpoint directory, or Hub id")
    flags.add_argument("--output_dir", type=Path, default=Path("tllm_checkpoint"))
    flags.add_argument(
        "--dtype", choices=("auto", "float16", "bfloat16", "float32"), default="auto"
    )
    flags.add_argument("--use_weight_only", action="store_true", help="INT8 weights (W8A16)")
    flags.add_argument(
        "--weight_only_precision",
        choices=("int8", "int4", "int8_gptq", "int4_gptq", "int4_awq"),
        default="int8",
    )
    flags.add_argument("--use_fp8_rowwise", action="store_true", help="FP8_PER_CHANNEL_PER_TOKEN")
    flags.add_argument("--use_fp8", action="store_true", help="FP8, calibrated")
    flags.add_argument(
        "--smoothquant", type=float, metavar="ALPHA", help="W8A8_SQ_PER_CHANNEL, calibrated"
    )
    flags.add_argument("--per_channel", action="store_true", help="always so with --smoothquant")
    flags.add_argument("--int8_kv_cache", action="store_true", help="calibrated")
    flags.add_argument("--fp8_kv_cache", action="store_true", help="calibrated")
    flags.add_argument("--tp_size", type=int, default=1, help="tensor-parallel ranks")
    add_calibration_flags(flags, length="--calib_max_seq_length")
    always = "this is always so"
    flags.add_argument("--load_by_shard", action="store_true", help=always)
    flags.add_argument("--load_model_on_cpu", action="store_true", help=always)
    flags.add_argument("--use_parallel_embedding", action="store_true", help="with ranks always so")
    refuse_values(
        flags,
        {
            **dict.fromkeys(("--pp_size", "--cp_size", "--workers"), ("1",)),
            **dict.fromkeys(("--moe_tp_size", "--moe_ep_size"), ("-1", "1")),
            "--group_size": ("128",),
            "--embedding_sharding_dim": ("0",),
            "--log_level": ("info",),
        },
    )
    refuse_switches(flags, ("--per_token", "--use_meta_fp8_rowwise_recipe", "--save_config_only"))
    return flags


def run(argv: list[str] | None = None) -> int:
    """Parse and convert. Returns the exit code."""
    args = parser().parse_args(argv)
    refuse_all_but("--weight_only_precision", args.weight_only_precision, ["int8"])
    chosen = {
        "--use_weight_only": ("w8a16", args.use_weight_only),
        "--use_fp8_rowwise": ("fp8_rowwise", args.use_fp8_rowwise),
        "--use_fp8": ("fp8", args.use_fp8),
        "--smoothquant": ("int8_sq", args.smoothquant is not None),
    }
    quant = one_of(chosen, default="none")
    caches = {
        "--int8_kv_cache": ("int8", args.int8_kv_cache),
        "--fp8_kv_cache": ("fp8", args.fp8_kv_cache),
    }
    kv_cache_dtype = one_of(caches, default="auto")
    if (args.smoothquant is None) == args.per_channel:
        raise ConfigError("--smoothquant and --per_channel are implemented only together")
    settings = ConvertConfig(
        quant=quant,
        kv_cache_dtype=kv_cache_dtype,
        dtype=args.dtype,
        tp_size=args.tp_size,
        **({} if args.smoothquant is None else {"smoothquant_val": args.smoothquant}),
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
