"""What is asked of NVIDIA's LLM for a request, and what becomes of its answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmserve.core.request import FinishReason, Output
from llmserve.core.sampling_params import GuidedDecodingParams
from llmserve.engine.engine import Health
from llmserve.engine.tensorrt_llm.sampling import Abilities, sampling_arguments
from llmserve.errors import (
    InvalidRequestError,
)
from llmserve.runtime.tensorrt_llm_release import installed_release
from tests import standins
from tests.engine.factories import until
from tests.engine.tensorrt_llm.factories import (
    PROMPT,
    VOCAB_SIZE,
    Start,
    answer,
    greedy,
    is_empty,
    make_request,
    outputs,
)


@pytest.mark.parametrize("tokens_per_step", [1, 5])
async def test_many_at_once(start: Start, tokens_per_step: int) -> None:
    engine = await start()
    standins.behaviour().tokens_per_step = tokens_per_step
    requests = [make_request((i, 2, i), name=f"r{i}", max_tokens=1 + i % 20) for i in range(40)]
    answers = await asyncio.gather(*(answer(engine, request) for request in requests))
    for request, (token_ids, last) in zip(requests, answers, strict=True):
        count = request.sampling_params.max_tokens
        assert count is not None
        assert token_ids == greedy(request.prompt_token_ids, count)
        assert last.finish_reason is FinishReason.LENGTH
        assert last.num_cached_tokens == 1  # the stand-in says half of the prompt
    stats = await engine.stats()
    assert stats.finished == {"length": 40}
    assert (stats.num_running_requests, stats.num_queued_requests) == (0, 0)
    assert stats.prompt_tokens == stats.prefix_cache_queries_tokens == 3 * 40
    assert stats.prefix_cache_hits_tokens == 40
    assert stats.generation_tokens == sum(len(token_ids) for token_ids, _ in answers)
    assert await engine.health() == Health(True)


async def test_what_was_yielded_does_not_change(start: Start) -> None:
    engine = await start()
    seen: list[Output] = []
    lengths: list[int] = []
    async for output in engine.submit(make_request()):
        seen.append(output)
        lengths.append(len(output.token_ids))
    assert lengths == [1] * 12
    assert [len(output.token_ids) for output in seen] == lengths
    assert [output.token_ids[0] for output in seen] == greedy()


@pytest.mark.parametrize("tokens_per_step", [1, 4])
async def test_the_token_that_ended_it_is_among_the_tokens(
    start: Start, tokens_per_step: int
) -> None:
    engine = await start()
    standins.behaviour().tokens_per_step = tokens_per_step
    tokens = greedy()
    assert len(set(tokens)) == 12
    # One end_id there is; a second end-of-sequence token has to be a stop token.
    for name, eos in (("a", (tokens[5], 1)), ("b", (1, tokens[5]))):
        token_ids, last = await answer(engine, make_request(eos=eos, name=name))
        assert token_ids == tokens[:6]
        assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, None)
    stopping = make_request(eos=(1,), stop_token_ids=(tokens[3],), name="c")
    token_ids, last = await answer(engine, stopping)
    assert token_ids == tokens[:4]
    assert (last.finish_reason, last.stop_reason) == (FinishReason.STOP, tokens[3])


async def test_eos_is_ignored_and_stop_tokens_are_not(start: Start) -> None:
    engine = await start()
    tokens = greedy()
    token_ids, last = await answer(engine, make_request(eos=(tokens[2],), ignore_eos=True))
    assert (token_ids, last.finish_reason) == (tokens, FinishReason.LENGTH)
    stopping = make_request(ignore_eos=True, stop_token_ids=(tokens[2],), name="s")
    token_ids, last = await answer(engine, stopping)
    assert (token_ids, last.stop_reason) == (tokens[:3], tokens[2])
    # end_id is mandatory, and this is its "none".
    assert {params.end_id for _, params, _ in standins.behaviour().submitted} == {-1}


async def test_max_tokens_none_fills_the_context(start: Start) -> None:
    engine = await start()
    token_ids, last = await answer(engine, make_request(max_tokens=None))
    assert len(token_ids) == 128 - len(PROMPT)
    assert last.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": None}, {"top_k": 1}),
        ({"temperature": 0.0, "top_p": 0.5, "top_k": 9, "min_p": 0.1}, {"top_k": 1}),
        ({"temperature": 0.7}, {"temperature": 0.7, "top_k": 0, "top_p": 1.0, "seed": 11}),
        (
            {"temperature": None, "top_k": 7},
            {"temperature": 1.0, "top_k": 7, "top_p": 1.0, "seed": 11},
        ),
        (
            {"temperature": 1.5, "top_p": 0.5, "min_p": 0.1},
            {"temperature": 1.5, "top_k": 0, "top_p": 0.5, "min_p": 0.1, "seed": 11},
        ),
        ({"repetition_penalty": 1.5}, {"top_k": 1, "repetition_penalty": 1.5}),
        (
            {"presence_penalty": 0.5, "frequency_penalty": -0.5},
            {
                "top_k": 1,
                "presence_penalty": 0.5,
                "frequency_penalty": -0.5,
                # Ours count the answer alone.
                "prompt_ignore_length": len(PROMPT),
            },
        ),
    ],
)
async def test_sampling_parameters_one_by_one(
    start: Start, given: dict[str, Any], expected: dict[str, Any]
) -> None:
    engine = await start()
    await answer(engine, make_request(eos=(1, 2), stop_token_ids=(2, 3), **{"seed": 11, **given}))
    ((inputs, params, salt),) = standins.behaviour().submitted
    from tensorrt_llm._params import parameters  # type: ignore[import-not-found]

    always = {
        "end_id": 1,
        "pad_id": 1,
        "stop_token_ids": [2, 3],
        "max_tokens": 12,
        "include_stop_str_in_output": True,
        "detokenize": False,
        "best_of": 1,
    }
    assert parameters(params) | {"best_of": 1} == always | expected
    assert (inputs, salt) == (list(PROMPT), None)
    assert params.greedy == params.runtime_greedy == (expected.get("top_k") == 1)


async def test_a_seed_and_an_index_make_the_random_numbers(start: Start) -> None:
    engine = await start()
    request = replace(make_request(temperature=0.8, seed=-3), cache_salt="tenant")
    await answer(engine, request)
    await answer(engine, replace(request, sequence_index=1))
    await answer(engine, replace(request, sequence_index=2))
    seeds = [params.seed for _, params, _ in standins.behaviour().submitted]
    assert seeds[0] == 2**64 - 3  # unsigned there
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert {salt for _, _, salt in standins.behaviour().submitted} == {"tenant"}


async def test_what_cannot_be_honoured_is_refused_by_name(
    start_kind: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await start_kind("huggingface", version="1.3.0rc10")
    for name, value in (
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("presence_penalty", 0.1),
        ("frequency_penalty", 0.1),
    ):
        with pytest.raises(InvalidRequestError, match=rf"{name} is 0?1?\.1.*1\.3\.0rc10") as caught:
            old.submit(make_request(temperature=1.0, **{name: value}))
        assert caught.value.param == name
    assert standins.behaviour().submitted == []


def test_penalties_that_would_count_the_prompt_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standins.install_tensorrt_llm(monkeypatch, tmp_path, "1.1.0")
    release = installed_release()
    assert release is not None
    engine = Abilities(
        release=release,
        is_engine=True,
        vocab_size=VOCAB_SIZE,
        logprobs=True,
        prompt_logprobs=False,
        prompt_ignore_length=False,
    )
    for name in ("presence_penalty", "frequency_penalty"):
        with pytest.raises(InvalidRequestError, match=f"{name} is 0.5.*count the prompt's"):
            sampling_arguments(make_request(**{name: 0.5}), engine)
    assert sampling_arguments(make_request(repetition_penalty=1.5), engine)["top_k"] == 1
    with pytest.raises(InvalidRequestError, match=r"top_k is 1025.*at most 1024"):
        sampling_arguments(make_request(temperature=1.0, top_k=1025), engine)


async def test_logprobs(start: Start, kind: str) -> None:
    engine = await start(gather_generation_logits=True)
    from tensorrt_llm._executor import position  # type: ignore[import-not-found]

    for name, k in (("a", 0), ("b", 3)):
        seen = await outputs(engine, make_request(logprobs=k, name=name))
        positions = [value for output in seen for value in output.logprobs or ()]
        assert len(positions) == 12
        for token_id, value in zip(greedy(), positions, strict=True):
            told = position(token_id, max(k, 1), VOCAB_SIZE)
            assert (value.logprob, value.rank) == (told[token_id].logprob, told[token_id].rank)
            likeliest = sorted(told, key=lambda other: -told[other].logprob)[:k]
            assert value.top_token_ids == tuple(likeliest)
            assert value.top_logprobs == tuple(told[other].logprob for other in likeliest)
    # An engine tells no log-probability of its end_id, so that token is left out there.
    ending = make_request(logprobs=1, eos=(greedy()[4],), name="c")
    seen = await outputs(engine, ending)
    tokens = [token_id for output in seen for token_id in output.token_ids]
    assert tokens == greedy()[: 4 if kind == "engine" else 5]
    assert all(len(output.logprobs or ()) == len(output.token_ids) for output in seen)
    assert (seen[-1].finish_reason, seen[-1].stop_reason) == (FinishReason.STOP, None)


@pytest.mark.parametrize("wrong", ["missing", "a number", "another token's"])
async def test_logprobs_that_do_not_fit_fail_their_request(
    start: Start, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    engine = await start(gather_generation_logits=True)
    from tensorrt_llm import _executor  # type: ignore[import-not-found]

    told: dict[str, Any] = {"a number": -0.5, "another token's": {999: _executor.Logprob(-1.0)}}
    standins.behaviour().step_s = 0.002
    if wrong == "missing":
        handle = _executor.RequestOutput._handle

        def without(self: Any, response: Any) -> None:
            response.logprobs.clear()
            handle(self, response)

        monkeypatch.setattr(_executor.RequestOutput, "_handle", without)
    else:
        monkeypatch.setattr(_executor, "position", lambda *_: told[wrong])
    _, last = await answer(engine, make_request(logprobs=1))
    assert last.finish_reason is FinishReason.ERROR
    assert "log-probabilities that do not fit" in (last.error or "")
    await until(lambda: is_empty(engine))
    assert (await answer(engine, make_request()))[0] == greedy()


async def test_logprobs_need_logits_from_an_engine(start_kind: Start) -> None:
    engine = await start_kind("engine")
    with pytest.raises(InvalidRequestError, match="--gather-generation-logits") as caught:
        engine.submit(make_request(logprobs=0))
    assert caught.value.param == "logprobs"
    assert engine._open == {}


async def test_min_tokens_is_for_the_end_of_sequence_token_alone(start: Start) -> None:
    engine = await start()
    await answer(engine, make_request(eos=(1,), min_tokens=5))
    ((_, params, _),) = standins.behaviour().submitted
    assert params.min_tokens == 5
    for changed in ({"eos": (1, 2)}, {"eos": (1,), "stop_token_ids": (9,)}):
        with pytest.raises(InvalidRequestError, match=r"min_tokens is 5.*\[[29]\] end") as caught:
            engine.submit(make_request(min_tokens=5, name="m", **changed))
        assert caught.value.param == "min_tokens"
    assert await is_empty(engine)


async def test_a_logit_bias_is_a_row_of_the_vocabulary(start: Start) -> None:
    engine = await start()
    await answer(engine, make_request(logit_bias={7: -100.0, 9: 2.5}))
    ((_, params, _),) = standins.behaviour().submitted
    assert {i: b for i, b in enumerate(params.embedding_bias.tolist()) if b} == {7: -100.0, 9: 2.5}


@pytest.mark.parametrize("tokens_per_step", [1, 20])
async def test_prompt_logprobs_are_of_the_prompts_logits(
    start_kind: Start, tokens_per_step: int
) -> None:
    engine = await start_kind("huggingface")
    standins.behaviour().tokens_per_step = tokens_per_step
    seen = await outputs(engine, make_request(prompt_logprobs=3, logprobs=1))
    told = seen[0].prompt_logprobs
    assert told is not None
    assert all(output.prompt_logprobs is None for output in seen[1:])
    (llm,) = standins.behaviour().llms
    expected = llm._executor.context_logits(list(PROMPT)).float().log_softmax(-1)
    assert len(told) == len(PROMPT) - 1
    for row, token_id, position in zip(expected[:-1].tolist(), PROMPT[1:], told, strict=True):
        ranked = sorted(range(VOCAB_SIZE), key=lambda other: -row[other])
        assert position.logprob == row[token_id]
        assert position.rank == 1 + sum(value > row[token_id] for value in row)
        assert position.top_logprobs == tuple(row[other] for other in ranked[:3])
        assert [row[other] for other in position.top_token_ids] == list(position.top_logprobs)


async def test_prompt_logits_that_do_not_fit_fail_their_request(
    start_kind: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await start_kind("huggingface")
    from tensorrt_llm import _executor  # type: ignore[import-not-found]

    whole = _executor.Executor.context_logits
    # As if two tokens of the prompt had come from the KV cache.
    monkeypatch.setattr(_executor.Executor, "context_logits", lambda *args: whole(*args)[2:])
    standins.behaviour().step_s = 0.002
    _, last = await answer(engine, make_request(prompt_logprobs=0))
    assert last.finish_reason is FinishReason.ERROR
    assert "logits of the prompt that do not fit" in (last.error or "")
    await until(lambda: is_empty(engine))


async def test_prompt_logprobs_need_logits_from_an_engine(start_kind: Start) -> None:
    engine = await start_kind("engine")
    with pytest.raises(InvalidRequestError, match="--gather_context_logits") as caught:
        engine.submit(make_request(prompt_logprobs=0))
    assert caught.value.param == "prompt_logprobs"


async def test_what_its_api_has_no_words_for_is_refused(start: Start) -> None:
    engine = await start()
    guided = make_request(guided_decoding=GuidedDecodingParams(regex="a+"))
    for request, param in (
        (guided, "guided_decoding"),
        (replace(make_request(), priority=1), "priority"),
        (replace(make_request(), retention_priority=90), "retention_priority"),
    ):
        with pytest.raises(InvalidRequestError, match=param) as caught:
            engine.submit(request)
        assert caught.value.param == param
    assert standins.behaviour().submitted == []
    assert await is_empty(engine)
