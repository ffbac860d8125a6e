"""However requests are batched, chunked, reused or preempted, each gets its own tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from llmserve.core.request import FinishReason, TokenLogprobs
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import SchedulerOutput
from llmserve.runtime.torch.runner import StepHandle, TorchRunner
from tests.core.factories import StandInSpeculator
from tests.runtime.torch_engines import (
    Driver,
    Guesser,
    make_engine,
    open_runner,
    replace_embedding,
    tokens,
)

GREEDY = SamplingParams(max_tokens=24, seed=0)
LENGTHS = (1, 7, 8, 9, 33, 70, 128, 5)
RUNS_AHEAD = pytest.mark.parametrize("runs_ahead", [False, True], ids=["in_turn", "ahead"])


# Qwen2 has layers with a window of 8 tokens, a block's size, and layers without; Qwen3-MoE experts.
@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3_moe"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    return make_engine(path, family=request.param, vocab_size=256)


@pytest.fixture
def runner(engine: Path, device: str) -> TorchRunner:
    return open_runner(engine, device=device)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def sampling() -> list[SamplingParams]:
    """Mixed settings: a greedy one, a penalised one, a biased one, one that may not end before its
    15th token and then soon does, and several ways to sample.
    """
    half = tuple(range(128))
    return [
        SamplingParams(max_tokens=20, seed=0, logit_bias={7: 3.0, 9: 2.5, 50: 1.5}),
        SamplingParams(max_tokens=20, seed=1, temperature=1.0, min_tokens=15, stop_token_ids=half),
        SamplingParams(max_tokens=20, seed=2, temperature=0.7, top_p=0.8),
        SamplingParams(max_tokens=20, seed=3, temperature=1.5, top_k=20),
        SamplingParams(max_tokens=20, seed=4, temperature=1.0, min_p=0.05),
        SamplingParams(max_tokens=20, seed=0, frequency_penalty=0.7, repetition_penalty=1.3),
        SamplingParams(max_tokens=20, seed=-1, temperature=0.9, presence_penalty=1.0),
        SamplingParams(max_tokens=20, seed=2**63 + 5, top_p=0.5),
    ]


@pytest.fixture(scope="module")
def alone(
    engine: Path, prompts: list[list[int]], sampling: list[SamplingParams]
) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy and sampled answers, one request at a time, nothing reused."""
    driver = Driver(open_runner(engine), enable_block_reuse=False)
    greedy = [driver.generate([prompt], GREEDY)[0] for prompt in prompts]
    drawn = [
        driver.generate([prompt], params)[0]
        for prompt, params in zip(prompts, sampling, strict=True)
    ]
    assert 15 < len(drawn[1]) < 20
    return greedy, drawn


Answers = tuple[list[list[int]], list[list[int]]]


def _check(
    driver: Driver, prompts: list[list[int]], sampling: list[SamplingParams], alone: Answers
) -> None:
    assert driver.generate(prompts, GREEDY) == alone[0]
    assert driver.generate(prompts, sampling) == alone[1]


def test_answers_differ_from_each_other(alone: Answers) -> None:
    assert len({tuple(answer) for answer in alone[0] + alone[1]}) >= 2 * len(LENGTHS) - 1
    assert sum(len(set(answer)) for answer in alone[0]) > 8 * len(LENGTHS)


@RUNS_AHEAD
def test_batched(
    runner: TorchRunner,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone: Answers,
    runs_ahead: bool,
) -> None:
    driver = Driver(runner, enable_block_reuse=False, runs_ahead=runs_ahead)
    _check(driver, prompts, sampling, alone)
    assert max(len(step.decodes) for step in driver.steps) == len(prompts)


@RUNS_AHEAD
@pytest.mark.parametrize("max_num_tokens", [8, 40])
def test_chunked(
    runner: TorchRunner,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone: Answers,
    max_num_tokens: int,
    runs_ahead: bool,
) -> None:
    driver = Driver(
        runner, enable_block_reuse=False, max_num_tokens=max_num_tokens, runs_ahead=runs_ahead
    )
    _check(driver, prompts, sampling, alone)
    prefills = [prefill for step in driver.steps for prefill in step.prefills]
    assert any(prefill.num_tokens > 1 and prefill.num_computed_tokens > 0 for prefill in prefills)
    assert any(step.prefills and step.decodes for step in driver.steps)


