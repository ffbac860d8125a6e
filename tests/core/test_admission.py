import pytest

from llmserve.errors import ContextLengthError, EngineOverloadedError, InvalidRequestError
from tests.core.factories import create_loop, create_request, create_requests, create_scheduler


@pytest.mark.parametrize(
    ("settings", "request_settings", "param", "words"),
    [
        ({}, {"prompt": []}, "prompt", "empty"),
        ({}, {"prompt": [1, -1]}, "prompt", "-1"),
        ({}, {"prompt": [2**32]}, "prompt", "4294967296 is not in the vocabulary"),
        ({}, {"prompt": [1], "priority": 101}, "priority", "priority is 101"),
        ({}, {"prompt": [1], "priority": -101}, "priority", "priority is -101"),
        ({}, {"prompt": [1], "retention_priority": 101}, "retention_priority", "is 101"),
        ({}, {"prompt": [1], "timeout_s": 0.0}, "timeout", "timeout is 0"),
        ({}, {"prompt": [1], "timeout_s": float("nan")}, "timeout", "timeout is nan"),
    ],
)
def test_refuses_malformed_requests(settings, request_settings, param, words):
    scheduler = create_scheduler(**settings)
    with pytest.raises(InvalidRequestError, match=words) as caught:
        scheduler.add_request(create_request("a", **request_settings), 0.0)
    assert caught.value.param == param
    assert not scheduler.has_unfinished_requests()


@pytest.mark.parametrize(
    ("settings", "prompt_tokens", "max_tokens", "words"),
    [
        # (limits, what just does not fit, what the error must name)
        ({"max_seq_len": 20}, 11, 10, "20 tokens, but 21 .* 11 in the prompt and 10 for"),
        ({"max_seq_len": 20}, 20, None, "20 tokens, but 21 .* 20 in the prompt and 1 for"),
        ({"num_blocks": 4}, 9, 9, "16 tokens, but 18 .* 9 in the prompt and 9 for"),
        ({"num_blocks": (8, 4)}, 9, 9, "16"),
        ({"max_num_tokens": 8, "enable_chunked_prefill": False}, 9, 1, "9 tokens.*8"),
    ],
)
def test_refuses_what_can_never_fit_and_takes_one_token_less(
    settings, prompt_tokens, max_tokens, words
):
    loop = create_loop(**settings)
    with pytest.raises(ContextLengthError, match=words) as caught:
        loop.add(create_request("a", range(prompt_tokens), max_tokens))
    assert caught.value.code == "context_length_exceeded"
    assert not loop.scheduler.has_unfinished_requests()
    loop.add(create_request("a", range(prompt_tokens - 1), max_tokens))
    loop.run()
    assert loop.ended["a"].finish_reason == "length"


def test_refuses_an_id_in_use_and_takes_it_again_afterwards():
    loop = create_loop()
    loop.add(create_request("a", [1]))
    with pytest.raises(InvalidRequestError, match="'a' is in use"):
        loop.scheduler.add_request(create_request("a", [2]), 0.0)
    loop.run()
    first = loop.ended.pop("a")
    loop.add(create_request("a", [1]))
    loop.run()
    assert loop.ended["a"].finish_reason == first.finish_reason


def test_a_full_queue_is_an_overload_and_a_bad_request_still_a_bad_request():
    loop = create_loop(max_queue_size=2)
    loop.add(*create_requests(2))
    with pytest.raises(EngineOverloadedError, match="2 requests are waiting"):
        loop.scheduler.add_request(create_request("c", [1]), 0.0)
    with pytest.raises(InvalidRequestError):
        loop.scheduler.add_request(create_request("c", []), 0.0)
    loop.step()  # both have started: there is room again
    loop.add(create_request("c", [1]))
    loop.run()
    assert len(loop.ended) == 3
