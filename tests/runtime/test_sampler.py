"""The sampler against plain Python, against transformers' processors, and against chance."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers.generation import logits_process

from llmserve.core.sampling_params import SamplingParams
from llmserve.runtime.torch import sampler
from llmserve.runtime.torch.input_batch import SampledRow
from llmserve.runtime.torch.sampler import Sampled, sample

VOCAB = 24


def _row(position: int = 5, slot: int = 0, num_prompt: int = 3, **params: Any) -> SampledRow:
    return SampledRow(
        request_id=f"r{position}",
        slot=slot,
        position=position,
        num_prompt_tokens=num_prompt,
        sampling_params=SamplingParams(**{"seed": 1, **params}),
        sequence_index=0,
    )


def _logits(rows: int = 1, vocab: int = VOCAB, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


BUFFER = torch.tensor([[3, 4, 5, 3, 7, 7, 1, 1], [0, 0, 0, 1, 2, 9, 9, 9]], dtype=torch.int32)


def _sample(logits: torch.Tensor, rows: list[SampledRow], device: str = "cpu") -> Sampled:
    return sample(logits.to(device), rows, BUFFER.to(device))


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
    weights = sampler._filtered(logits.to(device), [params] * 3).double().cpu()
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
    weights = sampler._filtered(logits, [SamplingParams(**settings)] * 8)
    ours = weights / weights.sum(-1, keepdim=True)
    assert torch.allclose(ours, theirs.softmax(-1), atol=1e-6)


def test_settings_of_rows_do_not_mix() -> None:
    logits = _logits(len(SETTINGS))
    params = [SamplingParams(**settings) for settings in SETTINGS]
    together = sampler._filtered(logits, params)
    for i, p in enumerate(params):
        assert torch.equal(sampler._filtered(logits[i : i + 1], [p])[0], together[i])


@pytest.mark.parametrize("settings", SETTINGS[:8], ids=str)
def test_draws_follow_the_distribution(settings: dict[str, Any]) -> None:
    draws, logits = 4000, _logits()
    rows = [_row(position=i, **settings) for i in range(draws)]
    counts = Counter(_sample(logits.expand(draws, -1), rows).token_ids.tolist())
    expected = _probabilities(logits[0].tolist(), rows[0].sampling_params)
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
    assert torch.equal(parts.valid, together.valid)
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
    ours = sampler._penalized(logits, [_row(repetition_penalty=1.7)], BUFFER)
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
    actual = sampler._penalized(logits.to(device), rows, BUFFER.to(device)).cpu()
    assert torch.allclose(actual, expected)


def test_penalties_change_greedy_tokens() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 2] = 3.0, 2.5
    assert _sample(logits, [_row()]).token_ids.item() == 7
    assert _sample(logits, [_row(frequency_penalty=1.0)]).token_ids.item() == 2


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
    assert sampled.valid.tolist() == [True, False, True, True]
    assert 0 <= int(sampled.token_ids[1]) < VOCAB
    for row in (0, 2, 3):
        assert sampled.token_ids[row] == intact.token_ids[row]


@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e300])
def test_minus_infinity_only_bans_a_token(temperature: float) -> None:
    logits = _logits(1)
    logits[0, 3] = float("-inf")
    sampled = _sample(logits, [_row(temperature=temperature)])
    assert bool(sampled.valid.all())
    assert sampler._filtered(logits, [SamplingParams(temperature=temperature)])[0, 3] == 0


def test_an_unresolved_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed"):
        _sample(_logits(), [_row(temperature=1.0, seed=None)])
