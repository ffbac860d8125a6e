"""The options of every command that starts an engine: the same names and meaning everywhere."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from llmserve.config import (
    KV_CACHE_QUANT_ALGOS,
    QUANT_ALGOS,
    CapacitySchedulerPolicy,
    DType,
    EngineConfig,
    KvCacheConfig,
    NGramDecodingConfig,
    parse_bytes,
)
from llmserve.errors import ConfigError


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how a model is converted and what its engine may use."""
    group = parser.add_argument_group("engine", "limits may be lower than the engine was built for")
    group.add_argument(
        "--dtype",
        choices=get_args(DType),
        default="auto",
        help="of a Hugging Face checkpoint's conversion (default: %(default)s)",
    )
    group.add_argument(
        "--quant",
        choices=list(QUANT_ALGOS),
        help="weight format of a Hugging Face checkpoint's conversion (default: none)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=list(KV_CACHE_QUANT_ALGOS),
        help="of K and V, of a Hugging Face checkpoint's conversion (default: auto)",
    )
    group.add_argument(
        "--tp",
        type=int,
        help="tensor-parallel ranks, of a Hugging Face checkpoint's conversion (default: 1)",
    )
    group.add_argument("--threads", type=int, help="compute threads (default: the cores there are)")
    group.add_argument("--max-batch-size", type=int, help="most requests in one step")
    group.add_argument("--max-num-tokens", type=int, help="most tokens computed in one step")
    group.add_argument("--max-seq-len", type=int, help="longest prompt plus answer, in tokens")
    group.add_argument("--tokens-per-block", type=int, help="tokens in one block of the KV cache")
    group.add_argument(
        "--kv-cache-memory",
        type=memory_option,
        metavar="SIZE",
        help="most memory of the KV cache, such as 8GiB, or 50%% of what is free after loading",
    )
    group.add_argument(
        "--capacity-scheduler-policy",
        choices=get_args(CapacitySchedulerPolicy),
        default=EngineConfig().capacity_scheduler_policy,
        help="never pause a running request, or fill the KV cache (default: %(default)s)",
    )
    group.add_argument(
        "--no-block-reuse",
        action="store_true",
        help="do not share the KV cache between requests with the same beginning",
    )
    group.add_argument(
        "--no-partial-reuse",
        action="store_true",
        help="share whole blocks alone, and copy no beginning of one",
    )
    group.add_argument(
        "--speculative",
        choices=("ngram",),
        help="guess what follows from where the last words stood before, and check several tokens "
        "in a step; where that does not pay it is not done (default: never)",
    )
    group.add_argument(
        "--max-draft-len",
        type=int,
        metavar="N",
        help="most tokens guessed at a time, with --speculative "
        f"(default: {NGramDecodingConfig().max_draft_len})",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits for a request whatever else runs; on a CPU alone",
    )


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which engine runs the model."""
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend",
        choices=("auto", "native", "tensorrt-llm"),
        default="auto",
        help="auto takes TensorRT-LLM for engines that it has built, and the native one for all "
        "else (default: %(default)s)",
    )
    group.add_argument(
        "--gather-generation-logits",
        action="store_true",
        help="let an engine of TensorRT-LLM's give log-probabilities, at some cost in speed",
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The settings that ``add_engine_options`` has read.

    Raises:
        ConfigError: A value is out of range.
    """
    memory: int | float | None = args.kv_cache_memory
    return EngineConfig(
        max_batch_size=args.max_batch_size,
        max_num_tokens=args.max_num_tokens,
        max_seq_len=args.max_seq_len,
        kv_cache=KvCacheConfig(
            enable_block_reuse=not args.no_block_reuse,
            enable_partial_reuse=not args.no_partial_reuse,
            tokens_per_block=args.tokens_per_block,
            max_total_bytes=memory if isinstance(memory, int) else None,
            memory_fraction=memory if isinstance(memory, float) else None,
        ),
        capacity_scheduler_policy=args.capacity_scheduler_policy,
        speculative=_speculative(args.speculative, args.max_draft_len),
        deterministic=args.deterministic,
        threads=args.threads,
    )


def _speculative(kind: str | None, max_draft_len: int | None) -> NGramDecodingConfig | None:
    if kind is None:
        if max_draft_len is not None:
            raise ConfigError(
                f"--max-draft-len is {max_draft_len}; it is only allowed with --speculative"
            )
        return None
    if max_draft_len is None:
        return NGramDecodingConfig()
    return NGramDecodingConfig(max_draft_len=max_draft_len)


def default_model_name(model: str) -> str:
    """What clients call a model unless told otherwise: its directory's name, or its Hub id."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model.partition("@")[0]


def size_option(text: str) -> int:
    """A size such as 2GiB, as an argparse type."""
    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def memory_option(text: str) -> int | float:
    """Bytes from a size such as 8GiB, or a share in (0, 1] from one such as 50%, for argparse."""
    number, percent, rest = text.strip().partition("%")
    if not percent:
        return size_option(text)
    try:
        share = float(number) / 100
    except ValueError:
        share = 0.0
    if rest or not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share; write it like 50%")
    return share
