"""Which bodies are taken, and what is said about those that are not."""

from __future__ import annotations

import math
import re
import time

import pytest

from llmserve.core.sampling_params import GuidedDecodingParams
from llmserve.errors import InvalidRequestError
from llmserve.openai.protocol import (
    MAX_BIASED_TOKENS,
    MAX_CHOICES,
    NOT_IMPLEMENTED,
    ChatCompletionRequest,
    CompletionRequest,
    parse_request,
)

MESSAGES = [{"role": "user", "content": "hi"}]
SCHEMA_FORMAT = {"name": "answer", "schema": {"type": "object"}}


def completion(**fields: object) -> CompletionRequest:
    return parse_request(CompletionRequest, {"model": "m", "prompt": "hi", **fields})


def chat(**fields: object) -> ChatCompletionRequest:
    return parse_request(ChatCompletionRequest, {"model": "m", "messages": MESSAGES, **fields})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ["hi"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_each_form_of_prompt_becomes_a_list(prompt: object, prompts: object) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    "prompt",
    [
        [],
        [[]],
        None,
        7,
        {"text": "hi"},
        [1, "a"],
        [1, True],
        [1, -1],
        [1, 2**31],
        [1, 1.0],
        ["a", None],
        "\ud800",
        ["\udfff"],
        ["a"] * (MAX_CHOICES + 1),
    ],
)
def test_other_prompts_are_refused(prompt: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=prompt)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("field", "allowed", "refused"),
    [
        ("temperature", [0, 0.5, 2, None], [-0.1, 2.1, "0.5", True, math.nan, math.inf, [1]]),
        ("top_p", [0.1, 1], [0, 1.1, -1]),
        ("top_k", [-1, 0, 5], [-2, 1.5, True, 2**31]),
        ("min_p", [0, 1], [-0.1, 1.1]),
        ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
        ("presence_penalty", [-2, 2], [-2.1, 2.1]),
        ("repetition_penalty", [0.1, 3], [0, -1, 1e-40, 1e40]),
        ("n", [1, 128], [0, -1, 1.0, True, MAX_CHOICES + 1]),
        ("max_tokens", [1, 10**30], [0, -1, "5", 2.5]),
        ("logprobs", [0, 20], [-1, 21, True]),
        ("seed", [-(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 0.5]),
        ("stop", ["x", ["x", "y"], []], [7, ["x", 7], ["x"] * 65, ["x" * 1025], "\ud800"]),
        ("stop_token_ids", [[1]], [1, [-1], [True], [2**31]]),
        ("stream", [True, False], ["true", 1]),
        ("truncate_prompt_tokens", [1], [0, -1]),
        ("ignore_eos", [True], [1]),
        ("echo", [True, False, None], [0, "true"]),
        ("prompt_logprobs", [0, 20], [-1, 21, True]),
        ("min_tokens", [0, 7], [-1, True, 1.0]),
        ("cache_salt", ["tenant"], ["", 7, "x" * 1025, "\ud800"]),
        ("priority", [-100, 0, 100], [-101, 101, 1.5, True]),
        ("timeout", [0.001, 60, None], [0, -1, math.nan, math.inf, "1", 1e10]),
        (
            "logit_bias",
            [{}, {"0": -100, "50256": 100.0}, None],
            [
                [],
                {"x": 1},
                {"-1": 1},
                {"01": 1},
                {"2147483648": 1},
                {"1": 101},
                {"1": -100.5},
                {"1": True},
                {"1": "2"},
                {"1": None},
                {"1": math.nan},
                {str(i): 1 for i in range(MAX_BIASED_TOKENS + 1)},
            ],
        ),
        (
            "response_format",
            [
                {"type": "text"},
                {"type": "json_object"},
                {"type": "json_schema", "json_schema": SCHEMA_FORMAT},
                {"type": "json_schema", "json_schema": {**SCHEMA_FORMAT, "strict": True}},
                None,
            ],
            [
                "json_object",
                {},
                {"type": "yaml"},
                {"type": "json_object", "schema": {}},
                {"type": "json_schema"},
                {"type": "text", "json_schema": SCHEMA_FORMAT},
                {"type": "json_schema", "json_schema": {"name": "n"}},
                {"type": "json_schema", "json_schema": {"schema": {}}},
                {"type": "json_schema", "json_schema": {**SCHEMA_FORMAT, "name": "a b"}},
                {"type": "json_schema", "json_schema": {**SCHEMA_FORMAT, "schema": "x"}},
                {"type": "json_schema", "json_schema": {**SCHEMA_FORMAT, "strict": 1}},
                {"type": "json_schema", "json_schema": {**SCHEMA_FORMAT, "more": 1}},
            ],
        ),
        ("guided_json", [{"type": "object"}, '{"type": "object"}'], [True, ["x"], {"a": math.inf}]),
        ("guided_regex", ["a+", ""], [7, "\ud800"]),
        ("guided_choice", [["yes", "no"]], [[], [""], "yes", [7], ["x"] * 1025]),
        ("guided_grammar", ['start: "a"'], [7]),
        ("user", ["me"], [7]),
        ("metadata", [{"a": "b"}], [{"a": 1}, "x", {"a": "b" * 513}]),
    ],
)
def test_ranges_and_types(field: str, allowed: list[object], refused: list[object]) -> None:
    for value in allowed:
        completion(**{field: value})
    for value in refused:
        with pytest.raises(InvalidRequestError) as caught:
            completion(**{field: value})
        assert caught.value.param is not None
        assert caught.value.param.startswith(field), (value, caught.value.param)
        assert str(caught.value).startswith(field)


