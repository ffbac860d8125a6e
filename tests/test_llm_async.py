"""AsyncLLM over an engine whose tokens are known: text, ends, n > 1, aborts and failures."""

from __future__ import annotations

import asyncio
import gc
import math
from contextlib import aclosing

import pytest

from llmserve.core.request import FinishReason, Output, TokenLogprobs
from llmserve.core.sampling_params import GuidedDecodingParams, SamplingParams
from llmserve.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineShutdownError,
    InvalidRequestError,
)
from llmserve.llm import AsyncLLM
from llmserve.tokenizer import GenerationConfig, Tokenizer
from tests.engines import ScriptedEngine, expected_tokens, fake_logprobs
from tests.openai.models import ScoringEngine
from tests.tokenizer_files import EOS_ID, IM_END_ID, IM_START_ID, write_tokenizer

TEXT = "the quick brown fox é 日本 😀 jumps"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_directory(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def make(tokenizer):
    """An AsyncLLM over a ScriptedEngine with these arguments."""

    def build(*args, **kwargs):
        engine = ScriptedEngine(*args, **kwargs)
        config = GenerationConfig(eos_token_ids=(EOS_ID, IM_END_ID))
        return AsyncLLM(engine, tokenizer, config)

    return build


async def finish(stream):
    async for _ in stream:
        pass
    return stream.output


def params(**kwargs):
    return SamplingParams(**{"max_tokens": 12, **kwargs})


async def test_each_step_brings_its_difference_and_they_add_up(make, tokenizer):
    llm, prompt = make(tokens_per_output=2), tokenizer.encode(TEXT)
    num_tokens = len(prompt)
    llm.engine.num_cached_tokens, llm.engine.queue_s = 7, 0.5
    text, token_ids, steps = "", [], 0
    stream = llm.generate(prompt, params(max_tokens=num_tokens), request_id="r", prompt=TEXT)
    async for output in stream:
        assert output is stream.output
        completion = output.outputs[0]
        text += completion.text_diff
        token_ids += completion.token_ids_diff
        steps += 1
        assert (completion.text, completion.token_ids) == (text, token_ids)
        assert "\ufffd" not in text
        assert output.finished == (completion.finish_reason is not None)
    assert steps == math.ceil(num_tokens / 2)
    assert text == TEXT
    assert token_ids == expected_tokens(prompt, num_tokens)
    assert completion.length == num_tokens
    assert (completion.finish_reason, completion.stop_reason) == ("length", None)
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", TEXT, prompt)
    assert (output.cached_tokens, output.queue_s) == (7, 0.5)
    assert llm.engine.open == {}
    assert llm.engine.aborted == []


async def test_what_the_caller_left_open_is_resolved(make):
    llm = make(max_seq_len=32)
    await finish(llm.generate([9, 8, 7], params(max_tokens=None, n=3), request_id="r"))
    requests = llm.engine.requests
    assert [request.request_id for request in requests] == ["r-0", "r-1", "r-2"]
    assert [request.sequence_index for request in requests] == [0, 1, 2]
    assert {request.sampling_params.max_tokens for request in requests} == {29}
    assert len({request.sampling_params.seed for request in requests}) == 1
    assert {request.eos_token_ids for request in requests} == {(EOS_ID, IM_END_ID)}
    await finish(llm.generate([9, 8, 7], params(ignore_eos=True, seed=5), request_id="s"))
    assert requests[-1].eos_token_ids == ()
    assert requests[-1].sampling_params.seed == 5
    await finish(llm.generate([9], params(), request_id="t", cache_salt="mine"))
    assert requests[-1].cache_salt == "mine"
    assert requests[-1].sampling_params.seed != requests[0].sampling_params.seed


async def test_truncation_keeps_the_end_of_the_prompt(make):
    llm = make()
    stream = llm.generate([9, 8, 7], params(truncate_prompt_tokens=2), request_id="r")
    assert (await finish(stream)).prompt_token_ids == [8, 7]
    assert llm.engine.requests[0].prompt_token_ids == (8, 7)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "one"),
        ({"skip_special_tokens": False}, "one"),
        ({"include_stop_str_in_output": True}, "one"),
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "one<|im_end|>"),
        ({"detokenize": False}, ""),
    ],
)
async def test_the_end_of_sequence_token_is_no_text(make, tokenizer, arguments, expected):
    script = [*tokenizer.encode("one"), IM_END_ID]
    output = await finish(make(script).generate([9], params(**arguments), request_id="r"))
    completion = output.outputs[0]
    assert completion.text == expected
    assert completion.token_ids == script
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)