@RUNS_AHEAD
def test_prefix_reused(
    engine: Path,
    device: str,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone: Answers,
    runs_ahead: bool,
) -> None:
    runner = open_runner(engine, device=device, num_blocks=128)
    driver = Driver(runner, num_blocks=128, runs_ahead=runs_ahead)
    _check(driver, prompts, sampling, alone)
    first = len(driver.steps)
    _check(driver, prompts, sampling, alone)
    again = [prefill for step in driver.steps[first:] for prefill in step.prefills]
    computed = sorted(prefill.num_computed_tokens for prefill in again)
    if len(runner.info.kv_groups) == 1:
        # All but the last token of each prompt is there, be it in the middle of a block.
        assert computed == sorted(2 * [length - 1 for length in LENGTHS])
    else:
        # Of a layer with a window there may be less: only what was held when it was committed.
        assert sum(computed) > 0.4 * 2 * sum(LENGTHS)
    copies = [step.block_copies for step in driver.steps[first:] if any(step.block_copies)]
    assert copies
    assert driver.scheduler.snapshot().reused_blocks > 0


@RUNS_AHEAD
def test_preempted(
    engine: Path,
    device: str,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone: Answers,
    runs_ahead: bool,
) -> None:
    blocks = 30  # of 8 tokens: all requests together want 60
    runner = open_runner(engine, device=device, num_blocks=blocks)
    driver = Driver(
        runner,
        num_blocks=blocks,
        policy="max_utilization",
        enable_block_reuse=False,
        runs_ahead=runs_ahead,
    )
    _check(driver, prompts, sampling, alone)
    assert driver.scheduler.snapshot().num_preemptions > 0


@RUNS_AHEAD
@pytest.mark.parametrize("seed", range(3))
def test_speculated(
    engine: Path,
    device: str,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone: Answers,
    runs_ahead: bool,
    seed: int,
) -> None:
    # Everything at once: guesses, chunks, reuse and too few blocks.
    blocks = (64, 24, 24)[seed]
    runner = open_runner(engine, device=device, num_blocks=blocks)
    for answers, params in ((alone[0], [GREEDY] * len(prompts)), (alone[1], sampling)):
        guesser = Guesser(prompts, answers, seed)
        driver = Driver(
            runner,
            num_blocks=blocks,
            policy="max_utilization",
            max_num_tokens=(512, 512, 40)[seed],
            runs_ahead=runs_ahead,
            speculator=StandInSpeculator(guesser),
        )
        assert driver.generate(prompts, params) == answers
        stats = driver.scheduler.snapshot()
        assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens
        assert len(driver.steps) < sum(map(len, answers))
        assert seed == 0 or stats.num_preemptions > 0


@RUNS_AHEAD
def test_answers_to_one_prompt_share_its_blocks(
    engine: Path, device: str, prompts: list[list[int]], runs_ahead: bool
) -> None:
    prompt, params = prompts[5], SamplingParams(max_tokens=16, seed=3, temperature=1.0)
    expected = []
    for index in range(4):
        driver = Driver(open_runner(engine, device=device), enable_block_reuse=False)
        request_id = driver.submit(prompt, params, sequence_index=index)
        expected.append(tokens(driver.run()[request_id]))
    assert len({tuple(answer) for answer in expected}) == 4
    # 70 tokens are 8 blocks of 8, and the beginning of one that the others copy.
    driver = Driver(open_runner(engine, device=device), runs_ahead=runs_ahead)
    ids = [driver.submit(prompt, params, sequence_index=index) for index in range(4)]
    outputs = driver.run()
    assert [tokens(outputs[i]) for i in ids] == expected
    computed = [part.num_tokens for step in driver.steps for part in step.prefills]
    assert computed == [len(prompt), 1, 1, 1]
    copies = [group for step in driver.steps for group in step.block_copies]
    assert sum(map(len, copies)) == 3 * len(driver.runner.info.kv_groups)


