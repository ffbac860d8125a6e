"""An ``AsyncLLM`` over a ``ScriptedEngine``, for tests of the API."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from llmserve.core.request import FinishReason, Output, Request
from llmserve.llm import AsyncLLM
from llmserve.tokenizer import GenerationConfig, Tokenizer
from tests.engines import ScriptedEngine, ScriptedStream, fake_logprobs
from tests.tokenizer_files import write_tokenizer

MODEL = "tiny"


@cache
def tokenizer() -> Tokenizer:
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    return Tokenizer.from_directory(write_tokenizer(directory))


class ScoringEngine(ScriptedEngine):
    """Reports log-probabilities of prompts too, and ends answers at their timeout.

    A prompt's token has ``fake_logprobs``, as a generated one. A timeout is of tokens: an answer
    ends in place of the first output at which its request's seconds are fewer than its tokens.
    """

    def submit(self, request: Request) -> ScriptedStream:
        return _ScoringStream(self, super().submit(request))


class _ScoringStream(ScriptedStream):
    def __init__(self, engine: ScriptedEngine, stream: ScriptedStream) -> None:
        super().__init__(engine, stream.request)
        engine.open[stream.request.request_id] = self
        self._first = True

    def _next_output(self) -> Output:
        timeout_s = self.request.timeout_s
        if timeout_s is not None and self.position >= timeout_s:
            sentence = "the timeout has passed"
            request_id = self.request.request_id
            return Output(request_id, finish_reason=FinishReason.TIMEOUT, error=sentence)
        output = super()._next_output()
        k = self.request.sampling_params.prompt_logprobs
        if self._first and k is not None:
            vocab_size = self.engine.info.vocab_size
            output.prompt_logprobs = [
                fake_logprobs(token_id, k, vocab_size)
                for token_id in self.request.prompt_token_ids[1:]
            ]
        self._first = False
        return output


def make_llm(engine: ScriptedEngine | None = None, **generation_config: Any) -> AsyncLLM:
    """Greedy by default, as the tokenizer's generation_config.json says; ends at its EOS tokens."""
    engine = engine or ScoringEngine()
    engine.started = True
    settings = {"eos_token_ids": (0, 2), "temperature": 0.0, **generation_config}
    return AsyncLLM(engine, tokenizer(), GenerationConfig(**settings))


def says(text: str, **settings: Any) -> ScriptedEngine:
    """An engine that answers every request with this text."""
    return ScoringEngine(tokenizer().encode(text), **settings)
