"""Draws the next token of every row of a batch, on the device, without a Python loop over tokens.

The order is that of transformers and vLLM::

    logits -> penalties -> temperature -> min_p, top_k, top_p -> draw

A draw is the inverse of the distribution function over the vocabulary's own order, at a uniform
number that Philox makes of (seed, sequence index, position): what else is in the batch, how the
prompt was chunked and how often the request was preempted cannot change it. Features that no row
of a batch asks for cost nothing; a greedy batch is an argmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmserve.core.request import TokenLogprobs
from llmserve.core.sampling_params import SamplingParams
from llmserve.runtime.memory import MAX_SAMPLED_LOGITS
from llmserve.runtime.torch.input_batch import SampledRow
from llmserve.runtime.torch.kernels.philox import uniform

# top_p is first tried on so many of the likeliest tokens: sorting a whole vocabulary takes longer
# than all else here.
_LIKELIEST = 1024
_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What was drawn.

    Attributes:
        token_ids: int64 (rows,) on the device.
        valid: bool (rows,) on the device: False where the logits hold NaN or +infinity; such a
            row's token means nothing.
        logprobs: By row, for those that asked.
    """

    token_ids: torch.Tensor
    valid: torch.Tensor
    logprobs: dict[int, TokenLogprobs]


def sample(logits: torch.Tensor, rows: Sequence[SampledRow], token_buffer: torch.Tensor) -> Sampled:
    """Draw one token per row.

    Args:
        logits: float32 (rows, vocab), of the model; not changed.
        rows: Who samples, in the same order.
        token_buffer: int (slots, length): the tokens so far, for penalties.
    """
    size = max(1, MAX_SAMPLED_LOGITS // logits.shape[1])
    if len(rows) <= size:
        return _sample(logits, rows, token_buffer)
    starts = range(0, len(rows), size)
    parts = [_sample(logits[i : i + size], rows[i : i + size], token_buffer) for i in starts]
    return Sampled(
        token_ids=torch.cat([part.token_ids for part in parts]),
        valid=torch.cat([part.valid for part in parts]),
        logprobs={
            start + row: logprobs
            for start, part in zip(starts, parts, strict=True)
            for row, logprobs in part.logprobs.items()
        },
    )


def _sample(
    logits: torch.Tensor, rows: Sequence[SampledRow], token_buffer: torch.Tensor
) -> Sampled:
    params = [row.sampling_params for row in rows]
    scores = _penalized(logits, rows, token_buffer)
    best, token_ids = scores.max(dim=-1)  # NaN is larger than anything, and +infinity than the rest
    drawn = [i for i, p in enumerate(params) if not p.greedy]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        part = scores if len(drawn) == len(rows) else scores.index_select(0, index)
        chosen = _draw(_filtered(part, [params[i] for i in drawn]), [rows[i] for i in drawn])
        token_ids = token_ids.index_copy(0, index, chosen)
    wanted = {i: p.logprobs for i, p in enumerate(params) if p.logprobs is not None}
    logprobs = _logprobs(logits, token_ids, wanted) if wanted else {}
    return Sampled(token_ids=token_ids, valid=best.isfinite(), logprobs=logprobs)


def _penalized(
    logits: torch.Tensor, rows: Sequence[SampledRow], token_buffer: torch.Tensor
) -> torch.Tensor:
    """The logits with repetition, presence and frequency penalties; itself if there are none."""
    touched = [i for i, row in enumerate(rows) if _has_penalties(row.sampling_params)]
    if not touched:
        return logits
    device, vocab = logits.device, logits.shape[1]
    chosen = [rows[i] for i in touched]
    index = torch.tensor(touched, device=device)
    slots = torch.tensor([row.slot for row in chosen], device=device)
    lengths = torch.tensor([[row.position] for row in chosen], device=device)
    prompts = torch.tensor([[row.num_prompt_tokens] for row in chosen], device=device)
    # Tokens beyond a row's own count fall into one more column, which is then dropped.
    tokens = token_buffer[:, : int(max(row.position for row in chosen))].index_select(0, slots)
    positions = torch.arange(tokens.shape[1], device=device)
    tokens = tokens.long().masked_fill_(positions >= lengths, vocab)
    counts = torch.zeros(len(chosen), vocab + 1, device=device)
    generated = (positions >= prompts).float().expand_as(tokens)
    answer_counts = counts.scatter_add(1, tokens, generated)[:, :vocab]
    seen = counts.scatter_(1, tokens, 1.0)[:, :vocab] > 0
    repetition = _column(chosen, "repetition_penalty", device)
    presence = _column(chosen, "presence_penalty", device)
    frequency = _column(chosen, "frequency_penalty", device)
    part = logits.index_select(0, index)
    repeated = torch.where(part > 0, part / repetition, part * repetition)
    part = torch.where(seen, repeated, part)
    part -= frequency * answer_counts + presence * (answer_counts > 0)
    return logits.index_copy(0, index, part)


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _filtered(scores: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Probabilities (rows, vocab), not normalised, 0 where min_p, top_k or top_p exclude."""
    device, vocab = scores.device, scores.shape[1]
    temperature = _values([1.0 if p.temperature is None else p.temperature for p in params], device)
    # What rounds to 0 or to infinity would make NaN of the likeliest token or of a banned one.
    temperature.clamp_(_FLOAT32.tiny, _FLOAT32.max)
    # The likeliest token becomes 1, so nothing overflows however small the temperature is.
    weights = (scores - scores.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    if any(p.min_p for p in params):
        weights.masked_fill_(weights < _values([p.min_p or 0.0 for p in params], device), 0)
    top_k = [min(p.top_k or vocab, vocab) for p in params]
    top_p = [1.0 if p.top_p is None else p.top_p for p in params]
    if min(top_k) == vocab and min(top_p) == 1.0:
        return weights
    # However small top_p is, the likeliest token stays.
    limits = (
        torch.tensor(top_k, device=device)[:, None],
        _values(top_p, device).clamp_(_FLOAT32.tiny),
    )
    width = min(vocab, max(_LIKELIEST, *(k for k in top_k if k < vocab), 0))
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
        total = total.where(~unlimited, weights.sum(dim=-1, keepdim=True, dtype=torch.float64))
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


def _draw(weights: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
    """One token id per row of weights (rows, vocab), int64."""
    device = weights.device
    seeds = [_signed(_seed(row.sampling_params)) for row in rows]
    key = torch.tensor(
        [seeds, [row.sequence_index for row in rows], [row.position for row in rows]], device=device
    )
    # In float64: a float32 sum over a large vocabulary loses the tail.
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:].contiguous()
    target = uniform(key[0], key[1], key[2])[:, None] * total
    drawn = torch.searchsorted(cumulative, target, right=True)
    # u * total may round up to total, and past the last token that has any weight.
    last = torch.searchsorted(cumulative, total)
    return torch.minimum(drawn, last).squeeze(1).clamp_(max=weights.shape[1] - 1)


def _seed(params: SamplingParams) -> int:
    if params.seed is None:
        raise ValueError("seed is None; it must be resolved before a request reaches the runner")
    return params.seed


def _signed(seed: int) -> int:
    """The int64 with the same 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63


def _logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, wanted: dict[int, int]
) -> dict[int, TokenLogprobs]:
    """Log-probabilities of the rows in ``wanted`` (row -> how many of the likeliest)."""
    index = torch.tensor(list(wanted), device=logits.device)
    values = logits.index_select(0, index).log_softmax(dim=-1)
    chosen = values.gather(1, token_ids.index_select(0, index)[:, None])
    ranks = (values > chosen).sum(dim=-1) + 1
    most = min(max(wanted.values()), logits.shape[1])
    top_values, top_ids = values.topk(most, dim=-1)
    columns = zip(
        wanted.items(),
        chosen[:, 0].tolist(),
        ranks.tolist(),
        top_ids.tolist(),
        top_values.tolist(),
        strict=True,
    )
    return {
        row: TokenLogprobs(logprob, rank, tuple(ids[:k]), tuple(values[:k]))
        for (row, k), logprob, rank, ids, values in columns
    }


def _column(rows: Sequence[SampledRow], name: str, device: torch.device) -> torch.Tensor:
    return _values([getattr(row.sampling_params, name) for row in rows], device)


def _values(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """float32 (n, 1)."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
