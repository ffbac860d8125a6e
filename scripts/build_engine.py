#!/usr/bin/env python3
"""TensorRT-LLM checkpoint -> native engine, with trtllm-build's flags.

The same as ``llmserve build``. Plugins choose among NVIDIA's kernels: 'auto' and 'disable' leave
the native engine its own. A flag that is not implemented is refused by name.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmserve.cli import run_reporting
from llmserve.cli.progress import ProgressReport
from llmserve.cli.tensorrt_llm_flags import flag_parser, refuse_switches, refuse_values
from llmserve.config import BuildConfig

_PLUGINS = (
    *("--gpt_attention_plugin", "--gemm_plugin", "--nccl_plugin", "--moe_plugin"),
    *("--fp8_rowwise_gemm_plugin", "--low_latency_gemm_plugin", "--gemm_swiglu_plugin"),
    "--lora_plugin",
)
_OFF = ("--use_fp8_context_fmha", "--multiple_profiles", "--norm_quant_fusion")
_ON = ("--context_fmha", "--remove_input_padding", "--use_paged_context_fmha")
_SWITCHES = (
    *("--strip_plan", "--weight_sparsity", "--weight_streaming", "--fast_build"),
    *("--enable_debug_output", "--dry_run", "--monitor_memory", "--gather_context_logits"),
)


def parser() -> argparse.ArgumentParser:
    """The flags of trtllm-build."""
    flags = flag_parser("build_engine.py", "Build a native engine.")
    default = BuildConfig()
    flags.add_argument("--checkpoint_dir", type=Path, required=True)
    flags.add_argument("--output_dir", type=Path, default=Path("engine_outputs"))
    flags.add_argument("--max_batch_size", type=int, default=default.max_batch_size)
    flags.add_argument("--max_num_tokens", type=int, default=default.max_num_tokens)
    flags.add_argument("--max_seq_len", type=int, help="default: the model's")
    flags.add_argument("--tokens_per_block", type=int, default=default.tokens_per_block)
    refuse_values(
        flags,
        {
            **dict.fromkeys(_PLUGINS, ("auto", "disable")),
            **dict.fromkeys((*_OFF, "--reduce_fusion", "--user_buffer"), ("disable",)),
            **dict.fromkeys(_ON, ("enable",)),
            "--model_config": (),
            "--build_config": (),
            "--max_input_len": ("1024",),
            "--max_beam_width": ("1",),
            "--opt_num_tokens": (),
            "--kv_cache_type": ("paged",),
            "--input_timing_cache": (),
            "--output_timing_cache": ("model.cache",),
            "--profiling_verbosity": ("layer_names_only",),
            "--workers": ("1",),
            "--log_level": ("info",),
            "--logits_dtype": ("float32",),
            "--lora_dir": (),
            "--lora_ckpt_source": ("hf",),
            "--lora_target_modules": (),
            "--max_lora_rank": ("64",),
            "--speculative_decoding_mode": (),
            "--max_draft_len": ("0",),
        },
    )
    refuse_switches(flags, _SWITCHES)
    return flags


def run(argv: list[str] | None = None) -> int:
    """Parse and build. Returns the exit code."""
    args = parser().parse_args(argv)
    limits = BuildConfig(
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=args.max_seq_len,
        tokens_per_block=args.tokens_per_block,
    )
    # Imported here, so that a wrong flag is answered at once.
    from llmserve.build.native import build

    with ProgressReport() as report:
        out = build(args.checkpoint_dir, args.output_dir, limits, report=report)
    print(f"built the engine {out}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run; one line and exit code 1 for an error."""
    return run_reporting(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
