"""Whatever a client sends, its answer is a success or its own error: never a 5xx nor a 422."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.openai.protocol import NOT_IMPLEMENTED, ChatCompletionRequest, CompletionRequest
from llmserve.openai.serving import OpenAIServing
from tests.openai.models import MODEL, ScoringEngine, make_llm

# What Python's own JSON reader can bring, which is more than JSON: NaN and lone surrogates too.
TEXT = st.text(st.characters(codec=None), max_size=12)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)
WELL = st.text(max_size=12)  # what JSON over HTTP can bring
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant"]),
            "content": WELL
            | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": WELL}), max_size=3),
        },
        optional={"name": WELL},
    ),
    min_size=1,
    max_size=4,
)
ODD_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "tool", "developer"])},
        optional={"content": TEXT | VALUES, "name": VALUES, "tool_calls": VALUES},
    ),
    max_size=4,
)
# Values that are mostly right, so that the fuzzing gets past the first fault.
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.just(MODEL),
    "prompt": WELL
    | st.lists(WELL, min_size=1, max_size=3)
    | st.lists(st.integers(0, 511), max_size=5),
    "messages": MESSAGES,
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "top_k": st.integers(-1, 50),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 150),
    "logprobs": st.booleans() | st.integers(0, 20),
    "stop": WELL | st.lists(WELL, max_size=3),
    "stop_token_ids": st.lists(st.integers(0, 511), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "repetition_penalty": st.floats(0.1, 3),
    "truncate_prompt_tokens": st.integers(1, 20),
    "chat_template_kwargs": st.dictionaries(
        WELL | st.sampled_from(["messages", "eos_token", "loop", "self"]), VALUES, max_size=2
    ),
    "return_token_ids": st.booleans(),
    "echo": st.booleans(),
    "prompt_logprobs": st.integers(0, 20),
    "logit_bias": st.dictionaries(st.integers(0, 511).map(str), st.floats(-100, 100), max_size=3),
    "min_tokens": st.integers(0, 20),
    "cache_salt": WELL,
    "priority": st.integers(-100, 100),
    "timeout": st.floats(0.5, 20),
    "response_format": st.sampled_from(
        [
            {"type": "text"},
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}},
            {"type": "json_schema"},
        ]
    ),
    "guided_json": st.sampled_from([{"type": "string"}, '{"type": "null"}', "no schema"]),
    "guided_regex": st.sampled_from(["a+", "("]),
    "guided_choice": st.sampled_from([["yes", "no"], [""]]),
    "guided_grammar": st.sampled_from(['start: "a"', 'root ::= "a"', "::="]),
}
ODD: dict[str, st.SearchStrategy[Any]] = {"messages": ODD_MESSAGES}


def bodies(fields: set[str], required: tuple[str, ...]) -> st.SearchStrategy[Any]:
    def value(name: str) -> st.SearchStrategy[Any]:
        return LIKELY.get(name, VALUES) | ODD.get(name, VALUES) | VALUES

    optional = {
        name: value(name)
        for name in sorted(fields | NOT_IMPLEMENTED.keys())
        if name not in required
    }
    well_formed = st.fixed_dictionaries({name: LIKELY[name] for name in required})
    any_body = st.fixed_dictionaries({name: value(name) for name in required}, optional=optional)
    some = st.dictionaries(st.sampled_from(sorted(optional)), VALUES, max_size=3)
    likely = st.fixed_dictionaries({}, optional={k: LIKELY[k] for k in LIKELY if k in optional})
    nearly = st.builds(lambda a, b, c: {**b, **c, **a}, well_formed, likely, some)
    good = st.builds(lambda a, b: {**b, **a}, well_formed, likely)
    return good | nearly | any_body | VALUES


def answer(url: str, body: Any) -> None:
    async def respond() -> None:
        engine = ScoringEngine()
        api = OpenAIServing(make_llm(engine), MODEL)
        got = await api.respond(url, body, "r")
        assert got.status in (200, 400, 404, 408), got
        assert got.status != 408 or "timeout" in body
        assert got.status == 200 or set(got.body) == {"error"}
        msgspec.json.encode(got.body)
        assert not engine.open

    asyncio.run(respond())


FUZZ = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(bodies(set(CompletionRequest.model_fields), ("model", "prompt")))
def test_completions(body: Any) -> None:
    answer("/v1/completions", body)


@FUZZ
@given(bodies(set(ChatCompletionRequest.model_fields), ("model", "messages")))
def test_chat_completions(body: Any) -> None:
    answer("/v1/chat/completions", body)
