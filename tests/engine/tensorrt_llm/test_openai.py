"""Up to the OpenAI API: text, stop strings, streams, n answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from llmserve.engine.tensorrt_llm import TensorRTLLMEngine
from llmserve.errors import (
    UnsupportedCheckpointError,
)
from llmserve.llm import AsyncLLM, open_llm
from llmserve.openai.serving import ChunkStream, OpenAIServing
from tests import standins
from tests.engine.factories import until
from tests.engine.tensorrt_llm.factories import (
    VERSIONS,
    VOCAB_SIZE,
    greedy,
    is_empty,
)


@dataclass
class Served:
    """A model as `llmserve serve` opens it, and the OpenAI layer over it."""

    llm: AsyncLLM
    api: OpenAIServing
    engine: TensorRTLLMEngine


@pytest.fixture
async def served(
    models: dict[str, Path], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Served]:
    standins.install_tensorrt_llm(monkeypatch, tmp_path / "site", VERSIONS[kind])
    llm = await open_llm(models[kind], backend="auto" if kind == "engine" else "tensorrt-llm")
    assert isinstance(llm.engine, TensorRTLLMEngine)
    yield Served(llm, OpenAIServing(llm, "m"), llm.engine)
    await llm.engine.shutdown()
    standins.forget_tensorrt_llm()


async def _complete(served: Served, **fields: Any) -> dict[str, Any]:
    body = {"model": "m", "prompt": "the quick brown", "temperature": 0, **fields}
    return dict(msgspec.to_builtins(await served.api.create_completion(body, "r")))


def _text(served: Served, count: int) -> tuple[list[int], str]:
    tokenizer = served.llm.tokenizer
    prompt = tuple(tokenizer.encode("the quick brown"))
    tokens = greedy(prompt, count)
    return list(prompt), tokenizer.decode(tokens, skip_special_tokens=True)


async def test_text_and_stop_strings(served: Served) -> None:
    prompt, text = _text(served, 40)
    answer = await _complete(served, max_tokens=40, ignore_eos=True)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "length")
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    stop = text[10:13]
    answer = await _complete(served, max_tokens=40, ignore_eos=True, stop=stop)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    await until(lambda: is_empty(served.engine))
    assert all(params.stop is None for _, params, _ in standins.behaviour().submitted)


async def test_streaming(served: Served) -> None:
    _, text = _text(served, 30)
    body = {"model": "m", "prompt": "the quick brown", "stream": True, "temperature": 0}
    chunks = await served.api.create_completion({**body, "max_tokens": 30, "ignore_eos": True}, "r")
    assert isinstance(chunks, ChunkStream)
    pieces = [msgspec.to_builtins(chunk)["choices"][0] async for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == text
    assert len(pieces) > 5
    assert pieces[-1]["finish_reason"] == "length"


async def test_n_answers_are_n_requests(served: Served) -> None:
    executor = standins.behaviour().llms[0]._executor
    before = executor.num_sequences
    answer = await _complete(served, n=2, temperature=1, seed=3, max_tokens=20, ignore_eos=True)
    texts = [choice["text"] for choice in answer["choices"]]
    assert executor.num_sequences - before == 2
    tokenizer = served.llm.tokenizer
    for (inputs, params, _), text in zip(standins.behaviour().submitted[-2:], texts, strict=True):
        assert params.n == 1
        tokens = greedy((*inputs, params.seed % VOCAB_SIZE), 20)
        assert tokenizer.decode(tokens, skip_special_tokens=True) == text
    assert texts[0] != texts[1]


async def test_end_of_sequence_is_no_text(served: Served) -> None:
    """The tests' tokenizer ends at ids 0 and 2: one is the end_id, the other a stop token."""
    tokenizer = served.llm.tokenizer
    ended = 0
    for word in range(300, 320):
        tokens = greedy((word,), 100)
        ends = [i for i, token_id in enumerate(tokens) if token_id in (0, 2)]
        answer = await _complete(served, prompt=[word], max_tokens=100)
        (choice,) = answer["choices"]
        kept = tokens[: ends[0]] if ends else tokens
        assert choice["text"] == tokenizer.decode(kept, skip_special_tokens=True)
        assert choice["finish_reason"] == ("stop" if ends else "length")
        assert answer["usage"]["completion_tokens"] == (ends[0] + 1 if ends else 100)
        ended += bool(ends)
    assert ended > 3


@pytest.mark.parametrize("kind", ["engine"])
async def test_a_client_hears_what_is_refused(served: Served) -> None:
    body = {"model": "m", "prompt": "hi", "max_tokens": 4}
    answer = await served.api.respond("/v1/completions", {**body, "logprobs": 2}, "r")
    assert answer.status == 400
    assert "--gather-generation-logits" in answer.body["error"]["message"]
    answer = await served.api.respond("/v1/completions", {**body, "max_tokens": 500}, "r")
    assert (answer.status, answer.body["error"]["code"]) == (400, "context_length_exceeded")


async def test_the_wrong_backend_for_a_directory(models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedCheckpointError, match="native backend cannot run"):
        await open_llm(models["engine"], backend="native")