class Allowed:
    """Lets the tokens through whose value and number in the answer come to a multiple of three."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens, self._accepted = num_tokens, 0

    def accept(self, token_id: int) -> bool:
        assert (token_id + self._accepted) % 3 == 0
        self._accepted += 1
        return self._accepted == self._num_tokens

    def mask(self) -> npt.NDArray[np.int32]:
        allowed = (np.arange(256) + self._accepted) % 3 == 0
        return np.packbits(allowed, bitorder="little").view(np.int32)


@RUNS_AHEAD
def test_masked(
    engine: Path,
    device: str,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    runs_ahead: bool,
) -> None:
    # Every other request has a constraint, which ends its answer.
    def constraint(i: int) -> Allowed | None:
        return Allowed(6 + i) if i % 2 else None

    params = [replace(p, stop_token_ids=(), min_tokens=0) for p in sampling]
    expected = []
    for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
        driver = Driver(open_runner(engine, device=device), enable_block_reuse=False)
        request_id = driver.submit(prompt, p, constraint=constraint(i))
        expected.append(tokens(driver.run()[request_id]))
    assert [len(answer) for answer in expected[1::2]] == [7, 9, 11, 13]
    blocks = 30
    driver = Driver(
        open_runner(engine, device=device, num_blocks=blocks),
        num_blocks=blocks,
        policy="max_utilization",
        max_num_tokens=40,
        runs_ahead=runs_ahead,
    )
    ids = [
        driver.submit(prompt, p, constraint=constraint(i))
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True))
    ]
    outputs = driver.run()
    assert [tokens(outputs[i]) for i in ids] == expected


@RUNS_AHEAD
@pytest.mark.parametrize("case", ["batched", "chunked", "preempted"])
def test_logprobs_of_prompt_and_answer(
    engine: Path, device: str, prompts: list[list[int]], runs_ahead: bool, case: str
) -> None:
    params = SamplingParams(max_tokens=20, seed=0, logprobs=2, prompt_logprobs=3)
    driver = Driver(open_runner(engine, device=device), enable_block_reuse=False)
    expected = [_logprobs(driver, [prompt], params)[0] for prompt in prompts]
    blocks = 26 if case == "preempted" else 64
    driver = Driver(
        open_runner(engine, device=device, num_blocks=blocks),
        num_blocks=blocks,
        policy="max_utilization",
        max_num_tokens=16 if case == "chunked" else 512,
        runs_ahead=runs_ahead,
    )
    found = _logprobs(driver, prompts, params)
    assert case != "preempted" or driver.scheduler.snapshot().num_preemptions > 0
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        assert [len(part) for part in ours] == [len(prompt) - 1, 20]
        for a, b in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
            assert (a.rank, a.top_token_ids) == (b.rank, b.top_token_ids)
            assert (a.logprob, *a.top_logprobs) == pytest.approx(
                (b.logprob, *b.top_logprobs), abs=1e-4
            )


def _logprobs(
    driver: Driver, prompts: list[list[int]], params: SamplingParams
) -> list[tuple[list[TokenLogprobs], list[TokenLogprobs]]]:
    """Those of each prompt and of its answer."""
    ids = [driver.submit(prompt, params) for prompt in prompts]
    outputs = driver.run()
    assert all(output.prompt_logprobs is None for i in ids for output in outputs[i][1:])
    return [
        (
            list(outputs[i][0].prompt_logprobs or ()),
            [found for output in outputs[i] for found in output.logprobs or ()],
        )
        for i in ids
    ]


@pytest.fixture(scope="module")
def alone_bits(
    engine: Path, prompts: list[list[int]], sampling: list[SamplingParams]
) -> list[tuple[list[int], list[TokenLogprobs]]]:
    """Answers and log-probabilities of a deterministic runner, one request at a time."""
    driver = Driver(open_runner(engine, deterministic=True), enable_block_reuse=False)
    params = [replace(p, logprobs=3) for p in sampling]
    return [_bits(driver, [prompt], [p])[0] for prompt, p in zip(prompts, params, strict=True)]


@pytest.mark.parametrize("case", ["reused", "chunked", "preempted", "speculated"])
def test_deterministic_answers_and_logprobs_are_the_same_bits(
    engine: Path,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone_bits: list[tuple[list[int], list[TokenLogprobs]]],
    case: str,
) -> None:
    guesser = Guesser(prompts, [answer for answer, _ in alone_bits])
    blocks = 26 if case == "preempted" else 128
    driver = Driver(
        open_runner(engine, deterministic=True, num_blocks=blocks),
        num_blocks=blocks,
        policy="max_utilization",
        max_num_tokens=24 if case == "chunked" else 512,
        runs_ahead=True,
        speculator=StandInSpeculator(guesser) if case == "speculated" else None,
    )
    for _ in range(1 + (case == "reused")):
        assert _bits(driver, prompts, [replace(p, logprobs=3) for p in sampling]) == alone_bits
    stats = driver.scheduler.snapshot()
    assert case != "preempted" or stats.num_preemptions > 0
    assert case != "speculated" or stats.num_accepted_draft_tokens > 0


def _bits(
    driver: Driver, prompts: list[list[int]], params: list[SamplingParams]
) -> list[tuple[list[int], list[TokenLogprobs]]]:
    ids = [driver.submit(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    outputs = driver.run()
    return [
        (tokens(outputs[i]), [found for output in outputs[i] for found in output.logprobs or ()])
        for i in ids
    ]


@RUNS_AHEAD
def test_slots_that_no_window_sees_are_never_read(
    engine: Path,
    device: str,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone: Answers,
    runs_ahead: bool,
) -> None:
    runner = open_runner(engine, device=device)
    windowed = [i for i, g in enumerate(runner.info.kv_groups) if g.window is not None]
    if not windowed:
        pytest.skip("a model without windows")
    (group,) = windowed
    launch, computed = runner.launch, dict[str, int]()

    def forgetful_launch(step: SchedulerOutput) -> StepHandle:
        handle = launch(step)
        inputs = runner._inputs
        for part in step.prefills:
            computed[part.request_id] = part.num_computed_tokens + part.num_tokens
        for name in step.decodes:
            computed[name] = int(inputs._num_tokens[inputs._slots[name]])
        seen = [_coming_window(runner, name, group, computed[name]) for name in inputs._slots]
        for layer in runner.info.kv_groups[group].layers:
            cache = runner._kv_cache[layer]
            rest = torch.ones(len(cache), dtype=torch.bool)
            for kv_slots in seen:
                rest[kv_slots] = False
            cache[rest.to(cache.device)] = float("nan")
        return handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "launch", forgetful_launch)
        driver = Driver(runner, enable_block_reuse=False, max_num_tokens=40, runs_ahead=runs_ahead)
        _check(driver, prompts, sampling, alone)


def _coming_window(
    runner: TorchRunner, request_id: str, group: int, num_computed_tokens: int
) -> torch.Tensor:
    """The KV slots of a request that its next token to be computed sees, or a later one."""
    inputs, size = runner._inputs, runner._tokens_per_block
    window = runner.info.kv_groups[group].window
    assert window is not None
    positions = torch.arange(max(0, num_computed_tokens - window + 1), num_computed_tokens)
    table = torch.from_numpy(inputs._block_tables[group][inputs._slots[request_id]]).long()
    return table[positions // size] * size + positions % size


def test_a_request_with_nan_logits_fails_alone(
    runner: TorchRunner, prompts: list[list[int]], alone: Answers
) -> None:
    # Token 255 is poison: its embedding is NaN, and so is all KV of a request that has it.
    poisoned = [200, 255, 201]
    embedding = runner._decoder.embedding.weight.clone()
    embedding[255] = float("nan")
    replace_embedding(runner, embedding)
    clean = [i for i, p in enumerate(prompts) if 255 not in p + alone[0][i]]
    driver = Driver(runner, enable_block_reuse=False)
    bad = driver.submit(poisoned, GREEDY)
    good = [driver.submit(prompts[i], GREEDY) for i in clean]
    outputs = driver.run()
    assert outputs[bad][-1].finish_reason is FinishReason.ERROR
    assert "NaN" in (outputs[bad][-1].error or "")
    for request_id, i in zip(good, clean, strict=True):
        assert tokens(outputs[request_id]) == alone[0][i]
    # Others get its blocks, with the NaN in them.
    assert [driver.generate([prompts[i]], GREEDY)[0] for i in clean] == [alone[0][i] for i in clean]


def test_nan_within_a_prompt_does_not_reach_who_shares_its_beginning(
    runner: TorchRunner, prompts: list[list[int]]
) -> None:
    # In one chunk with the poison, masked weights times NaN make NaN of the whole prefix's K and V
    # in the layers above; that chunk samples nothing, and its blocks would be kept for others.
    embedding = runner._decoder.embedding.weight.clone()
    embedding[255] = float("nan")
    replace_embedding(runner, embedding)
    prefix = [t for t in prompts[0] + list(range(100, 140)) if t != 255][:24]
    expected = Driver(runner, enable_block_reuse=False).generate([[*prefix, 7]], GREEDY)
    driver = Driver(runner, max_num_tokens=32)
    bad = driver.submit([*prefix, 255, *range(20, 60)], GREEDY)
    outputs = driver.run()
    assert outputs[bad][-1].finish_reason is FinishReason.ERROR
    assert outputs[bad][-1].error == "the model computed NaN within the prompt"
    assert driver.generate([[*prefix, 7]], GREEDY) == expected
