"""``llmserve build``: a TensorRT-LLM checkpoint to an engine."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from llmserve.cli import COMMANDS, Subparsers
from llmserve.cli.progress import ProgressReport
from llmserve.config import BuildConfig
from llmserve.errors import ConfigError


def add_parser(subparsers: Subparsers) -> None:
    """Add ``build CHECKPOINT OUT``."""
    parser = subparsers.add_parser("build", help=COMMANDS["build"])
    parser.add_argument("checkpoint", type=Path, help="TensorRT-LLM checkpoint directory")
    parser.add_argument("output", type=Path, help="directory to make; it must not exist")
    default = BuildConfig()
    parser.add_argument(
        "--max-batch-size",
        type=int,
        default=default.max_batch_size,
        help="most requests in one step (default: %(default)s)",
    )
    parser.add_argument(
        "--max-num-tokens",
        type=int,
        default=default.max_num_tokens,
        help="most tokens computed in one step (default: %(default)s)",
    )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        help="longest prompt plus answer in tokens (default: the model's)",
    )
    parser.add_argument(
        "--tokens-per-block",
        type=int,
        default=default.tokens_per_block,
        help="tokens in one block of the KV cache (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=("native", "tensorrt-llm"),
        default="native",
        help="tensorrt-llm runs TensorRT-LLM 1.2's own trtllm-build (default: %(default)s)",
    )
    parser.add_argument(
        "--trtllm-build-args",
        type=shlex.split,
        metavar="ARGS",
        help="more arguments of trtllm-build: --trtllm-build-args='--gemm_plugin auto'",
    )


def run(args: argparse.Namespace) -> int:
    """Build, and print where the result is."""
    from llmserve.checkpoint.config_file import check_kind
    from llmserve.checkpoint.staging import check_free

    limits = BuildConfig(
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=args.max_seq_len,
        tokens_per_block=args.tokens_per_block,
    )
    # Looked at before torch is imported, so that a wrong path is answered at once.
    check_free(args.output.expanduser())
    check_kind(args.checkpoint.expanduser(), "checkpoint")
    if args.backend == "tensorrt-llm":
        from llmserve.build import tensorrt_llm

        out = tensorrt_llm.build(
            args.checkpoint, args.output, limits, extra_arguments=args.trtllm_build_args or ()
        )
    else:
        if args.trtllm_build_args is not None:
            raise ConfigError("--trtllm-build-args is for --backend tensorrt-llm: leave it out")
        from llmserve.build import native

        with ProgressReport() as report:
            out = native.build(args.checkpoint, args.output, limits, report=report)
    print(f"built the engine {out}; next: llmserve serve {out}")
    return 0