async def test_a_stop_token_ends_the_answer_and_is_its_reason(make, tokenizer):
    script = [*tokenizer.encode("one"), IM_START_ID, 50]
    llm = make(script)
    output = await finish(llm.generate([9], params(stop_token_ids=[IM_START_ID]), request_id="r"))
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", IM_START_ID)
    assert completion.text == "one"


async def test_an_answer_that_cannot_go_on_ends_with_a_token_of_its_text(make, tokenizer):
    """As under guided decoding, where no end-of-sequence token needs to be drawn."""
    llm, token_ids = make([9]), tokenizer.encode("one two")
    guided = params(guided_decoding=GuidedDecodingParams(choice=("one two",)))
    stream = llm.generate([9], guided, request_id="r")
    llm.engine.open["r-0"].pending.append(
        Output(request_id="r-0", token_ids=token_ids, finish_reason=FinishReason.STOP)
    )
    completion = (await finish(stream)).outputs[0]
    assert (completion.text, completion.finish_reason) == ("one two", "stop")


@pytest.mark.parametrize("tokens_per_output", [1, 3, 50])
@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_ends_the_answer_and_aborts_the_engine(
    make, tokenizer, tokens_per_output, include
):
    llm = make(tokenizer.encode("so it goes <stop> and on"), tokens_per_output=tokens_per_output)
    wanted = params(max_tokens=60, stop="<stop>", include_stop_str_in_output=include)
    seen = []
    async for output in llm.generate([9], wanted, request_id="r"):
        seen.append(output.outputs[0].text_diff)
    completion = output.outputs[0]
    assert "".join(seen) == completion.text == "so it goes " + "<stop>" * include
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "<stop>")
    # The token that completed it is the last one, however many the engine had sent with it.
    assert tokenizer.decode(completion.token_ids).rstrip().endswith("<stop>")
    assert output.finished
    assert llm.engine.open == {}
    # With all tokens in one output the engine had finished by itself.
    assert llm.engine.aborted == (["r-0"] if tokens_per_output < 50 else [])


async def test_text_that_may_begin_a_stop_string_is_held_back_until_it_is_decided(make, tokenizer):
    llm = make(tokenizer.encode("a <stob> b <st"))
    stream = llm.generate([9], params(max_tokens=60, stop="<stop>"), request_id="r")
    steps = [output.outputs[0].text async for output in stream]
    assert not any(text.endswith(("<", "<s", "<st", "<sto")) for text in steps[:-1])
    assert steps[-1] == "a <stob> b <st"


async def test_a_stop_string_in_the_last_token_counts(make, tokenizer):
    script = tokenizer.encode("go on stop")
    wanted = params(max_tokens=len(script), stop="stop")
    output = await finish(make(script).generate([9], wanted, request_id="r"))
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].text == "go on "


async def test_a_character_cut_by_max_tokens_shows_as_such(make, tokenizer):
    script = tokenizer.encode("a😀")
    wanted = params(max_tokens=len(script) - 1)
    output = await finish(make(script).generate([9], wanted, request_id="r"))
    assert output.outputs[0].text == "a\ufffd"