def test_an_error_says_value_and_limit() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(temperature=3.5)
    assert str(caught.value) == "temperature is 3.5; it must be less than or equal to 2"


def test_an_error_about_a_length_says_it_in_the_same_words() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(messages=[])
    assert str(caught.value) == "messages is []; it must have at least 1 item, not 0"
    with pytest.raises(InvalidRequestError) as caught:
        chat(metadata={"k": "x" * 513})
    assert str(caught.value).endswith("; it must have at most 512 characters")
    with pytest.raises(InvalidRequestError) as caught:
        chat(stop=["x" * 1025])
    assert str(caught.value).endswith("; it must have at most 1024 characters")
    with pytest.raises(InvalidRequestError) as caught:
        chat(stop=["x"] * 65)
    assert str(caught.value).endswith("; it must have at most 64 items, not 65")
    with pytest.raises(InvalidRequestError) as caught:
        chat(metadata={str(i): "" for i in range(17)})
    assert str(caught.value).endswith("; it must have at most 16 items, not more")


def test_of_many_faults_only_the_first_is_worked_out() -> None:
    begin_s = time.process_time()
    with pytest.raises(InvalidRequestError) as caught:
        chat(messages=[*MESSAGES, *[{"role": "robot", "content": 1}] * 300_000])
    assert caught.value.param == "messages[1].role"
    assert time.process_time() - begin_s < 0.5  # all of them take some 2 s


def test_long_values_are_cut_in_errors() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(temperature="x" * 100_000)
    assert len(str(caught.value)) < 300
    with pytest.raises(InvalidRequestError) as caught:
        completion(**{"x" * 100_000: 1})
    assert len(str(caught.value)) < 300


def test_an_unknown_field_is_named() -> None:
    for make in (completion, chat):
        with pytest.raises(InvalidRequestError) as caught:
            make(temprature=1)
        assert caught.value.param == "temprature"
        assert caught.value.code == "unknown_field"


@pytest.mark.parametrize("field", sorted(NOT_IMPLEMENTED))
def test_what_is_not_implemented_is_refused_unless_neutral(field: str) -> None:
    for make in (completion, chat):
        make(**{field: None})
        for neutral in NOT_IMPLEMENTED[field]:
            make(**{field: neutral})
        with pytest.raises(InvalidRequestError) as caught:
            make(**{field: {"some": "thing"}})
        assert caught.value.param == field
        assert caught.value.code == "unsupported"


def test_neutral_values_are_of_their_own_type() -> None:
    with pytest.raises(InvalidRequestError):
        completion(min_tokens=False)
    with pytest.raises(InvalidRequestError):
        completion(echo=0)


