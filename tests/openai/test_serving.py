"""Bodies in, answers and chunks out, over an engine whose words are known."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmserve.core.request import Request
from llmserve.core.sampling_params import GuidedDecodingParams
from llmserve.errors import (
    ContextLengthError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    RequestTimeoutError,
)
from llmserve.llm import Logprob
from llmserve.openai import serving as serving_module
from llmserve.openai.errors import ModelNotFoundError
from llmserve.openai.logprobs import CompletionLogprobsBuilder
from llmserve.openai.observer import AnswerTimes
from llmserve.openai.serving import ChunkStream, OpenAIServing
from llmserve.tokenizer import Tokenizer
from tests.engines import ScriptedEngine, fake_logprobs
from tests.openai.models import MODEL, ScoringEngine, make_llm, says, tokenizer
from tests.tokenizer_files import BOS_ID, IM_START_ID, write_metaspace_tokenizer

TEXT = "the quick brown fox, wörld €uro!"
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def serving(engine: ScriptedEngine | None = None, **generation_config: Any) -> OpenAIServing:
    return OpenAIServing(make_llm(engine, **generation_config), MODEL)


def echo(request: Any) -> list[int]:
    return list(request.prompt_token_ids)


def _requests(api: OpenAIServing) -> list[Request]:
    engine = api.llm.engine
    assert isinstance(engine, ScriptedEngine)
    return engine.requests


async def complete(api: OpenAIServing, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": "hi", **fields}
    return msgspec.to_builtins(await api.create_completion(body, "r"))


async def chat(api: OpenAIServing, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "messages": MESSAGES, **fields}
    return msgspec.to_builtins(await api.create_chat_completion(body, "r"))


async def stream(api: OpenAIServing, kind: str, **fields: Any) -> list[dict[str, Any]]:
    if kind == "chat":
        body = {"model": MODEL, "messages": MESSAGES, "stream": True, **fields}
        chunks: AsyncIterator[Any] = await api.create_chat_completion(body, "r")
    else:
        body = {"model": MODEL, "prompt": "hi", "stream": True, **fields}
        chunks = await api.create_completion(body, "r")
    assert isinstance(chunks, ChunkStream)
    return [msgspec.to_builtins(chunk) async for chunk in chunks]


async def test_completion() -> None:
    answer = await complete(serving(says(TEXT)), max_tokens=100)
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    num_tokens = len(tokenizer().encode(TEXT)) + 1  # and the token that ended it
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": num_tokens,
        "total_tokens": 2 + num_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == MODEL


async def test_a_text_far_too_long_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Tokenizer.encode
    encoded_chars = 0

    def counting(self: Tokenizer, text: str, **kwargs: Any) -> list[int]:
        nonlocal encoded_chars
        encoded_chars += len(text)
        return encode(self, text, **kwargs)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    text = "word " * 200_000
    api = serving(ScriptedEngine(max_seq_len=256))
    with pytest.raises(ContextLengthError, match="the prompt has at least") as caught:
        await complete(api, prompt=text)
    assert caught.value.param == "prompt"
    with pytest.raises(ContextLengthError) as caught:
        await chat(api, messages=[{"role": "user", "content": text}])
    assert caught.value.param == "messages"
    assert encoded_chars < 20_000


async def test_chat() -> None:
    engine = says(TEXT)
    answer = await chat(serving(engine))
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["id"].startswith("chatcmpl-")
    assert (
        tokenizer().decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
        == CHAT_PROMPT
    )


async def test_max_tokens_unset_is_16_for_completions_and_the_rest_for_chat() -> None:
    api = serving()
    assert (await complete(api))["usage"]["completion_tokens"] == 16
    answer = await chat(serving(says("a", max_seq_len=60), eos_token_ids=()))
    assert answer["usage"]["total_tokens"] == 60
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_the_default_of_16_gives_way_to_the_context() -> None:
    answer = await complete(serving(ScriptedEngine(max_seq_len=10)), prompt=[9] * 7)
    assert answer["usage"]["completion_tokens"] == 3
    with pytest.raises(ContextLengthError):
        await complete(serving(ScriptedEngine(max_seq_len=10)), prompt=[9] * 10)


async def test_too_long_names_limit_and_both_counts() -> None:
    with pytest.raises(ContextLengthError) as caught:
        await complete(serving(ScriptedEngine(max_seq_len=40)), prompt=[9] * 21, max_tokens=20)
    assert {"40", "21", "20"} <= set(str(caught.value).replace(",", "").replace(";", "").split())


@pytest.mark.parametrize("kind", ["completion", "chat"])
async def test_a_stream_says_what_the_whole_answer_says(kind: str) -> None:
    api = serving(says(TEXT))
    options = {"max_tokens": 100, "stream_options": {"include_usage": True}}
    *chunks, last = await stream(api, kind, **options)
    make = chat if kind == "chat" else complete
    whole = await make(api, max_tokens=100)
    if kind == "chat":
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
        texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    else:
        texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(texts) == TEXT
    assert "�" not in "".join(texts)
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, last]}) == 1


async def test_without_include_usage_there_is_none() -> None:
    chunks = await stream(serving(says("a b")), "chat")
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("streamed", [False, True])
async def test_several_prompts_times_n(streamed: bool) -> None:
    # The engine begins answer j to a prompt with the prompt's token j: all are told apart.
    api = serving(ScriptedEngine(tokens_per_output=2), eos_token_ids=())
    prompts = ["abcdef", "uvwxyz"]
    ids = [tokenizer().encode(prompt) for prompt in prompts]
    expected = {
        2 * p + j: tokenizer().decode([ids[p][(i + j) % len(ids[p])] for i in range(5)])
        for p in range(2)
        for j in range(2)
    }
    fields = {"prompt": prompts, "n": 2, "max_tokens": 5}
    texts: dict[int, str] = {}
    if streamed:
        for chunk in await stream(api, "completion", **fields):
            (choice,) = chunk["choices"]
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    else:
        answer = await complete(api, **fields)
        texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
        assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert answer["usage"]["completion_tokens"] == 20
    assert texts == expected


async def test_each_choice_of_a_stream_ends_once() -> None:
    chunks = await stream(serving(says("one two three")), "chat", n=3)
    ended = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(ended) == [0, 1, 2]


async def test_stop_strings_are_cut_and_reported() -> None:
    api = serving(says(TEXT))
    answer = await complete(api, max_tokens=100, stop=["zebra", "brown"])
    choice = answer["choices"][0]
    assert choice["text"] == "the quick "
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "brown"
    answer = await complete(api, max_tokens=100, stop="brown", include_stop_str_in_output=True)
    assert answer["choices"][0]["text"] == "the quick brown"


async def test_completion_logprobs() -> None:
    engine = says("wör", tokens_per_output=2)
    api = serving(engine, eos_token_ids=())
    ids = tokenizer().encode("wör")
    answer = await complete(api, max_tokens=len(ids), logprobs=2)
    logprobs = answer["choices"][0]["logprobs"]
    raw = [tokenizer().token_to_bytes(i) for i in ids]
    assert logprobs["token_logprobs"] == [fake_logprobs(i, 2, 512).logprob for i in ids]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * len(ids)
    assert logprobs["tokens"][0] == raw[0].decode()
    if len(raw) == 4:  # ö came as its two bytes
        assert logprobs["tokens"][1:3] == ["bytes:\\xc3", "bytes:\\xb6"]
        assert logprobs["text_offset"] == [0, 1, 1, 2]
    # In pieces they are the same.
    pieces = await stream(api, "completion", max_tokens=len(ids), logprobs=2)
    for key in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        joined = [x for piece in pieces for x in piece["choices"][0]["logprobs"][key]]
        assert joined == logprobs[key]


async def test_chat_logprobs() -> None:
    api = serving(says("wör"), eos_token_ids=())
    ids = tokenizer().encode("wör")
    answer = await chat(api, max_tokens=len(ids), logprobs=True, top_logprobs=3)
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).decode() == "wör"
    assert [token["logprob"] for token in content] == [
        fake_logprobs(i, 3, 512).logprob for i in ids
    ]
    for token, token_id in zip(content, ids, strict=True):
        reported = fake_logprobs(token_id, 3, 512)
        assert [top["logprob"] for top in token["top_logprobs"]] == list(reported.top_logprobs)
    answer = await chat(api, max_tokens=len(ids), logprobs=True)
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_token_ids() -> None:
    ids = tokenizer().encode("one two")
    api = serving(says("one two"), eos_token_ids=())
    answer = await complete(api, max_tokens=len(ids), return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == ids
    assert answer["choices"][0]["prompt_token_ids"] == tokenizer().encode("hi")
    chunks = await stream(api, "chat", max_tokens=len(ids), return_token_ids=True)
    assert [i for c in chunks for i in c["choices"][0].get("token_ids", [])] == ids
    assert [c for c in chunks if "prompt_token_ids" in c] == [chunks[0]]


async def test_truncated_prompts_are_counted_truncated() -> None:
    engine = ScriptedEngine(max_seq_len=32)
    answer = await complete(serving(engine), prompt=list(range(10, 110)), truncate_prompt_tokens=30)
    assert engine.requests[0].prompt_token_ids == tuple(range(80, 110))
    assert answer["usage"]["prompt_tokens"] == 30
    assert answer["usage"]["completion_tokens"] == 2


async def test_cached_tokens_are_reported() -> None:
    engine = says("a")
    engine.num_cached_tokens = 7
    answer = await chat(serving(engine))
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}


async def test_sampling_defaults_are_the_models_then_openais() -> None:
    engine = says("a")
    api = serving(engine, temperature=0.6, top_p=0.9, top_k=20)
    await complete(api)
    await complete(api, temperature=0.1, top_p=0.5, top_k=-1)
    await complete(serving(engine, temperature=None))
    first, second, third = (request.sampling_params for request in engine.requests)
    assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.9, 20)
    assert (second.temperature, second.top_p, second.top_k) == (0.1, 0.5, 0)
    assert (third.temperature, third.top_p, third.top_k) == (1.0, None, None)


async def test_every_sampling_field_arrives() -> None:
    engine = says("a")
    await complete(
        serving(engine),
        seed=7,
        min_p=0.1,
        frequency_penalty=0.2,
        presence_penalty=0.3,
        repetition_penalty=1.1,
        stop_token_ids=[5],
        ignore_eos=True,
        max_tokens=3,
        min_tokens=2,
        logit_bias={"7": -100, "9": 2.5},
        prompt_logprobs=4,
        cache_salt="mine",
        priority=-3,
        timeout=20,
    )
    request = engine.requests[0]
    assert (request.cache_salt, request.priority) == ("mine", -3)
    assert request.timeout_s is not None
    assert 15 < request.timeout_s <= 20
    params = request.sampling_params
    assert (params.seed, params.min_p, params.max_tokens) == (7, 0.1, 3)
    assert (params.frequency_penalty, params.presence_penalty) == (0.2, 0.3)
    assert (params.repetition_penalty, params.stop_token_ids) == (1.1, (5,))
    assert (params.min_tokens, params.prompt_logprobs) == (2, 4)
    assert params.logit_bias == ((7, -100.0), (9, 2.5))
    assert request.eos_token_ids == ()


async def test_ids_outside_the_vocabulary() -> None:
    for fields in ({"stop_token_ids": [512]}, {"logit_bias": {"1": 1, "512": 1}}):
        with pytest.raises(
            InvalidRequestError, match=r"has 512; ids must be in \[0, 512\)"
        ) as caught:
            await complete(serving(), **fields)
        assert {caught.value.param} == fields.keys()


async def test_min_tokens_beyond_max_tokens() -> None:
    for fields in ({"max_tokens": 3, "min_tokens": 4}, {"min_tokens": 17}):
        with pytest.raises(InvalidRequestError) as caught:
            await complete(serving(), **fields)
        assert caught.value.param == "min_tokens"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_stop_string_before_min_tokens_is_passed_over(streamed: bool) -> None:
    text = "one two one two"
    tokens = tokenizer().encode(text)
    engine = says(text, tokens_per_output=3)
    num_first = next(i for i in range(20) if "one" in tokenizer().decode(tokens[:i]))
    for min_tokens, expected in ((0, ""), (num_first, ""), (num_first + 1, "one two ")):
        fields = {"stop": "one", "min_tokens": min_tokens}
        if streamed:
            chunks = await stream(serving(engine), "completion", **fields)
            got = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        else:
            got = (await complete(serving(engine), **fields))["choices"][0]["text"]
        assert got == expected


# --- guided decoding -----------------------------------------------------------------------------


async def test_what_an_answer_must_match_reaches_the_engine() -> None:
    engine = says("a")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    json_schema = {"name": "n", "schema": schema, "strict": True}
    await chat(serving(engine), response_format={"type": "json_schema", "json_schema": json_schema})
    await complete(serving(engine), guided_choice=["a", "b"])
    first, second = (request.sampling_params.guided_decoding for request in engine.requests)
    assert first is not None
    assert json.loads(first.json or "") == schema
    assert second == GuidedDecodingParams(choice=("a", "b"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guided_regex", "("),
        ("guided_grammar", "start: nothing"),
        ("guided_json", '{"type": "strin'),
        ("guided_json", {"type": "wrong"}),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "wrong"}}},
        ),
    ],
)
async def test_what_no_answer_can_match_is_refused_by_its_field(field: str, value: object) -> None:
    engine = says("a")
    with pytest.raises(InvalidRequestError) as caught:
        await complete(serving(engine), **{field: value})
    assert caught.value.param == field
    assert str(caught.value).startswith(field)
    assert not engine.requests


# --- echo and log-probabilities of the prompt ----------------------------------------------------


@pytest.mark.parametrize("prompt", ["Hi  wörld ", "hi<|im_end|> you"])
async def test_echo_is_the_prompt_as_it_was_sent(prompt: str) -> None:
    api = serving(says(" and on"))
    answer = await complete(api, prompt=[prompt, "x"], echo=True, n=2, max_tokens=50)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [f"{prompt} and on"] * 2 + ["x and on"] * 2
    pieces = await stream(api, "completion", prompt=prompt, echo=True, n=2, max_tokens=50)
    for index in range(2):
        mine = [c["choices"][0]["text"] for c in pieces if c["choices"][0]["index"] == index]
        assert mine[0].startswith(prompt)
        assert "".join(mine) == f"{prompt} and on"
    assert all(request.sampling_params.prompt_logprobs is None for request in _requests(api))


async def test_echo_of_token_ids_is_their_text() -> None:
    api = serving(says("!"))
    ids = tokenizer().encode("hello world")
    answer = await complete(api, prompt=[IM_START_ID, *ids], echo=True)
    assert answer["choices"][0]["text"] == "hello world!"
    whole = await complete(api, prompt=[IM_START_ID, *ids], echo=True, skip_special_tokens=False)
    assert whole["choices"][0]["text"] == "<|im_start|>hello world!"
    # What was cut off is not there.
    cut = await complete(api, prompt="hello world", truncate_prompt_tokens=1, echo=True)
    assert cut["choices"][0]["text"] == tokenizer().decode(ids[-1:]) + "!"


async def test_echo_with_logprobs_as_lm_evaluation_harness_asks_for_it() -> None:
    """Its local-completions backend: token ids in, and what it reads of the answer."""
    engine = ScoringEngine()
    prompts = [[BOS_ID, *tokenizer().encode("the quick brown fox")], tokenizer().encode("wörld")]
    answer = await complete(
        serving(engine),
        prompt=prompts,
        temperature=0,
        max_tokens=1,
        logprobs=1,
        seed=1234,
        echo=True,
    )
    assert len(answer["choices"]) == 2
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        logprobs = choice["logprobs"]
        # The engine repeats the prompt.
        token_ids = [*prompt, prompt[0]]
        assert {len(logprobs[key]) for key in logprobs} == {len(token_ids)}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        expected = [fake_logprobs(token_id, 1, 512).logprob for token_id in token_ids]
        assert logprobs["token_logprobs"][1:] == expected[1:]
        for own, top in zip(
            logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True
        ):
            assert own == max(top.values())  # which is what "greedy" is to it
    assert {request.sampling_params.prompt_logprobs for request in engine.requests} == {1}


@pytest.mark.parametrize("as_text", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
async def test_offsets_are_those_of_the_whole_text(as_text: bool, streamed: bool) -> None:
    text = "so, wörld €uro"
    prompt = tokenizer().encode(text)
    api = serving(says(" the fox", tokens_per_output=2))
    fields: dict[str, Any] = {"prompt": text if as_text else [BOS_ID, *prompt]}
    fields |= {"logprobs": 2, "echo": True, "max_tokens": 50}
    if streamed:
        pieces = [c["choices"][0] for c in await stream(api, "completion", **fields)]
    else:
        pieces = (await complete(api, **fields))["choices"]
    whole = "".join(piece["text"] for piece in pieces)
    assert whole == f"{text} the fox"
    logprobs = {
        key: [x for piece in pieces for x in piece["logprobs"][key]]
        for key in ("tokens", "text_offset", "token_logprobs")
    }
    special = ("<|bos|>", "<|im_end|>", "<|endoftext|>")
    num_tokens = 0
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        if not token.startswith("bytes:") and token not in special:
            assert whole[offset:].startswith(token), (token, offset)
            num_tokens += 1
    assert num_tokens > 5
    assert logprobs["token_logprobs"].count(None) == 1


async def test_offsets_behind_a_prompt_that_decodes_to_another_text() -> None:
    text = "hi<|im_end|> you"  # a special token is sent as text, and is none when it is decoded
    answer = await complete(
        serving(says(" the fox")), prompt=text, echo=True, logprobs=0, max_tokens=50
    )
    (choice,) = answer["choices"]
    num_prompt = answer["usage"]["prompt_tokens"]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets)
    assert offsets[num_prompt] == len(text)
    spoken = list(zip(choice["logprobs"]["tokens"], offsets, strict=True))[num_prompt:-1]
    assert all(choice["text"][offset:].startswith(token) for token, offset in spoken)


def test_offsets_where_decoding_takes_a_space_away(tmp_path: Path) -> None:
    """In sentencepiece's manner the first token of a text begins with a space that is none."""
    metaspace = Tokenizer.from_directory(write_metaspace_tokenizer(tmp_path))
    prompt, said = metaspace.encode("hello world"), metaspace.encode("hello")
    builder = CompletionLogprobsBuilder(
        metaspace, 0, prompt_token_ids=prompt, skip_special_tokens=True
    )
    own = [{token_id: Logprob(-1.0, 1)} for token_id in [*prompt, *said]]
    echoed = builder.build_echo(own[1 : len(prompt)], len("hello world"))
    whole = builder.build(said, own[len(prompt) :], behind=echoed)
    text = metaspace.decode([*prompt, *said])
    for position in range(len(prompt) + len(said)):
        assert whole.text_offset[position] == len(metaspace.decode([*prompt, *said][:position]))
    assert text.startswith("hello world")