async def test_logprobs(make):
    llm = make([70, 80, 90])
    output = await finish(llm.generate([9], params(max_tokens=3, logprobs=2), request_id="r"))
    completion = output.outputs[0]
    assert [list(position) for position in completion.logprobs] == [[70, 71], [80, 81], [90, 91]]
    logprobs = [fake_logprobs(token, 2, 512).logprob for token in (70, 80, 90)]
    assert completion.cumulative_logprob == pytest.approx(sum(logprobs))
    assert completion.logprobs[1][80].logprob == logprobs[1]
    assert completion.logprobs[1][81].rank == 2
    none = await finish(llm.generate([9], params(max_tokens=3), request_id="s"))
    assert none.outputs[0].logprobs is None
    assert none.outputs[0].logprobs_diff is None
    assert none.outputs[0].cumulative_logprob is None
    only = await finish(llm.generate([9], params(max_tokens=1, logprobs=0), request_id="t"))
    assert list(only.outputs[0].logprobs[0]) == [70]


async def test_logprobs_of_a_token_outside_the_likeliest(make):
    llm = make([70])
    stream = llm.generate([9], params(max_tokens=1, logprobs=1), request_id="r")
    drawn = TokenLogprobs(logprob=-5.0, rank=40, top_token_ids=(3,), top_logprobs=(-0.5,))
    llm.engine.open["r-0"].pending.append(
        Output(
            request_id="r-0",
            token_ids=(70,),
            logprobs=(drawn,),
            finish_reason=FinishReason.LENGTH,
        )
    )
    completion = (await finish(stream)).outputs[0]
    assert {i: (p.logprob, p.rank) for i, p in completion.logprobs[0].items()} == {
        3: (-0.5, 1),
        70: (-5.0, 40),
    }
    assert completion.logprobs_diff == completion.logprobs


async def test_prompt_logprobs_come_with_the_first_step(make, tokenizer):
    engine = ScoringEngine([70, 80])
    prompt = [60, 61, 62]
    llm = AsyncLLM(engine, tokenizer, GenerationConfig(eos_token_ids=()))
    wanted = params(max_tokens=2, prompt_logprobs=2, n=2, truncate_prompt_tokens=2)
    steps = [
        [completion.prompt_logprobs for completion in output.outputs]
        async for output in llm.generate(prompt, wanted, request_id="r")
    ]
    for told in steps[-1]:
        (position,) = told
        assert {i: (p.logprob, p.rank) for i, p in position.items()} == {
            62: (fake_logprobs(62, 2, 512).logprob, 1),
            63: (fake_logprobs(62, 2, 512).logprob - 1, 2),
        }
    assert any(None not in told for told in steps)
    none = await finish(llm.generate(prompt, params(max_tokens=2), request_id="s"))
    assert none.outputs[0].prompt_logprobs is None


async def test_a_timeout_ends_an_answer_with_what_it_has(tokenizer):
    engine = ScoringEngine()
    llm = AsyncLLM(engine, tokenizer, GenerationConfig(eos_token_ids=()))
    output = await finish(llm.generate([60, 61], params(), request_id="r", timeout_s=5))
    completion = output.outputs[0]
    assert (completion.finish_reason, completion.length) == ("timeout", 5)
    assert completion.text == tokenizer.decode([60, 61, 60, 61, 60])
    assert output.finished
    for field, value in (("timeout_s", 0), ("timeout_s", math.nan), ("priority", 101)):
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate([60], params(), request_id="s", **{field: value})
        assert caught.value.param == field.removesuffix("_s")
    await finish(llm.generate([60], params(), request_id="t", priority=-7))
    assert [request.priority for request in engine.requests] == [0, -7]


