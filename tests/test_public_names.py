"""The names that users import, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llmserve

NAMES = [
    "LLM",
    "AsyncLLM",
    "BuildConfig",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthError",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "EngineOverloadedError",
    "EngineShutdownError",
    "GenerationResult",
    "GuidedDecodingParams",
    "InvalidRequestError",
    "KvCacheConfig",
    "LlmserveError",
    "Logprob",
    "NGramDecodingConfig",
    "RequestOutput",
    "RequestTimeoutError",
    "SamplingParams",
    "Tokenizer",
    "UnsupportedCheckpointError",
    "__version__",
    "open_llm",
]


def test_the_public_names_are_these():
    assert llmserve.__all__ == NAMES
    assert set(NAMES) <= set(dir(llmserve))
    for name in NAMES:
        assert getattr(llmserve, name) is not None
    # What loads a name and what type checkers see are written down apart.
    assert set(llmserve._MODULE_OF) | {"__version__"} == set(NAMES)


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        _ = llmserve.Llm


def test_the_version_is_that_of_the_distribution():
    pyproject = Path(llmserve.__file__).parents[1] / "pyproject.toml"
    assert tomllib.loads(pyproject.read_text())["project"]["version"] == llmserve.__version__


@pytest.mark.parametrize(
    "statement",
    [
        "import llmserve",
        "import llmserve.core",
        "import llmserve.tokenizer",
        "from llmserve import SamplingParams, KvCacheConfig, InvalidRequestError",
        "from llmserve import LLM, AsyncLLM",
    ],
)
def test_importing_brings_no_torch(statement):
    """The engine computes in a process of its own; its callers do without torch's weight."""
    code = f"{statement}; import sys; print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