async def test_prompt_logprobs_in_vllms_shape() -> None:
    prompt = tokenizer().encode("hi you")
    api = serving(says("a"))
    answer = await complete(api, prompt=[prompt, prompt[:1]], prompt_logprobs=2, n=2)
    first, other, lonely, _ = answer["choices"]
    assert "prompt_logprobs" not in other  # it is the same
    assert lonely["prompt_logprobs"] == [None]
    told = first["prompt_logprobs"]
    assert told[0] is None
    for token_id, position in zip(prompt[1:], told[1:], strict=True):
        expected = fake_logprobs(token_id, 2, 512)
        assert position == {
            str(i): {
                "logprob": logprob,
                "rank": rank,
                "decoded_token": tokenizer().token_to_bytes(i).decode(errors="replace"),
            }
            for rank, (i, logprob) in enumerate(
                zip(expected.top_token_ids, expected.top_logprobs, strict=True), 1
            )
        }
    msgspec.json.encode(answer)
    chatted = await chat(api, prompt_logprobs=0)
    ids = tokenizer().encode(CHAT_PROMPT, add_special_tokens=False)
    assert [list(position) for position in chatted["prompt_logprobs"][1:]] == [
        [str(token_id)] for token_id in ids[1:]
    ]
    assert "prompt_logprobs" not in chatted["choices"][0]