async def test_a_stop_string_within_min_tokens_is_passed_over(make, tokenizer):
    """Whatever the outputs' sizes: what counts are tokens, the one that completes it included."""
    token_ids = tokenizer.encode("x stop stop")
    num_tokens = next(i for i in range(len(token_ids)) if "stop" in tokenizer.decode(token_ids[:i]))
    for tokens_per_output in (1, 2, 50):
        for min_tokens, text in ((num_tokens, "x "), (num_tokens + 1, "x stop ")):
            llm = make(token_ids, tokens_per_output=tokens_per_output)
            wanted = params(stop="stop", min_tokens=min_tokens, max_tokens=40)
            completion = (await finish(llm.generate([9], wanted, request_id="r"))).outputs[0]
            assert (completion.text, completion.stop_reason) == (text, "stop")


async def test_n_answers_come_merged(make, tokenizer):
    llm, prompt = make(), tokenizer.encode(TEXT)
    texts = [""] * 3
    async for output in llm.generate(prompt, params(n=3), request_id="r"):
        assert any(completion.token_ids_diff for completion in output.outputs)
        for completion in output.outputs:
            texts[completion.index] += completion.text_diff
    assert output.finished
    for index, completion in enumerate(output.outputs):
        expected = expected_tokens(prompt, 12, sequence_index=index)
        assert completion.token_ids == expected
        assert completion.text == texts[index] == tokenizer.decode(expected)
        assert completion.finish_reason == "length"


async def test_one_of_n_answers_may_end_earlier(make, tokenizer):
    stop = tokenizer.encode("x stop y")
    llm = make(lambda request: stop if request.sequence_index == 1 else [60, 61, 62])
    wanted = params(n=3, stop="stop", ignore_eos=True, max_tokens=40)
    output = await finish(llm.generate([9], wanted, request_id="r"))
    assert [c.finish_reason for c in output.outputs] == ["length", "stop", "length"]
    assert [c.length for c in output.outputs][::2] == [40, 40]
    assert llm.engine.aborted == ["r-1"]


@pytest.mark.parametrize("n", [1, 3])
async def test_leaving_early_aborts_every_sequence(make, n):
    llm = make()
    ids = [f"r-{i}" for i in range(n)]
    async with aclosing(llm.generate([9, 8], params(n=n), request_id="r")) as stream:
        await anext(stream)
    assert sorted(llm.engine.aborted) == ids
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert llm.engine.open == {}


@pytest.mark.parametrize("n", [1, 3])
async def test_an_engine_may_give_plain_generators(make, n):
    class GeneratorEngine(ScriptedEngine):
        async def generate(self, stream):
            async with aclosing(stream):
                async for output in stream:
                    yield output

        def submit(self, request):
            return self.generate(super().submit(request))

    llm = make()
    llm.engine = GeneratorEngine(token_delay_s=0.001)
    async with aclosing(llm.generate([9, 8], params(n=n), request_id="r")) as stream:
        await anext(stream)
    assert llm.engine.open == {}
    await llm.generate([9, 8], params(n=n), request_id="s").aclose()
    assert llm.engine.open == {}
    assert (await finish(llm.generate([9, 8], params(n=n), request_id="t"))).finished


@pytest.mark.parametrize("n", [1, 3])
async def test_closing_before_the_first_step_aborts_too(make, n):
    llm = make()
    await llm.generate([9, 8], params(n=n), request_id="r").aclose()
    assert len(llm.engine.aborted) == n


@pytest.mark.parametrize("n", [1, 3])
async def test_cancelling_the_task_aborts(make, n):
    llm = make()
    llm.engine.pause()
    task = asyncio.create_task(finish(llm.generate([9, 8], params(n=n), request_id="r")))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert llm.engine.open == {}
    assert len(llm.engine.aborted) == n


@pytest.mark.parametrize("n", [1, 3])
async def test_dropping_the_stream_aborts(make, n):
    llm = make()
    stream = llm.generate([9, 8], params(n=n, max_tokens=100), request_id="r")
    await anext(stream)
    del stream
    gc.collect()
    await asyncio.sleep(0.01)
    assert llm.engine.open == {}


