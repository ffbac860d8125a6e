#!/usr/bin/env python3
"""Hugging Face checkpoint -> TensorRT-LLM checkpoint, with convert_checkpoint.py's flags.

The same as ``llmserve convert``, except that --dtype auto turns float32 into float16, as
TensorRT-LLM does. A flag that is not implemented is refused by name.
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
    always = "this is always so"
    flags.add_argument("--load_by_shard", action="store_true", help=always)
    flags.add_argument("--load_model_on_cpu", action="store_true", help=always)
    refuse_values(
        flags,
        {
            **dict.fromkeys(("--tp_size", "--pp_size", "--cp_size", "--workers"), ("1",)),
            **dict.fromkeys(("--moe_tp_size", "--moe_ep_size"), ("-1", "1")),
            "--group_size": ("128",),
            "--smoothquant": (),
            "--calib_dataset": ("ccdv/cnn_dailymail",),
            "--calib_size": ("512",),
            "--calib_max_seq_length": ("512",),
            "--embedding_sharding_dim": ("0",),
            "--log_level": ("info",),
        },
    )
    refuse_switches(
        flags,
        (
            *("--per_channel", "--per_token", "--int8_kv_cache", "--fp8_kv_cache", "--use_fp8"),
            *("--use_meta_fp8_rowwise_recipe", "--use_parallel_embedding", "--save_config_only"),
        ),
    )
    return flags


def run(argv: list[str] | None = None) -> int:
    """Parse and convert. Returns the exit code."""
    args = parser().parse_args(argv)
    refuse_all_but("--weight_only_precision", args.weight_only_precision, ["int8"])
    if args.use_weight_only and args.use_fp8_rowwise:
        raise ConfigError("--use_weight_only and --use_fp8_rowwise exclude each other")
    quant = "w8a16" if args.use_weight_only else "fp8_rowwise" if args.use_fp8_rowwise else "none"
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
