"""The sampling settings of all known requests as arrays by slot, so that a step takes those of its
rows at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest

Int64Array = npt.NDArray[np.int64]

NO_LOGPROBS = -1
"""In ``logprobs`` and ``prompt_logprobs`` of ``SETTINGS``: none are wanted."""

SETTINGS = np.dtype(
    [
        ("seed", np.int64),  # all 64 bits count
        ("sequence_index", np.int64),
        ("num_prompt_tokens", np.int64),
        ("greedy", np.bool_),
        ("temperature", np.float64),
        ("top_k", np.int64),  # 0 keeps all
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("penalized", np.bool_),  # whether any of the next three does anything
        ("repetition_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("frequency_penalty", np.float64),
        ("biased", np.bool_),
        ("end_banned_before", np.int64),  # a position; 0 where nothing is banned
        ("logprobs", np.int64),
        ("prompt_logprobs", np.int64),
    ]
)
"""What a request asks for, with its defaults resolved: names and units of ``SamplingParams``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledRows:
    """The rows of a step whose next token is drawn.

    Attributes:
        slots: int64 (rows,): rows of the token buffer.
        positions: int64 (rows,): index of the token to draw: the number of those before it.
        settings: ``SETTINGS`` (rows,).
        biases: By slot, for those that are ``biased``: token ids and what is added to their logits.
        end_token_ids: By slot, for those with ``end_banned_before``: tokens that end the answer.
    """

    slots: Int64Array
    positions: Int64Array
    settings: npt.NDArray[Any]
    biases: Mapping[int, tuple[Int64Array, npt.NDArray[np.float32]]] = field(default_factory=dict)
    end_token_ids: Mapping[int, Int64Array] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.slots)

    def take(self, rows: slice | Int64Array) -> SampledRows:
        """Some of them, in the order asked for."""
        return SampledRows(
            slots=self.slots[rows],
            positions=self.positions[rows],
            settings=self.settings[rows],
            biases=self.biases,
            end_token_ids=self.end_token_ids,
        )


class SamplingTable:
    """The settings by slot.

    Args:
        num_slots: Slots there are.
        vocab_size: Tokens that can be drawn.
    """

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._settings = np.zeros(num_slots, dtype=SETTINGS)
        self._biases: dict[int, tuple[Int64Array, npt.NDArray[np.float32]]] = {}
        self._end_token_ids: dict[int, Int64Array] = {}

    def learn(self, slot: int, new: NewRequest) -> None:
        """Put a request into a slot.

        Raises:
            ValueError: It is to be sampled and its seed is None.
        """
        params = new.sampling_params
        # A token that the model does not have cannot be drawn, and there is nothing to ban or bias.
        bias = [(t, value) for t, value in params.logit_bias if t < self._vocab_size]
        ends = {t for t in (*new.eos_token_ids, *params.stop_token_ids) if t < self._vocab_size}
        banned_before = new.num_prompt_tokens + params.min_tokens if ends else 0
        self._settings[slot] = (
            _signed(_seed(params)),
            new.sequence_index,
            new.num_prompt_tokens,
            params.greedy,
            _given(params.temperature, 1.0),
            params.top_k or 0,
            _given(params.top_p, 1.0),
            params.min_p or 0.0,
            _penalizes(params),
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            bool(bias),
            banned_before if params.min_tokens else 0,
            _given(params.logprobs, NO_LOGPROBS),
            _given(params.prompt_logprobs, NO_LOGPROBS),
        )
        if bias:
            token_ids, values = zip(*bias, strict=True)
            self._biases[slot] = _token_ids(token_ids), np.array(values, dtype=np.float32)
        if ends and params.min_tokens:
            self._end_token_ids[slot] = _token_ids(sorted(ends))

    def prompt_logprobs(self, slot: int) -> tuple[int, int]:
        """How many of the likeliest tokens are wanted at a prompt's positions, or NO_LOGPROBS; and
        the prompt's tokens.
        """
        settings = self._settings[slot]
        return int(settings["prompt_logprobs"]), int(settings["num_prompt_tokens"])

    def rows(self, slots: Int64Array, positions: Int64Array) -> SampledRows:
        """Rows that draw the tokens at ``positions`` of the requests in ``slots``, (rows,) each."""
        return SampledRows(
            slots=slots,
            positions=positions,
            settings=self._settings[slots],
            biases=self._biases,
            end_token_ids=self._end_token_ids,
        )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _token_ids(token_ids: Iterable[int]) -> Int64Array:
    return np.array(list(token_ids), dtype=np.int64)


def _penalizes(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _seed(params: SamplingParams) -> int:
    if params.seed is None and not params.greedy:
        raise ValueError("seed is None; it must be resolved before a request reaches the runner")
    return params.seed or 0


def _signed(seed: int) -> int:
    """The int64 with the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