@pytest.mark.parametrize("n", [1, 3])
async def test_abort_ends_the_stream_with_its_reason(make, n):
    llm = make()
    stream = llm.generate([9, 8], params(n=n, max_tokens=100), request_id="r")
    await anext(stream)
    await stream.abort()
    output = await finish(stream)
    assert output.finished
    assert {completion.finish_reason for completion in output.outputs} == {"abort"}


@pytest.mark.parametrize("n", [1, 3])
async def test_a_dying_engine_is_an_error_in_the_stream(make, n):
    llm = make()
    llm.engine.die_after_tokens = 7
    with pytest.raises(EngineDeadError):
        await finish(llm.generate([9, 8], params(n=n), request_id="r"))
    with pytest.raises(EngineDeadError):
        llm.generate([9, 8], params(n=n), request_id="s")
    llm.engine.revive()
    assert (await finish(llm.generate([9, 8], params(n=n), request_id="t"))).finished


async def test_an_error_of_one_sequence_ends_the_request_and_no_other(make):
    llm = make(token_delay_s=0.001)
    llm.engine.request_errors["bad-1"] = "the logits are NaN"
    good = asyncio.create_task(finish(llm.generate([9, 8], params(), request_id="good")))
    with pytest.raises(EngineError, match="the logits are NaN"):
        await finish(llm.generate([9, 8], params(n=3), request_id="bad"))
    assert (await good).finished
    assert llm.engine.open == {}


async def test_an_engine_that_ends_without_a_word_is_an_error(make):
    class Silent(ScriptedEngine):
        def submit(self, request):
            async def nothing():
                return
                yield

            return nothing()

    for n in (1, 2):
        llm = make()
        llm.engine = Silent()
        with pytest.raises(EngineDeadError, match="without an end"):
            await finish(llm.generate([9], params(n=n), request_id="r"))


async def test_what_cannot_be_served_is_refused_before_the_first_await(make):
    llm = make(max_seq_len=16)
    for prompt, wanted, param in [
        ([], params(), "prompt"),
        ([9] * 16, params(max_tokens=1), "prompt"),
        ([9] * 16, params(max_tokens=None), "prompt"),
        ([9] * 10, params(max_tokens=7), "max_tokens"),
        ([9, 512], params(), "prompt"),
        ([9, -1], params(), "prompt"),
        ([9], params(logprobs=513), "logprobs"),
        ([9], params(prompt_logprobs=513), "prompt_logprobs"),
        ([9], params(stop_token_ids=[512]), "stop_token_ids"),
        ([9], params(logit_bias={512: 1.0}), "logit_bias"),
        ([9] * 10, params(max_tokens=None, min_tokens=7), "min_tokens"),
        ([9], params(min_tokens=2, guided_decoding=GuidedDecodingParams(regex="a")), "min_tokens"),
        ([9], params(stop="x", detokenize=False), "stop"),
    ]:
        with pytest.raises(InvalidRequestError) as info:
            llm.generate(prompt, wanted, request_id="r")
        assert info.value.param == param
    with pytest.raises(ContextLengthError, match=r"16 tokens.* 10 in the prompt and 7 "):
        llm.generate([9] * 10, params(max_tokens=7), request_id="r")
    assert llm.engine.requests == []


async def test_overload_and_shutdown_are_raised_at_once(make):
    llm = make(max_queue_size=2)
    with pytest.raises(EngineOverloadedError) as info:
        llm.generate([9], params(n=3), request_id="r")
    await asyncio.sleep(0.01)
    # The two that had been taken, even while the error with its traceback is kept.
    assert llm.engine.aborted == ["r-0", "r-1"]
    assert info.value.retry_after_s == 2.0
    assert (await finish(llm.generate([9], params(n=2), request_id="s"))).finished
    await llm.engine.shutdown()
    with pytest.raises(EngineShutdownError):
        llm.generate([9], params(), request_id="t")
