"""The sampler against plain Python, against transformers' processors, and against chance."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers.generation import logits_process

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest
from llmserve.runtime.torch import sampler
from llmserve.runtime.torch.sampler import ALL_BANNED, NOT_FINITE, RowMasks, Sampled, sample
from llmserve.runtime.torch.sampling_table import SampledRows, SamplingTable

VOCAB = 24
# By slot: the tokens of two requests so far.
BUFFER = torch.tensor([[3, 4, 5, 3, 7, 7, 1, 1], [0, 0, 0, 1, 2, 9, 9, 9]], dtype=torch.int32)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A request that samples the token at ``position`` after those in ``BUFFER``."""

    position: int
    slot: int
    num_prompt: int
    params: SamplingParams
    eos_token_ids: tuple[int, ...]


def _row(
    position: int = 5,
    slot: int = 0,
    num_prompt: int = 3,
    eos_token_ids: tuple[int, ...] = (),
    **params: Any,
) -> Row:
    settings = SamplingParams(**{"seed": 1, **params})
    return Row(
        position=position,
        slot=slot,
        num_prompt=num_prompt,
        params=settings,
        eos_token_ids=eos_token_ids,
    )


def _rows(rows: list[Row], vocab: int = VOCAB) -> SampledRows:
    table = SamplingTable(len(rows), vocab)
    for slot, row in enumerate(rows):
        new = NewRequest(
            request_id=str(slot),
            token_ids=[],
            num_prompt_tokens=row.num_prompt,
            sampling_params=row.params,
            eos_token_ids=row.eos_token_ids,
        )
        table.learn(slot, new)
    return table.rows(np.arange(len(rows)), np.array([row.position for row in rows]))


def _buffer(rows: list[Row]) -> torch.Tensor:
    return BUFFER[[row.slot for row in rows]]


def _settings(params: list[SamplingParams]) -> npt.NDArray[Any]:
    rows = [replace(_row(), params=replace(p, seed=1)) for p in params]
    return _rows(rows).settings


def _logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def _sample(
    logits: torch.Tensor, rows: list[Row], device: str = "cpu", masks: RowMasks | None = None
) -> Sampled:
    return sample(logits.to(device), _rows(rows), _buffer(rows).to(device), masks)


def _adjusted(
    logits: torch.Tensor, rows: list[Row], device: str = "cpu", masks: RowMasks | None = None
) -> torch.Tensor:
    buffer = _buffer(rows).to(device)
    return sampler._adjusted(logits.to(device), _rows(rows), buffer, masks or {}).cpu()


def _mask(*token_ids: int, vocab: int = VOCAB) -> npt.NDArray[np.int32]:
    """A mask that lets these tokens through, written bit by bit."""
    words = [0] * -(-vocab // 32)
    for token in token_ids:
        words[token // 32] |= 1 << token % 32
    return np.array(words, dtype=np.uint32).view(np.int32)


def _probabilities(logits: list[float], params: SamplingParams) -> list[float]:
    """The definition, a token at a time: temperature, then min_p, top_k, top_p."""
    temperature = 1.0 if params.temperature is None else params.temperature
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    weights = [w if w >= (params.min_p or 0.0) * max(weights) else 0.0 for w in weights]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[: params.top_k or len(order)]
    total, mass, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if params.top_p is None or mass < params.top_p * total:
            nucleus.append(i)
        mass += weights[i]
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 5},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.9},
    {"temperature": 2.0, "top_p": 0.95, "min_p": 0.1, "top_k": 10},
    {"temperature": 1e-3, "top_p": 0.5},
    {"top_k": 1000},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("likeliest", [3, 1024])
def test_distribution_is_the_definitions(
    settings: dict[str, Any], likeliest: int, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr(sampler, "_LIKELIEST", likeliest)
    params, logits = SamplingParams(**settings), _logits(3)
    # A flat row, of which few tokens hold little.
    logits[2] *= 0.01
    weights = sampler._filtered(logits.to(device), _settings([params] * 3)).double().cpu()
    actual = weights / weights.sum(-1, keepdim=True)
    for row in range(3):
        expected = torch.tensor(_probabilities(logits[row].tolist(), params), dtype=torch.float64)
        assert torch.allclose(actual[row], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"temperature": 0.7}, [("TemperatureLogitsWarper", (0.7,))]),
        ({"top_k": 4}, [("TopKLogitsWarper", (4,))]),
        ({"top_p": 0.7}, [("TopPLogitsWarper", (0.7,))]),
        ({"min_p": 0.15}, [("MinPLogitsWarper", (0.15,))]),
        (
            {"temperature": 1.4, "top_k": 7, "top_p": 0.8},
            [
                ("TemperatureLogitsWarper", (1.4,)),
                ("TopKLogitsWarper", (7,)),
                ("TopPLogitsWarper", (0.8,)),
            ],
        ),
    ],
    ids=str,
)
def test_distribution_is_that_of_transformers(
    settings: dict[str, Any], processors: list[tuple[str, tuple[float, ...]]]
) -> None:
    logits = _logits(8, 300)
    theirs = logits.clone()
    for name, args in processors:
        theirs = getattr(logits_process, name)(*args)(None, theirs)
    weights = sampler._filtered(logits, _settings([SamplingParams(**settings)] * 8))
    ours = weights / weights.sum(-1, keepdim=True)
    assert torch.allclose(ours, theirs.softmax(-1), atol=1e-6)


