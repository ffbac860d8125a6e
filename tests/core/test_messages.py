"""What passes between processes survives the passage."""

import msgspec
import pytest

from llmserve.core.request import FinishReason, Output, Request, TokenLogprobs
from llmserve.core.stats import EngineStats
from llmserve.core.step import ModelRunnerOutput, SchedulerOutput
from tests.core.factories import create_loop, create_request

LOGPROBS = TokenLogprobs(-0.5, 2, (4, 3), (-0.1, -0.5))


def messages():
    loop = create_loop(num_blocks=(64, 64))
    loop.add(create_request("a", range(9), cache_salt="x", eos_token_ids=(2,)))
    yield create_request("a", range(9), cache_salt="x", stop_token_ids=(1, 2))
    yield loop.step()
    yield loop.step()
    yield ModelRunnerOutput(token_ids={"a": [1]}, logprobs={"a": [LOGPROBS]}, errors={"b": "c"})
    yield Output(
        request_id="a",
        token_ids=[1],
        logprobs=[LOGPROBS],
        finish_reason=FinishReason.STOP,
        stop_reason=1,
        prompt_logprobs=[LOGPROBS],
    )
    yield loop.scheduler.snapshot()


@pytest.mark.parametrize("message", list(messages()), ids=lambda message: type(message).__name__)
def test_messages_survive_msgpack(message):
    assert isinstance(message, Request | SchedulerOutput | ModelRunnerOutput | Output | EngineStats)
    data = msgspec.msgpack.encode(message)
    assert msgspec.msgpack.decode(data, type=type(message)) == message
