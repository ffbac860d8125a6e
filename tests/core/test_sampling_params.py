import pytest

from llmserve.core.sampling_params import GuidedDecodingParams, SamplingParams
from llmserve.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 1.01),
        ("top_p", float("nan")),
        ("min_p", -0.01),
        ("seed", 2**64),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e40),
        ("presence_penalty", float("inf")),
        ("presence_penalty", 1e39),
        ("frequency_penalty", -1e39),
        ("frequency_penalty", float("nan")),
        ("min_tokens", -1),
        ("min_tokens", 33),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: float("nan")}),
        ("logprobs", -1),
        ("prompt_logprobs", -1),
        ("n", 0),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("truncate_prompt_tokens", 0),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(InvalidRequestError, match=f"^{name} is ") as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("settings", "greedy"),
    [
        ({}, True),
        ({"temperature": 0.0, "top_p": 0.9}, True),
        ({"temperature": 1.0, "top_k": 1}, True),
        ({"top_p": 0.0}, True),
        ({"temperature": 1.0}, False),
        ({"top_k": 0}, False),
        ({"top_p": 0.9}, False),
        ({"min_p": 0.1}, False),
    ],
)
def test_greedy_is_tensorrt_llms_rule(settings, greedy):
    assert SamplingParams(**settings).greedy is greedy


@pytest.mark.parametrize(
    ("stop", "kept"), [(None, ()), ("end", ("end",)), (["a", "b"], ("a", "b")), ((), ())]
)
def test_stop_may_be_one_string_a_list_or_none(stop, kept):
    assert SamplingParams(stop=stop).stop == kept


def test_logit_bias_may_be_a_mapping():
    assert SamplingParams(logit_bias={3: 1, 5: -2.5}).logit_bias == ((3, 1.0), (5, -2.5))


def test_a_schema_may_be_given_decoded():
    assert GuidedDecodingParams(json={"type": "null"}).json == '{"type": "null"}'


@pytest.mark.parametrize(
    "fields", [{}, {"regex": "a", "json_object": True}, {"choice": ()}, {"choice": ("a", "")}]
)
def test_guided_decoding_is_one_thing(fields):
    with pytest.raises(InvalidRequestError, match="it must be"):
        GuidedDecodingParams(**fields)