def test_settings_of_rows_do_not_mix() -> None:
    logits = _logits(len(SETTINGS))
    params = [SamplingParams(**settings) for settings in SETTINGS]
    together = sampler._filtered(logits, _settings(params))
    for i, p in enumerate(params):
        assert torch.equal(sampler._filtered(logits[i : i + 1], _settings([p]))[0], together[i])


@pytest.mark.parametrize("settings", SETTINGS[:8], ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    draws, logits = 4000, _logits()
    rows = [_row(position=i, **settings) for i in range(draws)]
    counts = Counter(_sample(logits.expand(draws, -1), rows).token_ids.tolist())
    expected = _probabilities(logits[0].tolist(), rows[0].params)
    assert all(expected[token] > 0 for token in counts)
    # Rare tokens are counted together: a chi-square test wants at least five in every cell.
    cells = [(counts[t], p * draws) for t, p in enumerate(expected) if p * draws >= 5]
    rare = (draws - sum(c for c, _ in cells), draws - sum(e for _, e in cells))
    cells += [rare] if rare[1] >= 1 else []
    chi_square = sum((c - e) ** 2 / e for c, e in cells)
    degrees = len(cells) - 1
    assert chi_square <= degrees + 4 * math.sqrt(2 * max(degrees, 1))


def test_draws_do_not_depend_on_the_batch(device: str) -> None:
    rows = [_row(position=i, temperature=1.0 + i / 10, top_p=0.9) for i in range(8)]
    rows[3] = _row(position=3)
    logits = _logits(8)
    together = _sample(logits, rows, device).token_ids.tolist()
    alone = [_sample(logits[i : i + 1], [rows[i]], device).token_ids.item() for i in range(8)]
    assert together == alone
    order = [5, 3, 0, 7]
    assert _sample(logits[order], [rows[i] for i in order], device).token_ids.tolist() == [
        together[i] for i in order
    ]


def test_rows_sampled_in_parts_are_those_sampled_together(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = _logits(rows=7)
    rows = [_row(temperature=1.0, seed=i, logprobs=i % 3 or None) for i in range(7)]
    together = _sample(logits, rows)
    monkeypatch.setattr("llmserve.runtime.torch.sampler.MAX_SAMPLED_LOGITS", 3 * VOCAB)
    parts = _sample(logits, rows)
    assert torch.equal(parts.token_ids, together.token_ids)
    assert torch.equal(parts.faults, together.faults)
    assert parts.logprobs == together.logprobs


def test_draws_depend_on_the_seed_and_the_position() -> None:
    rows = [_row(position=i, temperature=5.0, seed=s) for s in (1, 2, 2**64 - 1) for i in range(20)]
    tokens = _sample(_logits().expand(60, -1), rows).token_ids.view(3, 20)
    for pair in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(tokens[pair[0]], tokens[pair[1]])
    assert len(set(tokens[0].tolist())) > 5


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}])
def test_greedy(settings: dict[str, Any], device: str) -> None:
    logits = _logits(4)
    rows = [_row(position=i, **settings) for i in range(4)]
    assert torch.equal(_sample(logits, rows, device).token_ids.cpu(), logits.argmax(-1))


def test_tiny_temperature_and_tiny_top_p_are_greedy() -> None:
    logits = _logits(4)
    # 1e-300 is 0 in float32, and no token would be left of the rows that have it.
    rows = [_row(temperature=1e-60), _row(top_p=1e-9), _row(top_p=1e-300)]
    rows.append(_row(top_p=1e-300, top_k=3, temperature=2.0))
    assert torch.equal(_sample(logits, rows).token_ids, logits.argmax(-1))


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits, theirs = _logits(), _logits()
    processor = logits_process.RepetitionPenaltyLogitsProcessor(1.7)
    theirs = processor(BUFFER[:1, :5].long(), theirs)
    ours = _adjusted(logits, [_row(repetition_penalty=1.7)])
    assert torch.allclose(ours, theirs)
    assert torch.equal(logits, _logits())