async def test_echoed_logprobs_and_prompt_logprobs_have_their_own_numbers() -> None:
    engine = ScoringEngine()
    answer = await complete(
        serving(engine), prompt="hi you", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=1
    )
    assert engine.requests[0].sampling_params.prompt_logprobs == 3
    (choice,) = answer["choices"]
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {1}
    assert {len(position) for position in choice["prompt_logprobs"][1:]} == {3}


# --- timeouts and priorities ---------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_timeout_is_an_error_of_its_own(streamed: bool) -> None:
    notes = Notes()
    # One of the prompts has ended by then.
    engine = ScoringEngine(lambda request: [9] * (2 if request.prompt_token_ids[0] == 7 else 50))
    api = OpenAIServing(make_llm(engine), MODEL, notes)
    fields: dict[str, Any] = {"prompt": [[7], [8], [9]], "max_tokens": 50, "timeout": 5}
    with pytest.raises(RequestTimeoutError, match="timeout of 5 s"):
        await (stream(api, "completion", **fields) if streamed else complete(api, **fields))
    assert not engine.open
    assert sorted(times.finish_reason for times in notes.times) == ["stop", "timeout", "timeout"]


async def test_a_timeout_has_a_status() -> None:
    api = serving(ScoringEngine())
    body = {"model": MODEL, "prompt": "hi", "timeout": 2, "n": 3}
    answer = await api.respond("/v1/completions", body, "r")
    assert answer.status == 408
    error = answer.body["error"]
    assert isinstance(error, dict)
    assert (error["type"], error["code"]) == ("timeout_error", "timeout")


