"""Settings as frozen dataclasses, one per concern.

Every field has a default, a unit in its name and a docstring line. 'auto' and None are resolved
once, into a new object (see ``engine/native.py`` and ``build/``), never by changing one in place.
A value that cannot be honoured raises ConfigError naming the field, the value and the limit.
This module imports the standard library alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from llmserve.errors import ConfigError

CapacitySchedulerPolicy = Literal["guaranteed_no_evict", "max_utilization"]
DType = Literal["auto", "float16", "bfloat16", "float32"]
CheckpointFormat = Literal["tensorrt-llm", "hf"]
CHECKPOINT_FORMATS: tuple[CheckpointFormat, ...] = get_args(CheckpointFormat)
# The command line's short names, and the quant_algo that TensorRT-LLM's config.json knows.
QUANT_ALGOS: dict[str, str | None] = {
    "none": None,
    "w8a16": "W8A16",
    "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN",
    "fp8": "FP8",
    "int8_sq": "W8A8_SQ_PER_CHANNEL",
}
# Likewise for K and V; 'auto' keeps them in the model's dtype.
KV_CACHE_QUANT_ALGOS: dict[str, str | None] = {"auto": None, "int8": "INT8", "fp8": "FP8"}

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]i?B?|B)?", re.IGNORECASE)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ConfigError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; it must be one of {', '.join(map(str, choices))}")


def check_at_least(name: str, value: int | float | None, least: int | float) -> None:
    """Raise ConfigError if ``value`` is given and below ``least``, or is not a number at all."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; it must be a number")
    if not value >= least:  # so is NaN
        raise ConfigError(f"{name} is {value}; it must be at least {least}")


