"""Its parameter classes: the fields that are described, their rules, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any


@dataclass(slots=True, kw_only=True)
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int | None = 32
    bad: Any = None
    bad_token_ids: list[int] | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    embedding_bias: Any = None
    logits_processor: Any = None
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    top_k: int | None = None
    top_p: float | None = None
    top_p_min: float | None = None
    top_p_reset_ids: int | None = None
    top_p_decay: float | None = None
    seed: int | None = None
    temperature: float | None = None
    min_tokens: int | None = None
    beam_search_diversity_rate: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    prompt_ignore_length: int | None = None  # 1.2 and later
    length_penalty: float | None = None
    early_stopping: int | None = None
    no_repeat_ngram_size: int | None = None
    min_p: float | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    guided_decoding: Any = None
    ignore_eos: bool = False
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.pad_id is None:
            self.pad_id = self.end_id
        self.best_of = self.best_of or self.n
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k {self.top_k}")
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"temperature {self.temperature}")
        if self.best_of < self.n:
            raise ValueError(f"best_of {self.best_of} < n {self.n}")
        if self.best_of > 1 and self.greedy:
            raise ValueError("greedy decoding allows no multiple returns")

    @property
    def greedy(self) -> bool:
        """The API's rule."""
        if self.temperature is None and self.top_p is None and self.top_k is None:
            return True
        return self.top_k == 1 or self.top_p == 0 or self.temperature == 0

    @property
    def runtime_greedy(self) -> bool:
        """The C++ runtime's: its defaults are top_k 0 and top_p 0, and both together are greedy."""
        return self.greedy or (not self.top_k and not self.top_p)


class CapacitySchedulerPolicy(Enum):
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    MAX_UTILIZATION = "MAX_UTILIZATION"
    STATIC_BATCH = "STATIC_BATCH"


class _Strict:
    """Keyword arguments alone, and only those with a default here."""

    defaults: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        if unknown := set(kwargs) - set(self.defaults):
            raise ValueError(f"{type(self).__name__}: extra inputs are not permitted: {unknown}")
        self.__dict__.update({**self.defaults, **kwargs})


class KvCacheConfig(_Strict):
    defaults = {  # noqa: RUF012
        "enable_block_reuse": True,
        "max_tokens": None,
        "max_attention_window": None,
        "sink_token_length": None,
        "free_gpu_memory_fraction": 0.9,
        "host_cache_size": None,
        "onboard_blocks": True,
        "cross_kv_cache_fraction": None,
        "secondary_offload_min_priority": None,
        "event_buffer_max_size": 0,
        "enable_partial_reuse": True,
        "copy_on_partial_reuse": True,
        "max_gpu_total_bytes": 0,
        "dtype": "auto",
        "tokens_per_block": 32,
    }


class SchedulerConfig(_Strict):
    defaults = {  # noqa: RUF012
        "capacity_scheduler_policy": CapacitySchedulerPolicy.GUARANTEED_NO_EVICT,
        "context_chunking_policy": None,
        "dynamic_batch_config": None,
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(self.capacity_scheduler_policy, CapacitySchedulerPolicy):
            raise ValueError("capacity_scheduler_policy is no CapacitySchedulerPolicy")


def parameters(params: SamplingParams) -> dict[str, Any]:
    """Those that are not at their default, for tests."""
    default = SamplingParams()
    return {
        field.name: getattr(params, field.name)
        for field in fields(params)
        if getattr(params, field.name) != getattr(default, field.name)
    }
