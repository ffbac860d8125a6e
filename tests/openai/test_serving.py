"""Bodies in, answers and chunks out, over an engine whose words are known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from llmserve.errors import ContextLengthError, EngineDeadError, EngineError, InvalidRequestError
from llmserve.openai.errors import ModelNotFoundError
from llmserve.openai.observer import AnswerTimes
from llmserve.openai.serving import ChunkStream, OpenAIServing
from llmserve.tokenizer import Tokenizer
from tests.engines import ScriptedEngine, fake_logprobs
from tests.openai.models import MODEL, make_llm, says, tokenizer

TEXT = "the quick brown fox, wörld €uro!"
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT_PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def serving(engine: ScriptedEngine | None = None, **generation_config: Any) -> OpenAIServing:
    return OpenAIServing(make_llm(engine, **generation_config), MODEL)


def echo(request: Any) -> list[int]:
    return list(request.prompt_token_ids)


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
    )
    request = engine.requests[0]
    params = request.sampling_params
    assert (params.seed, params.min_p, params.max_tokens) == (7, 0.1, 3)
    assert (params.frequency_penalty, params.presence_penalty) == (0.2, 0.3)
    assert (params.repetition_penalty, params.stop_token_ids) == (1.1, (5,))
    assert request.eos_token_ids == ()


async def test_stop_token_ids_outside_the_vocabulary() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await complete(serving(), stop_token_ids=[512])
    assert caught.value.param == "stop_token_ids"


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
