"""``llmserve plan``: whether a model fits a memory and what it can serve there."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, get_args

from llmserve.cli import COMMANDS, Subparsers
from llmserve.cli.engine_options import size_option
from llmserve.cli.sizes import count, size
from llmserve.config import KV_CACHE_QUANT_ALGOS, QUANT_ALGOS, BuildConfig, ConvertConfig, DType
from llmserve.errors import ConfigError

if TYPE_CHECKING:
    from llmserve.engine.planning import MemoryPlan
    from llmserve.engine.sizing import EngineLimits
    from llmserve.inspection import Description


def add_parser(subparsers: Subparsers) -> None:
    """Add ``plan MODEL --memory SIZE``."""
    parser = subparsers.add_parser("plan", help=COMMANDS["plan"])
    parser.add_argument(
        "model", help="Hugging Face checkpoint, TensorRT-LLM checkpoint or engine, or a Hub id"
    )
    parser.add_argument(
        "--memory",
        type=size_option,
        required=True,
        metavar="SIZE",
        help="of one GPU, or of the host for each rank, such as 24GiB",
    )
    default = BuildConfig()
    parser.add_argument("--max-seq-len", type=int, help="longest prompt plus answer, in tokens")
    parser.add_argument(
        "--max-batch-size", type=int, help=f"requests in one step ({default.max_batch_size})"
    )
    parser.add_argument(
        "--max-num-tokens", type=int, help=f"tokens in one step ({default.max_num_tokens})"
    )
    group = parser.add_argument_group("a Hugging Face checkpoint's conversion")
    group.add_argument("--quant", choices=list(QUANT_ALGOS), help="weight format (none)")
    group.add_argument(
        "--kv-cache-dtype", choices=list(KV_CACHE_QUANT_ALGOS), help="of K and V (auto)"
    )
    group.add_argument("--dtype", choices=get_args(DType), help="of all else (auto)")
    group.add_argument("--tp", type=int, help="tensor-parallel ranks (1)")
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the plan. Exit code 1 if the model does not fit."""
    from llmserve.checkpoint.config_file import KIND_NAMES, artifact_kind
    from llmserve.convert.hub import locate
    from llmserve.convert.import_hf import quantization_of
    from llmserve.engine.planning import plan_memory, remedies
    from llmserve.inspection import describe

    path = locate(args.model)
    kind = artifact_kind(path)
    names = {
        "quant": "quant",
        "kv_cache_dtype": "kv_cache_dtype",
        "dtype": "dtype",
        "tp": "tp_size",
    }
    typed = {field: getattr(args, name) for name, field in names.items()}
    given = {field: value for field, value in typed.items() if value is not None}
    if given and kind != "huggingface":
        flag = next(name for name, field in names.items() if field in given)
        raise ConfigError(
            f"--{flag.replace('_', '-')} is given, but {path} is {KIND_NAMES[kind]}, whose weights "
            "are fixed; leave it out, or start from the Hugging Face checkpoint"
        )
    description = describe(path, ConvertConfig(**given))
    plan = plan_memory(description.config, _limits(args, description), args.memory)
    advice: list[str] = []
    if not plan.fits:
        converts = kind == "huggingface"
        advice = remedies(
            plan,
            description.config,
            can_quantize=converts and quantization_of(path) is None,
            can_split=converts,
        )
    if args.json:
        print(json.dumps(_object(plan) | {"remedies": advice}, indent=2))
    else:
        _print(plan, description, advice)
    return 0 if plan.fits else 1


def _limits(args: argparse.Namespace, description: Description) -> EngineLimits:
    from llmserve.build.native import resolve_build_config
    from llmserve.config import EngineConfig
    from llmserve.engine.sizing import resolve_limits

    names = ("max_batch_size", "max_num_tokens", "max_seq_len")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    build = description.build
    if build is None:  # a build would grant what is asked for
        build = resolve_build_config(BuildConfig(**given), description.config)
    return resolve_limits(EngineConfig(**given), build)


def _print(plan: MemoryPlan, description: Description, advice: list[str]) -> None:
    config, limits = description.config, plan.limits
    weights = config.quantization.quant_algo or config.dtype
    ranks = f", rank 1 of {config.tp_size}" if config.tp_size > 1 else ""
    print(f"{config.architecture}, {count(description.num_parameters)} parameters{ranks}")
    kv = config.quantization.kv_cache_quant_algo or config.dtype
    rows = [
        ("memory", plan.memory_bytes, ""),
        ("process", plan.process_bytes, "Python with torch"),
        ("weights", plan.weights_bytes, weights),
        (
            "activations",
            plan.activation_bytes,
            f"a step of {limits.max_num_tokens:,} tokens and {limits.max_batch_size:,} requests",
        ),
        (
            "KV cache",
            plan.kv_pool_bytes,
            f"{plan.kv_bytes_per_token:,} bytes a token, {kv}{_windows(plan)}",
        ),
    ]
    for name, num_bytes, note in rows:
        print(f"  {name:<12}{size(num_bytes):>12}  {note}".rstrip())
    if plan.fits:
        print(
            f"fits: {plan.kv_tokens:,} tokens at once, {plan.full_requests:,} requests of "
            f"{limits.max_seq_len:,}; serve with --kv-cache-memory {plan.kv_pool_bytes // 2**20}MiB"
        )
        return
    print(
        f"does not fit: one request of {limits.max_seq_len:,} tokens needs "
        f"{size(plan.missing_bytes)} more"
    )
    for line in advice:
        print(f"  it would fit with {line}")


def _windows(plan: MemoryPlan) -> str:
    return "".join(
        f"; {len(group.layers)} layers keep the last {group.window:,} tokens"
        for group in plan.kv_groups
        if group.window is not None
    )


def _object(plan: MemoryPlan) -> dict[str, object]:
    return {
        "fits": plan.fits,
        "memory_bytes": plan.memory_bytes,
        "process_bytes": plan.process_bytes,
        "weights_bytes": plan.weights_bytes,
        "activation_bytes": plan.activation_bytes,
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_pool_bytes": plan.kv_pool_bytes,
        "kv_tokens": plan.kv_tokens,
        "full_requests": plan.full_requests,
        "missing_bytes": plan.missing_bytes,
        "limits": dataclasses.asdict(plan.limits),
    }
