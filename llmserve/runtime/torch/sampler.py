"""Draws the next token of every row of a batch, on the device, without a Python loop over tokens.

The order is that of transformers and vLLM::

    logits -> bias -> penalties -> bans -> temperature -> min_p, top_k, top_p -> draw

A draw is the inverse of the distribution function over the vocabulary's own order, at a uniform
number that Philox makes of (seed, sequence index, position): what else is in the batch, how the
prompt was chunked, how often the request was preempted and what was guessed cannot change it.
Features that no row of a batch asks for cost nothing; a greedy batch is an argmax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from llmserve.core.request import TokenLogprobs
from llmserve.runtime.memory import MAX_SAMPLED_LOGITS
from llmserve.runtime.torch.attention_plan import to_device
from llmserve.runtime.torch.kernels.elementwise import MKL_GRAIN, whole_vectors
from llmserve.runtime.torch.kernels.philox import uniform
from llmserve.runtime.torch.logprobs import row_logprobs
from llmserve.runtime.torch.sampling_table import NO_LOGPROBS, Int64Array, SampledRows

RowMasks = Mapping[int, npt.NDArray[np.int32]]
"""By row, int32 (ceil(vocab / 32),): bit i % 32 of word i // 32 says whether token i may be."""

# What may be wrong with a row: the model's logits, or that bans leave it no token.
NOT_FINITE, ALL_BANNED = 1, 2

# top_p is first tried on so many of the likeliest tokens: sorting a whole vocabulary takes longer
# than all else here.
_LIKELIEST = 1024
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What was drawn.

    Attributes:
        token_ids: int64 (rows,) on the device.
        faults: int64 (rows,) on the device: 0, or NOT_FINITE where the logits hold NaN or
            +infinity, or ALL_BANNED; such a row's token means nothing.
        logprobs: By row, for those that asked.
    """

    token_ids: torch.Tensor
    faults: torch.Tensor
    logprobs: dict[int, TokenLogprobs]


def sample(
    logits: torch.Tensor,
    rows: SampledRows,
    token_buffer: torch.Tensor,
    masks: RowMasks | None = None,
) -> Sampled:
    """Draw one token per row.

    Args:
        logits: float32 (rows, vocab), of the model; not changed.
        rows: Who samples, in the same order.
        token_buffer: int (slots, length): the tokens so far, for penalties.
        masks: Of the rows that may not draw every token.
    """
    masks = masks or {}
    size = max(1, MAX_SAMPLED_LOGITS // logits.shape[1])
    if len(rows) <= size:
        return _sample(logits, rows, token_buffer, masks)
    starts = range(0, len(rows), size)
    parts = [
        _sample(
            logits[start : start + size],
            rows.take(slice(start, start + size)),
            token_buffer,
            {row - start: mask for row, mask in masks.items() if 0 <= row - start < size},
        )
        for start in starts
    ]
    return Sampled(
        token_ids=torch.cat([part.token_ids for part in parts]),
        faults=torch.cat([part.faults for part in parts]),
        logprobs={
            start + row: logprobs
            for start, part in zip(starts, parts, strict=True)
            for row, logprobs in part.logprobs.items()
        },
    )


def _sample(
    logits: torch.Tensor, rows: SampledRows, token_buffer: torch.Tensor, masks: RowMasks
) -> Sampled:
    scores = _adjusted(logits, rows, token_buffer, masks)
    best, token_ids = scores.max(dim=-1)  # NaN is larger than anything, and +infinity than the rest
    drawn = np.flatnonzero(~rows.settings["greedy"])
    if len(drawn):
        index = to_device(drawn, logits.device)
        part = scores if len(drawn) == len(rows) else scores.index_select(0, index)
        sampled = rows.take(drawn)
        chosen = _draw(_filtered(part, sampled.settings), sampled)
        token_ids = token_ids.index_copy(0, index, chosen)
    banned = best == float("-inf")
    faults = torch.where(banned, ALL_BANNED, torch.where(best.isfinite(), 0, NOT_FINITE))
    return Sampled(
        token_ids=token_ids, faults=faults, logprobs=_logprobs(logits, token_ids, rows.settings)
    )


def _adjusted(
    logits: torch.Tensor, rows: SampledRows, token_buffer: torch.Tensor, masks: RowMasks
) -> torch.Tensor:
    """The logits with biases, penalties and bans; itself if there are none."""
    settings = rows.settings
    end_banned = rows.positions < settings["end_banned_before"]
    touched = settings["biased"] | settings["penalized"] | end_banned
    touched[list(masks)] = True
    changed = np.flatnonzero(touched)
    if not len(changed):
        return logits
    index, part = to_device(changed, logits.device), rows.take(changed)
    scores = logits.index_select(0, index)
    _add_biases_(scores, part)
    _penalize_(scores, part, token_buffer)
    _ban_ends_(scores, part, end_banned[changed])
    if masks:
        _ban_masked_(scores, {int(np.searchsorted(changed, row)): masks[row] for row in masks})
    return scores if len(changed) == len(rows) else logits.index_copy(0, index, scores)


def _add_biases_(scores: torch.Tensor, rows: SampledRows) -> None:
    biased = np.flatnonzero(rows.settings["biased"])
    if not len(biased):
        return
    token_ids, values = zip(
        *(rows.biases[slot] for slot in rows.slots[biased].tolist()), strict=True
    )
    index = _ragged_index(biased, token_ids, scores.device)
    scores.index_put_(index, to_device(np.concatenate(values), scores.device), accumulate=True)


def _ban_ends_(scores: torch.Tensor, rows: SampledRows, end_banned: npt.NDArray[np.bool_]) -> None:
    banned = np.flatnonzero(end_banned)
    if not len(banned):
        return
    token_ids = [rows.end_token_ids[slot] for slot in rows.slots[banned].tolist()]
    scores[_ragged_index(banned, token_ids, scores.device)] = float("-inf")


def _ragged_index(
    rows: Int64Array, token_ids: Sequence[Int64Array], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of some tokens of each row."""
    repeated = np.repeat(rows, [len(ids) for ids in token_ids])
    return to_device(repeated, device), to_device(np.concatenate(token_ids), device)