async def test_a_timeout_covers_the_check_of_a_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_module, "check_guided_decoding", lambda params: time.sleep(0.5))
    begun_s = time.perf_counter()
    with pytest.raises(RequestTimeoutError, match=r"timeout of 0\.05 s"):
        await complete(serving(), guided_regex="a+", timeout=0.05)
    assert time.perf_counter() - begun_s < 0.4


async def test_a_server_may_bound_timeouts() -> None:
    engine = says("a")
    api = OpenAIServing(make_llm(engine), MODEL, max_timeout_s=30)
    await complete(api)
    await complete(api, timeout=12)
    # What a request waited for before it came to the engine is taken off.
    for request, timeout_s in zip(engine.requests, (30, 12), strict=True):
        assert request.timeout_s is not None
        assert timeout_s - 5 < request.timeout_s <= timeout_s
    with pytest.raises(InvalidRequestError, match="timeout is 31; it must be at most 30") as caught:
        await complete(api, timeout=31)
    assert caught.value.param == "timeout"


async def test_priority_is_the_clients_or_the_servings() -> None:
    engine = says("a")
    api = OpenAIServing(make_llm(engine), MODEL, priority=10)
    await complete(api)
    await chat(api, priority=0)
    await complete(serving(engine))
    assert [request.priority for request in engine.requests] == [10, 0, 0]