def test_presence_and_frequency_count_the_answer_alone(device: str) -> None:
    # Slot 0 holds the prompt 3 4 5 and the answer 3 7; slot 1 the prompt 0 0 0 1 and 2 9 9.
    rows = [
        _row(position=5, frequency_penalty=0.5, presence_penalty=2.0),
        _row(position=3),
        _row(position=7, slot=1, num_prompt=4, frequency_penalty=-1.0),
    ]
    logits, expected = _logits(3), _logits(3)
    for token in (3, 7):
        expected[0, token] -= 0.5 + 2.0
    expected[2, 2] += 1.0
    expected[2, 9] += 2.0
    actual = _adjusted(logits, rows, device)
    assert torch.allclose(actual, expected)


def test_penalties_change_greedy_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 2] = 3.0, 2.5
    assert _sample(logits, [_row()]).token_ids.item() == 7
    assert _sample(logits, [_row(frequency_penalty=1.0)]).token_ids.item() == 2


def test_logit_bias_is_added_before_penalties(device: str) -> None:
    logits = _logits(3)
    rows = [
        _row(logit_bias={7: 4.0, 3: -100.0, VOCAB + 5: 100.0}),
        _row(),
        # Twice the same: both count.
        _row(logit_bias=((7, 1.0), (7, 2.0)), repetition_penalty=2.0),
    ]
    expected = logits.clone()
    expected[0, 7] += 4.0
    expected[0, 3] -= 100.0
    expected[2, 7] += 3.0
    for token in (3, 4, 5, 7):
        expected[2, token] *= 0.5 if expected[2, token] > 0 else 2.0
    assert torch.allclose(_adjusted(logits, rows, device), expected)
    assert torch.equal(logits, _logits(3))


def test_logit_bias_moves_greedy_and_drawn_tokens() -> None:
    rows = [_row(logit_bias={11: 100.0}), _row(logit_bias={12: 100.0}, temperature=1.0), _row()]
    logits = _logits(3)
    assert _sample(logits, rows).token_ids.tolist() == [11, 12, int(logits[2].argmax())]


def test_min_tokens_bans_what_ends_the_answer_until_then(device: str) -> None:
    # The prompt has 3 tokens: position 5 is the third of the answer.
    common: dict[str, Any] = {"eos_token_ids": (2, VOCAB + 1), "stop_token_ids": (6, 9)}
    rows = [
        _row(position=5, min_tokens=3, **common),
        _row(position=6, min_tokens=3, **common),
        _row(position=3, min_tokens=1, **common),
        _row(position=3, **common),
        _row(position=3, min_tokens=1),
    ]
    banned = _adjusted(torch.zeros(5, VOCAB), rows, device).isinf()
    ends = torch.zeros(VOCAB, dtype=torch.bool)
    ends[[2, 6, 9]] = True
    expected = torch.stack([ends, ends & False, ends, ends & False, ends & False])
    assert torch.equal(banned, expected)


@pytest.mark.parametrize("vocab", [VOCAB, 32, 33, 100])
def test_masks_ban_all_tokens_but_theirs(vocab: int, device: str) -> None:
    logits = _logits(4, vocab)
    rows = [_row(position=i) for i in range(3)] + [_row(position=9, temperature=5.0, logprobs=0)]
    # The sign bit of a word among them.
    allowed = {1: [0, vocab - 1, min(31, vocab - 2)], 3: [5]}
    masks = {row: _mask(*tokens, vocab=vocab) for row, tokens in allowed.items()}
    buffer = _buffer(rows).to(device)
    adjusted = sampler._adjusted(logits.to(device), _rows(rows, vocab), buffer, masks).cpu()
    for row in range(4):
        tokens = allowed.get(row, list(range(vocab)))
        left = (~adjusted[row].isinf()).nonzero()[:, 0].tolist()
        assert left == sorted(tokens)
        assert torch.equal(adjusted[row, tokens], logits[row, tokens])
    sampled = sample(logits.to(device), _rows(rows, vocab), buffer, masks)
    assert int(sampled.token_ids[3]) == 5
    # The log-probability is that of the model, not of what was left.
    expected = float(logits[3].log_softmax(-1)[5])
    assert sampled.logprobs[3].logprob == pytest.approx(expected, abs=1e-5)


def test_masks_follow_their_rows_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.sampler.MAX_SAMPLED_LOGITS", 3 * VOCAB)
    rows = [_row(position=i) for i in range(7)]
    sampled = _sample(_logits(7), rows, masks={2: _mask(1), 3: _mask(2), 6: _mask(3)})
    assert sampled.token_ids[[2, 3, 6]].tolist() == [1, 2, 3]