def _ban_masked_(scores: torch.Tensor, masks: RowMasks) -> None:
    device, vocab = scores.device, scores.shape[1]
    index = torch.tensor(list(masks), device=device)
    # Words are little-endian: byte by byte their bits are in the order of the tokens.
    packed = to_device(np.stack(list(masks.values())).view(np.uint8), device)
    bits = (packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=device)) & 1
    banned = bits.flatten(1)[:, :vocab] == 0
    scores.index_copy_(0, index, scores.index_select(0, index).masked_fill_(banned, float("-inf")))


def _penalize_(scores: torch.Tensor, rows: SampledRows, token_buffer: torch.Tensor) -> None:
    """Apply repetition, presence and frequency penalties."""
    penalized = np.flatnonzero(rows.settings["penalized"])
    if not len(penalized):
        return
    device, vocab = scores.device, scores.shape[1]
    index, rows = to_device(penalized, device), rows.take(penalized)
    settings = rows.settings
    lengths = to_device(rows.positions, device)[:, None]
    prompts = to_device(settings["num_prompt_tokens"].copy(), device)[:, None]
    # Tokens beyond a row's own count fall into one more column, which is then dropped.
    slots = to_device(rows.slots, device)
    tokens = token_buffer[:, : int(rows.positions.max())].index_select(0, slots)
    positions = torch.arange(tokens.shape[1], device=device)
    tokens = tokens.long().masked_fill_(positions >= lengths, vocab)
    counts = torch.zeros(len(rows), vocab + 1, device=device)
    generated = (positions >= prompts).float().expand_as(tokens)
    answer_counts = counts.scatter_add(1, tokens, generated)[:, :vocab]
    seen = counts.scatter_(1, tokens, 1.0)[:, :vocab] > 0
    repetition = _column(settings["repetition_penalty"], device)
    presence = _column(settings["presence_penalty"], device)
    frequency = _column(settings["frequency_penalty"], device)
    part = scores.index_select(0, index)
    repeated = torch.where(part > 0, part / repetition, part * repetition)
    part = torch.where(seen, repeated, part)
    part -= frequency * answer_counts + presence * (answer_counts > 0)
    scores.index_copy_(0, index, part)


