"""However requests are batched, chunked, reused or preempted, each gets its own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmserve.core.request import FinishReason
from llmserve.core.sampling_params import SamplingParams
from llmserve.runtime.torch.runner import TorchRunner
from tests.runtime.torch_engines import Driver, make_engine, open_runner, replace_embedding

GREEDY = SamplingParams(max_tokens=24, seed=0)
LENGTHS = (1, 7, 8, 9, 33, 70, 128, 5)


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
    """Mixed settings: a greedy one, a penalised one, and several ways to sample."""
    return [
        SamplingParams(max_tokens=20, seed=0),
        SamplingParams(max_tokens=20, seed=1, temperature=1.0),
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


def test_batched(
    runner: TorchRunner, prompts: list[list[int]], sampling: list[SamplingParams], alone: Answers
) -> None:
    driver = Driver(runner, enable_block_reuse=False)
    _check(driver, prompts, sampling, alone)
    assert max(len(step.scheduled) for step in driver.steps) == len(prompts)


@pytest.mark.parametrize("max_num_tokens", [8, 16, 40])
def test_chunked(
    runner: TorchRunner,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone: Answers,
    max_num_tokens: int,
) -> None:
    driver = Driver(runner, enable_block_reuse=False, max_num_tokens=max_num_tokens)
    _check(driver, prompts, sampling, alone)
    parts = [part for step in driver.steps for part in step.scheduled]
    assert any(part.num_tokens > 1 and part.num_computed_tokens > 0 for part in parts)
    mixed = [{part.num_tokens > 1 for part in step.scheduled} for step in driver.steps]
    assert {True, False} in mixed  # prefill and decode in one step


def test_prefix_reused(
    runner: TorchRunner, prompts: list[list[int]], sampling: list[SamplingParams], alone: Answers
) -> None:
    driver = Driver(runner)
    _check(driver, prompts, sampling, alone)
    _check(driver, prompts, sampling, alone)
    assert driver.scheduler.snapshot().reused_blocks > 0
    parts = [part for step in driver.steps for part in step.scheduled]
    # A prompt of 128 tokens: all full blocks are reused, the rest is one chunk.
    assert any(part.num_computed_tokens == 120 and part.num_tokens == 8 for part in parts)


def test_preempted(
    engine: Path,
    device: str,
    prompts: list[list[int]],
    sampling: list[SamplingParams],
    alone: Answers,
) -> None:
    blocks = 30  # of 8 tokens: all requests together want 60
    runner = open_runner(engine, device=device, num_blocks=blocks)
    driver = Driver(runner, num_blocks=blocks, policy="max_utilization", enable_block_reuse=False)
    _check(driver, prompts, sampling, alone)
    assert driver.scheduler.snapshot().num_preemptions > 0


def test_sequence_index_changes_the_draw(runner: TorchRunner) -> None:
    driver = Driver(runner)
    params = SamplingParams(max_tokens=16, seed=3, temperature=1.0)
    ids = [driver.submit([1, 2, 3], params, sequence_index=i) for i in (0, 1, 0)]
    outputs = driver.run()
    first, second, again = [[t for o in outputs[i] for t in o.token_ids] for i in ids]
    assert first == again
    assert first != second


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
        assert [t for o in outputs[request_id] for t in o.token_ids] == alone[0][i]
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