async def test_add_generation_prompt_and_continue_final_message() -> None:
    engine = says("a")
    api = serving(engine)
    await chat(api, add_generation_prompt=False)
    messages = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
    await chat(api, messages=messages, continue_final_message=True)
    first, second = (
        tokenizer().decode(request.prompt_token_ids, skip_special_tokens=False)
        for request in engine.requests
    )
    assert first == "<|im_start|>user\nhi<|im_end|>\n"
    assert second == CHAT_PROMPT + "Well, "


async def test_template_kwargs_cannot_replace_the_messages() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await chat(serving(), chat_template_kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs"


async def test_unknown_model() -> None:
    with pytest.raises(ModelNotFoundError):
        await complete(serving(), model="other")


async def test_a_refused_prompt_leaves_nothing_running() -> None:
    engine = ScriptedEngine(max_seq_len=40)
    with pytest.raises(ContextLengthError):
        await complete(serving(engine), prompt=[[9], [9] * 50], max_tokens=5)
    await asyncio.sleep(0)
    assert len(engine.requests) == 1
    assert not engine.open


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
async def test_leaving_a_stream_aborts(begun: bool, prompts: int) -> None:
    engine = ScriptedEngine(token_delay_s=0.001)
    body = {"model": MODEL, "prompt": ["hi"] * prompts, "stream": True, "n": 2, "max_tokens": 90}
    chunks = await serving(engine).create_completion(body, "r")
    assert isinstance(chunks, ChunkStream)
    if begun:
        await anext(chunks)
    await chunks.aclose()
    await chunks.aclose()
    assert len(engine.aborted) == 2 * prompts
    assert not engine.open


async def test_cancelling_a_whole_answer_aborts() -> None:
    engine = ScriptedEngine(token_delay_s=0.001)
    task = asyncio.create_task(complete(serving(engine), prompt=["hi"] * 2, max_tokens=100))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(engine.aborted) == 2
    assert not engine.open


async def test_a_fault_of_one_prompt_ends_them_all() -> None:
    engine = ScriptedEngine(token_delay_s=0.001)
    engine.die_after_tokens = 5
    with pytest.raises(EngineDeadError):
        await complete(serving(engine), prompt=["hi"] * 3, max_tokens=50)
    assert not engine.open


class Notes:
    def __init__(self) -> None:
        self.first = 0
        self.next = 0
        self.times: list[AnswerTimes] = []

    def first_token(self, ttft_s: float) -> None:
        self.first += 1

    def next_tokens(self, itl_s: float) -> None:
        assert itl_s >= 0
        self.next += 1

    def finished(self, times: AnswerTimes) -> None:
        self.times.append(times)


async def test_every_answer_is_observed_once() -> None:
    engine, notes = says("one two three", token_delay_s=0.001), Notes()
    engine.queue_s = 0.5
    api = OpenAIServing(make_llm(engine), MODEL, notes)
    answer = await complete(api, prompt=["hi", "you"], n=2, max_tokens=30)
    total = answer["usage"]["completion_tokens"]
    assert notes.first == 4
    assert notes.first + notes.next == total
    assert [t.finish_reason for t in notes.times] == ["stop"] * 4
    assert sum(t.generation_tokens for t in notes.times) == total
    assert all(t.queue_s == 0.5 for t in notes.times)
    assert all(0 < (t.first_token_s or 0) <= t.end_s for t in notes.times)


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_aborts_and_errors_are_observed(reason: str) -> None:
    engine, notes = ScriptedEngine(), Notes()
    api = OpenAIServing(make_llm(engine), MODEL, notes)
    body = {"model": MODEL, "prompt": "hi", "stream": True, "max_tokens": 90}
    chunks = await api.create_completion(body, "r")
    assert isinstance(chunks, ChunkStream)
    await anext(chunks)
    if reason == "error":
        engine.die()
        with pytest.raises(EngineError):
            await anext(chunks)
    await chunks.aclose()
    assert [t.finish_reason for t in notes.times] == [reason]


async def test_respond_is_http_without_http() -> None:
    engine = says("a")
    api = serving(engine)
    good = await api.respond("/v1/chat/completions", {"model": MODEL, "messages": MESSAGES}, "r")
    assert good.status == 200
    assert good.body["choices"][0]["message"]["content"] == "a"  # type: ignore[index,call-overload]
    for url, body, status, param in [
        ("/v1/embeddings", {}, 404, "url"),
        ("/v1/completions", {"model": MODEL}, 400, "prompt"),
        ("/v1/completions", {"model": "x", "prompt": "a"}, 404, "model"),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "stream": True}, 400, "stream"),
        ("/v1/completions", {"model": MODEL, "prompt": "a", "\ud800": 1}, 400, None),
        ("/v1/completions", "text", 400, None),
    ]:
        bad = await api.respond(url, body, "r")
        assert bad.status == status
        assert bad.body["error"]["param"] == param  # type: ignore[index,call-overload]
        msgspec.json.encode(bad.body)
    engine.overloaded = True
    busy = await api.respond("/v1/completions", {"model": MODEL, "prompt": "a"}, "r")
    assert busy.status == 503


async def test_respond_tells_nothing_of_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    def bug(request: object) -> list[int]:
        raise RuntimeError("secret")

    api = serving(ScriptedEngine(bug))
    answer = await api.respond("/v1/completions", {"model": MODEL, "prompt": "a"}, "r-17")
    assert answer.status == 500
    assert "secret" not in str(answer.body)
    assert "r-17" in caplog.text
    assert "secret" in caplog.text


async def test_long_prompts_are_encoded_beside_the_event_loop() -> None:
    api = serving(ScriptedEngine(max_seq_len=1_000_000))
    answer = await complete(api, prompt="hello world " * 10_000, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] > 10_000
