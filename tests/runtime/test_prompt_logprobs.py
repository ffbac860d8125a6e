"""Log-probabilities of a prompt's tokens against those of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmserve.core.request import TokenLogprobs
from llmserve.core.sampling_params import SamplingParams
from llmserve.runtime.torch.logprobs import row_logprobs
from tests.models import load_model
from tests.runtime.torch_engines import Driver, make_engine, open_runner, replace_embedding

PROMPT = torch.randint(320, (60,), generator=torch.Generator().manual_seed(5)).tolist()


# Gemma 2 caps its logits, Qwen2 has layers with a window of 8 tokens.
@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_engine(path, family=request.param)
    return path


@pytest.fixture(scope="module")
def exact_and_theirs(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-softmax of transformers' logits, (tokens, vocab), in float64 and in float32."""
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        exact = load_model(path / "hf", torch.float64)(prompt).logits[0].log_softmax(-1)
        theirs = load_model(path / "hf")(prompt).logits[0].log_softmax(-1)
    return exact, theirs


def _prompt_logprobs(driver: Driver, k: int = 5) -> list[TokenLogprobs]:
    params = SamplingParams(max_tokens=2, seed=0, prompt_logprobs=k)
    request_id = driver.submit(PROMPT, params)
    (first, last) = driver.run()[request_id]
    assert last.prompt_logprobs is None
    return list(first.prompt_logprobs or ())


@pytest.mark.parametrize("max_num_tokens", [512, 16, 8])
@pytest.mark.parametrize("max_logits", [1 << 22, 7 * 320])
def test_they_are_those_of_transformers(
    path: Path,
    exact_and_theirs: tuple[torch.Tensor, torch.Tensor],
    device: str,
    max_num_tokens: int,
    max_logits: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.runner.MAX_SAMPLED_LOGITS", max_logits)
    exact, theirs = exact_and_theirs
    runner = open_runner(path / "engine", device=device)
    driver = Driver(runner, max_num_tokens=max_num_tokens)
    # Whoever else ran, and left the prompt in the cache: it is computed again.
    driver.generate([PROMPT], SamplingParams(max_tokens=1, seed=0))
    found = _prompt_logprobs(driver)
    assert len(found) == len(PROMPT) - 1
    error = 4 * float((theirs - exact).abs().max())
    for row, (ours, token) in enumerate(zip(found, PROMPT[1:], strict=True)):
        values = exact[row]
        assert ours.logprob == pytest.approx(float(values[token]), abs=error)
        assert ours.rank == int((values > values[token]).sum()) + 1
        assert list(ours.top_token_ids) == values.topk(5).indices.tolist()
        assert ours.top_logprobs == pytest.approx(values.topk(5).values.tolist(), abs=error)


def test_a_prompt_of_one_token_has_none(path: Path) -> None:
    driver = Driver(open_runner(path / "engine"))
    params = SamplingParams(max_tokens=1, seed=0, prompt_logprobs=0)
    request_id = driver.submit([7], params)
    (output,) = driver.run()[request_id]
    assert list(output.prompt_logprobs or ()) == []


def test_those_who_ask_do_not_change_what_others_get(path: Path) -> None:
    prompts = [PROMPT, PROMPT[::-1], [3, 4, 5]]
    plain = SamplingParams(max_tokens=6, seed=0)
    asks = SamplingParams(max_tokens=6, seed=0, prompt_logprobs=1)
    expected = Driver(open_runner(path / "engine")).generate(prompts, plain)
    assert Driver(open_runner(path / "engine")).generate(prompts, [plain, asks, plain]) == expected


def test_a_broken_prompt_has_none(path: Path) -> None:
    runner = open_runner(path / "engine")
    embedding = runner._decoder.embedding.weight.clone()
    embedding[PROMPT[30]] = float("nan")
    replace_embedding(runner, embedding)
    driver = Driver(runner, max_num_tokens=16)
    request_id = driver.submit(PROMPT, SamplingParams(max_tokens=2, seed=0, prompt_logprobs=1))
    (output,) = driver.run()[request_id]
    assert output.error == "the model computed NaN within the prompt"


def test_ranks_and_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [5.0, 4.0, 3.0, 2.0]])
    first, second = row_logprobs(logits, torch.tensor([2, 3]), 9).fetch([1, 9])
    # Of equals nobody is ahead.
    assert (first.rank, len(first.top_token_ids)) == (1, 1)
    assert (second.rank, second.top_token_ids) == (4, (0, 1, 2, 3))
    assert sum(torch.tensor(second.top_logprobs).exp()) == pytest.approx(1.0)