def _filtered(scores: torch.Tensor, settings: npt.NDArray[np.void]) -> torch.Tensor:
    """Probabilities (rows, vocab), not normalised, 0 where min_p, top_k or top_p exclude."""
    device, vocab = scores.device, scores.shape[1]
    # What rounds to 0 or to infinity would make NaN of the likeliest token or of a banned one.
    temperature = _column(settings["temperature"], device).clamp_(_FLOAT32.tiny, _FLOAT32.max)
    # The likeliest token becomes 1, so nothing overflows however small the temperature is.
    room, weights = whole_vectors(scores - scores.amax(dim=-1, keepdim=True), MKL_GRAIN)
    weights.div_(temperature)
    room.exp_()
    if settings["min_p"].any():
        weights.masked_fill_(weights < _column(settings["min_p"], device), 0)
    top_k = np.where(settings["top_k"] == 0, vocab, np.minimum(settings["top_k"], vocab))
    if top_k.min() == vocab and settings["top_p"].min() == 1.0:
        return weights
    # However small top_p is, the likeliest token stays.
    limits = (
        to_device(top_k, device)[:, None],
        _column(settings["top_p"], device).clamp_(_FLOAT32.tiny),
    )
    width = min(vocab, max(_LIKELIEST, *top_k[top_k < vocab].tolist(), 0))
    kept, complete = _keep_likeliest(weights, *limits, width)
    if width < vocab and not bool(complete.all()):
        # Rare: a distribution so flat that p of it is not among the likeliest few.
        rest = (~complete).nonzero()[:, 0]
        part = [tensor.index_select(0, rest) for tensor in (weights, *limits)]
        kept.index_copy_(0, rest, _keep_likeliest(part[0], part[1], part[2], vocab)[0])
    return kept


def _keep_likeliest(
    weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero all but the top_k likeliest, then all but the fewest of these that hold top_p of them.

    Args:
        weights: (rows, vocab); not changed.
        top_k: int64 (rows, 1); vocab keeps all.
        top_p: float32 (rows, 1); 1 keeps all.
        width: How many of the likeliest are looked at; at least every top_k below vocab.

    Returns:
        The weights that are left (rows, vocab), and bool (rows,): whether ``width`` was enough.
    """
    vocab = weights.shape[1]
    ordered, ids = weights.topk(width, dim=-1)
    ordered.masked_fill_(torch.arange(width, device=weights.device) >= top_k, 0)
    cumulative = ordered.cumsum(dim=-1, dtype=torch.float64)
    unlimited = top_k == vocab
    total = cumulative[:, -1:]
    if width < vocab:
        total = total.where(~unlimited, _row_sums(weights))
    # A token stays if those before it do not reach p of the mass that top_k has left.
    target = top_p.double() * total
    excluded = (cumulative - ordered >= target) & (top_p < 1.0)
    ordered.masked_fill_(excluded, 0)
    complete = ~unlimited | (cumulative[:, -1:] >= target)
    kept = torch.zeros_like(weights).scatter_(1, ids, ordered)
    if width < vocab:
        # Without any limit all of a row stays, and not only what was looked at.
        free = unlimited & (top_p >= 1.0)
        kept, complete = torch.where(free, weights, kept), complete | free
    return kept, complete[:, 0]


def _row_sums(weights: torch.Tensor) -> torch.Tensor:
    """float64 (rows, 1), the same bits in any batch."""
    # A single row is cut up among the threads, and so added up in another order: never alone.
    several = weights if len(weights) > 1 else weights.expand(2, -1)
    return several.sum(dim=-1, keepdim=True, dtype=torch.float64)[: len(weights)]


def _draw(weights: torch.Tensor, rows: SampledRows) -> torch.Tensor:
    """One token id per row of weights (rows, vocab), int64."""
    settings = rows.settings
    key = np.stack((settings["seed"], settings["sequence_index"], rows.positions))
    seed, sequence_index, position = to_device(key, weights.device)
    # In float64: a float32 sum over a large vocabulary loses the tail.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    target = uniform(seed, sequence_index, position)[:, None] * total
    drawn = torch.searchsorted(cumulative, target, right=True)
    # u * total may round up to total, and past the last token that has any weight.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last).squeeze(1).clamp_(max=weights.shape[1] - 1)


def _logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, settings: npt.NDArray[np.void]
) -> dict[int, TokenLogprobs]:
    asked = np.flatnonzero(settings["logprobs"] != NO_LOGPROBS)
    if not len(asked):
        return {}
    index, wanted = to_device(asked, logits.device), settings["logprobs"][asked].tolist()
    found = row_logprobs(
        logits.index_select(0, index), token_ids.index_select(0, index), max(wanted)
    )
    return dict(zip(asked.tolist(), found.fetch(wanted), strict=True))


def _column(values: npt.NDArray[np.float64], device: torch.device) -> torch.Tensor:
    """float32 (n, 1)."""
    return to_device(values.copy(), device).float()[:, None]