def test_a_row_without_any_token_left_fails_alone(device: str) -> None:
    logits = _logits(4)
    logits[3, 1] = float("nan")
    rows = [
        _row(temperature=1.0, top_p=0.9),
        _row(eos_token_ids=(6,), min_tokens=4, temperature=1.0),
        _row(temperature=1.0),
        _row(temperature=1.0),
    ]
    # min_tokens bans the only token that the mask allows.
    sampled = _sample(logits, rows, device, {1: _mask(6), 2: _mask(), 3: _mask(1, 2)})
    assert sampled.faults.tolist() == [0, ALL_BANNED, ALL_BANNED, NOT_FINITE]
    assert all(0 <= token < VOCAB for token in sampled.token_ids.tolist())
    alone = _sample(logits[:1], rows[:1], device)
    assert sampled.token_ids[0] == alone.token_ids[0]


def test_features_of_rows_do_not_mix(device: str) -> None:
    rows = [
        _row(temperature=1.0),
        _row(logit_bias={4: 3.0}),
        _row(frequency_penalty=1.0, position=7),
        _row(min_tokens=9, eos_token_ids=(2,), temperature=2.0),
        _row(),
        _row(logit_bias={7: 3.0}, presence_penalty=2.0, min_tokens=9, eos_token_ids=(2, 3)),
    ]
    logits, masks = _logits(6), {0: _mask(1, 2), 5: _mask(*range(1, 20))}
    together = _adjusted(logits, rows, device, masks)
    for i, row in enumerate(rows):
        own = {0: masks[i]} if i in masks else {}
        assert torch.equal(_adjusted(logits[i : i + 1], [row], device, own)[0], together[i])


def test_logprobs(device: str) -> None:
    logits = _logits(4)
    rows = [
        _row(logprobs=0),
        _row(),
        _row(logprobs=3, temperature=2.0, frequency_penalty=1.0, position=6),
        _row(logprobs=VOCAB + 9),
    ]
    sampled = _sample(logits, rows, device)
    assert set(sampled.logprobs) == {0, 2, 3}
    expected = logits.double().log_softmax(-1)
    for row, wanted in ((0, 0), (2, 3), (3, VOCAB)):
        found, token = sampled.logprobs[row], int(sampled.token_ids[row])
        ranked = expected[row].argsort(descending=True).tolist()
        assert found.logprob == pytest.approx(float(expected[row, token]), abs=1e-5)
        assert found.rank == ranked.index(token) + 1
        assert list(found.top_token_ids) == ranked[:wanted]
        assert found.top_logprobs == pytest.approx(
            [float(expected[row, t]) for t in ranked[:wanted]], abs=1e-5
        )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_row_is_told_from_the_others(poison: float, device: str) -> None:
    rows = [_row(position=i, temperature=1.0, top_p=0.9, logprobs=1) for i in range(3)]
    rows.append(_row(position=3))
    logits = _logits(4)
    intact = _sample(logits, rows, device)
    logits[1, 4] = poison
    sampled = _sample(logits, rows, device)
    assert sampled.faults.tolist() == [0, NOT_FINITE, 0, 0]
    assert 0 <= int(sampled.token_ids[1]) < VOCAB
    for row in (0, 2, 3):
        assert sampled.token_ids[row] == intact.token_ids[row]


@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e300])
def test_minus_infinity_only_bans_a_token(temperature: float) -> None:
    logits = _logits(1)
    logits[0, 3] = float("-inf")
    sampled = _sample(logits, [_row(temperature=temperature)])
    assert not sampled.faults.any()
    assert (
        sampler._filtered(logits, _settings([SamplingParams(temperature=temperature)]))[0, 3] == 0
    )


def test_an_unresolved_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        _sample(_logits(), [_row(temperature=1.0, seed=None)])


def test_a_row_is_the_same_bits_in_any_batch() -> None:
    # So large a vocabulary that the threads share one row's work, where they can.
    vocab, threads = 50_001, torch.get_num_threads()
    logits = _logits(6, vocab) * 3
    rows = [_row(temperature=1.0 + i, top_p=0.9, logprobs=3, seed=i) for i in range(6)]
    settings = _rows(rows, vocab).settings
    torch.set_num_threads(2)
    try:
        weights = sampler._filtered(logits, settings)
        sums = sampler._row_sums(logits.exp())
        sampled = sample(logits, _rows(rows, vocab), _buffer(rows))
        for i in range(6):
            alone = logits[i : i + 1]
            assert torch.equal(sampler._filtered(alone, settings[i : i + 1])[0], weights[i])
            assert torch.equal(sampler._row_sums(alone.exp())[0], sums[i])
            again = sample(alone, _rows(rows[i : i + 1], vocab), _buffer(rows[i : i + 1]))
            assert again.logprobs[0] == sampled.logprobs[i]
    finally:
        torch.set_num_threads(threads)