def test_a_fault_within_response_format_is_named() -> None:
    for response_format, param in (
        ("json_object", "response_format"),
        ({"type": "yaml"}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema"),
        (
            {"type": "json_schema", "json_schema": {"name": "n"}},
            "response_format.json_schema.schema",
        ),
        (
            {"type": "json_schema", "json_schema": {**SCHEMA_FORMAT, "name": "a b"}},
            "response_format.json_schema.name",
        ),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            chat(response_format=response_format)
        assert caught.value.param == param
        assert re.match(rf"{re.escape(param)} (is|is .*; it must .*)", str(caught.value))


@pytest.mark.parametrize(
    ("fields", "field", "guided_decoding"),
    [
        ({}, None, None),
        ({"response_format": {"type": "text"}}, None, None),
        (
            {"response_format": {"type": "json_object"}},
            "response_format",
            GuidedDecodingParams(json_object=True),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": SCHEMA_FORMAT}},
            "response_format",
            GuidedDecodingParams(json='{"type": "object"}'),
        ),
        (
            {"guided_json": {"type": "null"}},
            "guided_json",
            GuidedDecodingParams(json='{"type": "null"}'),
        ),
        ({"guided_json": "text"}, "guided_json", GuidedDecodingParams(json="text")),
        ({"guided_regex": "a+"}, "guided_regex", GuidedDecodingParams(regex="a+")),
        (
            {"guided_choice": ["a", "b"]},
            "guided_choice",
            GuidedDecodingParams(choice=("a", "b")),
        ),
        ({"guided_grammar": "g"}, "guided_grammar", GuidedDecodingParams(grammar="g")),
        (
            {"guided_regex": "a+", "response_format": {"type": "text"}, "logit_bias": {"1": 1}},
            "guided_regex",
            GuidedDecodingParams(regex="a+"),
        ),
    ],
)
def test_what_an_answer_must_match(
    fields: dict[str, object], field: str | None, guided_decoding: GuidedDecodingParams | None
) -> None:
    for request in (completion(**fields), chat(**fields)):
        expected = None if field is None else (field, guided_decoding)
        assert request.guided_decoding == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "a", "guided_choice": ["a"]},
        {"guided_json": {}, "guided_grammar": "g"},
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
    ],
)
def test_an_answer_matches_one_thing(fields: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match="exclude each other") as caught:
        chat(**fields)
    assert caught.value.param in fields


def test_prompt_logprobs_are_not_streamed() -> None:
    completion(prompt_logprobs=1, stream=False)
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt_logprobs=1, stream=True)
    assert caught.value.param == "prompt_logprobs"


def test_best_of_is_n_or_nothing() -> None:
    completion(best_of=1)
    completion(best_of=3, n=3)
    with pytest.raises(InvalidRequestError) as caught:
        completion(best_of=3)
    assert caught.value.param == "best_of"


def test_prompts_times_n_are_bounded() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(prompt=["a"] * 100, n=100)
    assert caught.value.param == "n"


def test_advisory_fields_are_taken() -> None:
    chat(
        user="u",
        metadata={"k": "v"},
        store=True,
        service_tier="auto",
        prompt_cache_key="k",
        safety_identifier="s",
    )


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [*MESSAGES, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "y": 1}]}, "messages[0].y"),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"chat_template_kwargs": {"x": math.inf}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"x": "\ud800"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ],
)
def test_chat_fields_refused(fields: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.param is not None
    assert caught.value.param.startswith(param)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "user", "content": parts}])
    assert request.messages[0].for_template() == {"role": "user", "content": "a\nb"}


def test_an_assistant_message_of_an_earlier_answer_is_taken() -> None:
    earlier = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [],
        "audio": None,
    }
    request = chat(messages=[*MESSAGES, earlier, *MESSAGES])
    assert request.messages[1].for_template() == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("body", [None, [], "x", 7, {}, {"model": "m"}, {"prompt": "x"}])
def test_bodies_that_are_no_requests(body: object) -> None:
    with pytest.raises(InvalidRequestError):
        parse_request(CompletionRequest, body)