def parse_bytes(text: str | int) -> int:
    """Read a size such as ``8GiB``, ``512MiB`` or ``1000000`` as bytes.

    ``K``, ``M``, ``G`` and ``T`` with or without ``iB`` are powers of 1024, with ``B`` alone
    (``GB``) powers of 1000, as everywhere else.

    Raises:
        ConfigError: The text is no size.
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None:
        raise ConfigError(f"{text!r} is no size; write it like 8GiB, 512MiB or a number of bytes")
    unit = (match["unit"] or "B").upper()
    base = 1000 if len(unit) == 2 and unit.endswith("B") else 1024
    power = 0 if unit == "B" else "KMGT".index(unit[0]) + 1
    return int(float(match["number"]) * base**power)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheConfig:
    """The paged KV cache.

    Attributes:
        enable_block_reuse: Keep full blocks after their request ends and share them by prefix.
        enable_partial_reuse: Copy the beginning of a block where no more of it than that matches.
        tokens_per_block: Tokens in one block; None takes the engine's (32 unless built otherwise).
        max_tokens: A cap in tokens; the smallest of all caps wins. None: no such cap.
        max_total_bytes: A cap in bytes over all layers. None on CPU: the smaller of 4 GiB and half
            of the memory that is free under the cgroup's limit; on CUDA the fraction alone counts.
        memory_fraction: A cap as a share of the memory that is free after loading, on any device.
            None: no such cap on a CPU, ``free_gpu_memory_fraction`` on CUDA.
        free_gpu_memory_fraction: Share of the free GPU memory after loading; not used on CPU.
        dtype: Storage of K and V; only 'auto' (as the engine was built) can be asked for here.
    """

    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    tokens_per_block: int | None = None
    max_tokens: int | None = None
    max_total_bytes: int | None = None
    memory_fraction: float | None = None
    free_gpu_memory_fraction: float = 0.9
    dtype: Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        check_at_least("tokens_per_block", self.tokens_per_block, 1)
        check_at_least("max_tokens", self.max_tokens, 1)
        check_at_least("max_total_bytes", self.max_total_bytes, 1)
        for name in ("memory_fraction", "free_gpu_memory_fraction"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ConfigError(f"{name} is {share}; it must be in (0, 1]")
        check_choice("kv_cache_config.dtype", self.dtype, ("auto",))


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """What ``llmserve build`` fixes in an engine; a server may lower these and never raise them.

    Attributes:
        max_batch_size: Most requests in one step.
        max_num_tokens: Most tokens computed in one step, prefill and decode together.
        max_seq_len: Longest prompt plus answer in tokens; None takes max_position_embeddings.
        tokens_per_block: Tokens in one KV cache block.
    """

    max_batch_size: int = 2048
    max_num_tokens: int = 8192
    max_seq_len: int | None = None
    tokens_per_block: int = 32

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "tokens_per_block"):
            check_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class NGramDecodingConfig:
    """Speculative decoding by prompt lookup: what followed the last few tokens where they stood
    before is guessed to follow again. TensorRT-LLM's names.

    Attributes:
        max_draft_len: Most tokens guessed at a time.
        max_matching_ngram_size: Most last tokens that are looked up, the longest match wins.
    """

    max_draft_len: int = 8
    max_matching_ngram_size: int = 4

    def __post_init__(self) -> None:
        check_at_least("max_draft_len", self.max_draft_len, 1)
        check_at_least("max_matching_ngram_size", self.max_matching_ngram_size, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What an engine is started with. None means: as the engine was built.

    Attributes:
        max_batch_size: Most requests in one step.
        max_num_tokens: Most tokens computed in one step.
        max_seq_len: Longest prompt plus answer in tokens.
        kv_cache: The paged KV cache.
        capacity_scheduler_policy: guaranteed_no_evict or max_utilization, as TensorRT-LLM has them.
        enable_chunked_prefill: Let a prompt be computed over several steps.
        speculative: Guess tokens and verify several in a step; None: never. It changes no token
            beyond what rounding in another batch shape does, and nothing under ``deterministic``.
        deterministic: A request's tokens and logprobs are the same bits whatever runs beside it,
            was reused or was paused. On a CPU alone.
        max_queue_size: Most requests that may wait; one more is refused as overload.
        threads: Compute threads, of all ranks together and at least one of each; None takes
            OMP_NUM_THREADS where that is set, and otherwise one for a small model and the cores of
            the cgroup for a larger one, less one from four on.
        device: 'auto' takes CUDA where there is a GPU; of several ranks, rank r takes cuda:r.
        stall_timeout_s: Requests run and for so long no step ends, and on a CPU nothing is computed
            either: the engine counts as hung.
    """

    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    kv_cache: KvCacheConfig = field(default_factory=KvCacheConfig)
    capacity_scheduler_policy: CapacitySchedulerPolicy = "guaranteed_no_evict"
    enable_chunked_prefill: bool = True
    speculative: NGramDecodingConfig | None = None
    deterministic: bool = False
    max_queue_size: int = 4096
    threads: int | None = None
    device: str = "auto"
    stall_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "threads"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("max_queue_size", self.max_queue_size, 1)
        check_at_least("stall_timeout_s", self.stall_timeout_s, 0.1)
        check_choice(
            "capacity_scheduler_policy",
            self.capacity_scheduler_policy,
            get_args(CapacitySchedulerPolicy),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """The text that activation ranges are measured on.

    Attributes:
        path: A .jsonl, .txt or .safetensors file, or a directory of the first two; None takes the
            text that ships with llmserve.
        samples: Most sequences that are run.
        seq_len: Most tokens of one; a longer document gives several.
        seed: Of the choice among more documents than ``samples``.
    """

    path: Path | None = None
    samples: int = 512
    seq_len: int = 512
    seed: int = 1234

    def __post_init__(self) -> None:
        check_at_least("calib_samples", self.samples, 1)
        check_at_least("calib_seq_len", self.seq_len, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityConfig:
    """How a quantised model is held against the one it was made from.

    Attributes:
        measure: Whether to run both at all; a limit asks for it too.
        text: Held-out text, as ``CalibrationConfig.path``; None takes what ships with llmserve.
        samples: Most sequences that are run.
        seq_len: Most tokens of one.
        seed: Of the choice among more documents than ``samples``.
        max_kl: Largest mean KL divergence that passes, in nats a token; None: any.
        min_top1: Smallest share of positions with the same likeliest token that passes, from 0 to
            1; None: any.
    """

    measure: bool = False
    text: Path | None = None
    samples: int = 128
    seq_len: int = 512
    seed: int = 1234
    max_kl: float | None = None
    min_top1: float | None = None

    def __post_init__(self) -> None:
        check_at_least("quality_samples", self.samples, 1)
        # The first token of a sequence is predicted by nothing.
        check_at_least("quality_seq_len", self.seq_len, 2)
        check_at_least("max_kl", self.max_kl, 0)
        check_at_least("min_top1", self.min_top1, 0)
        if self.min_top1 is not None and self.min_top1 > 1:
            raise ConfigError(f"min_top1 is {self.min_top1}; it is a share and must be at most 1")

    @property
    def wanted(self) -> bool:
        """Whether both models are to be run."""
        return self.measure or self.max_kl is not None or self.min_top1 is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertConfig:
    """What a conversion makes.

    Attributes:
        quant: One of ``QUANT_ALGOS``: how weights are stored.
        kv_cache_dtype: One of ``KV_CACHE_QUANT_ALGOS``: how K and V will be stored.
        dtype: Of all that is not quantised; 'auto' is the source's own.
        tp_size: Tensor-parallel ranks, a file each.
        smoothquant_val: SmoothQuant's alpha in [0, 1]; of int8_sq alone.
        checkpoint_format: 'tensorrt-llm' for TensorRT-LLM up to 1.2 and the native engine, 'hf' for
            a Hugging Face checkpoint quantised as ModelOpt does, for TensorRT-LLM 1.3+ and others.
    """

    quant: str = "none"
    kv_cache_dtype: str = "auto"
    dtype: DType = "auto"
    tp_size: int = 1
    smoothquant_val: float = 0.5
    checkpoint_format: CheckpointFormat = "tensorrt-llm"

    def __post_init__(self) -> None:
        check_choice("quant", self.quant, tuple(QUANT_ALGOS))
        check_choice("kv_cache_dtype", self.kv_cache_dtype, tuple(KV_CACHE_QUANT_ALGOS))
        check_choice("dtype", self.dtype, get_args(DType))
        check_choice("checkpoint_format", self.checkpoint_format, CHECKPOINT_FORMATS)
        check_at_least("tp_size", self.tp_size, 1)
        check_at_least("smoothquant_val", self.smoothquant_val, 0)
        if self.smoothquant_val > 1:
            raise ConfigError(f"smoothquant_val is {self.smoothquant_val}; it must be at most 1")
        if self.checkpoint_format == "hf" and self.tp_size != 1:
            raise ConfigError(
                f"tp_size is {self.tp_size}; a Hugging Face checkpoint has no ranks: whoever loads "
                "it splits it"
            )

    @property
    def calibrated(self) -> bool:
        """Whether the ranges of activations are needed, and so a text to find them on."""
        return self.quant in ("fp8", "int8_sq") or self.kv_cache_dtype != "auto"

    @property
    def quant_algo(self) -> str | None:
        """As in config.json."""
        return QUANT_ALGOS[self.quant]

    @property
    def kv_cache_quant_algo(self) -> str | None:
        """As in config.json."""
        return KV_CACHE_QUANT_ALGOS[self.kv_cache_dtype]
