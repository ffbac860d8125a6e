"""An ``AsyncLLM`` over a ``ScriptedEngine``, for tests of the API."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from llmserve.llm import AsyncLLM
from llmserve.tokenizer import GenerationConfig, Tokenizer
from tests.engines import ScriptedEngine
from tests.tokenizer_files import write_tokenizer

MODEL = "tiny"


@cache
def tokenizer() -> Tokenizer:
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    return Tokenizer.from_directory(write_tokenizer(directory))


def make_llm(engine: ScriptedEngine | None = None, **generation_config: Any) -> AsyncLLM:
    """Greedy by default, as the tokenizer's generation_config.json says; ends at its EOS tokens."""
    engine = engine or ScriptedEngine()
    engine.started = True
    settings = {"eos_token_ids": (0, 2), "temperature": 0.0, **generation_config}
    return AsyncLLM(engine, tokenizer(), GenerationConfig(**settings))


def says(text: str, **settings: Any) -> ScriptedEngine:
    """An engine that answers every request with this text."""
    return ScriptedEngine(tokenizer().encode(text), **settings)
