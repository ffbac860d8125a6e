"""Which TensorRT-LLM is installed, told by its package metadata: nothing of it is imported.

Up to 1.2 it builds and runs TensorRT engines (``trtllm-build``, ``_tensorrt_engine.LLM``). From 1.3
on it has no engines: its LLM runs Hugging Face checkpoints, plain or quantised by ModelOpt.
"""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import dataclass

from llmserve.errors import ConfigError

DISTRIBUTION = "tensorrt-llm"
_INDEX = "--extra-index-url https://pypi.nvidia.com"
INSTALL_COMMAND = f"pip install tensorrt-llm {_INDEX}"
INSTALL_ENGINE_BUILDER_COMMAND = f"pip install 'tensorrt-llm<1.3' {_INDEX}"
# The API that engines are built and run with here was read in the source of 1.1 and 1.2.
_FIRST_RELEASE = (1, 1)
_FIRST_WITHOUT_ENGINES = (1, 3)
# Its PyTorch sampler took penalties and min_p and ignored them; from this release candidate on, the
# documentation lists them.
_FIRST_PYTORCH_PENALTIES = (1, 3, 0, 24)
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:\.?rc(\d+))?")
_NO_CANDIDATE = 10**6  # a final release comes after all its candidates


@dataclass(frozen=True, slots=True)
class TensorRTLLMRelease:
    """An installed TensorRT-LLM.

    Attributes:
        version: As its metadata has it, such as '1.2.1' or '1.3.0rc24'.
        key: (major, minor, micro, release candidate), in the order of releases.
    """

    version: str
    key: tuple[int, int, int, int]

    @property
    def has_engines(self) -> bool:
        """Whether it builds and runs TensorRT engines."""
        return self.key[:2] < _FIRST_WITHOUT_ENGINES

    @property
    def has_penalties(self) -> bool:
        """Whether its sampler honours penalties and min_p."""
        return self.has_engines or self.key >= _FIRST_PYTORCH_PENALTIES

    def __str__(self) -> str:
        return f"TensorRT-LLM {self.version}"


def installed_release() -> TensorRTLLMRelease | None:
    """The TensorRT-LLM of this Python environment; None if there is none.

    Raises:
        ConfigError: It is older than what is supported, or its version cannot be read.
    """
    try:
        version = importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    match = _VERSION.match(version)
    if match is None:
        raise ConfigError(f"the version of TensorRT-LLM is {version!r}, which cannot be read")
    major, minor, micro, candidate = match.groups()
    last = _NO_CANDIDATE if candidate is None else int(candidate)
    key = (int(major), int(minor), int(micro or 0), last)
    if key[:2] < _FIRST_RELEASE:
        raise ConfigError(
            f"TensorRT-LLM {version} is installed; this llmserve works with 1.1 and later. "
            "install a newer one, or take the native backend, which needs none"
        )
    return TensorRTLLMRelease(version, key)


def required_release() -> TensorRTLLMRelease:
    """The installed release.

    Raises:
        ConfigError: There is none, with how to install it; or it is too old.
    """
    release = installed_release()
    if release is None:
        raise ConfigError(
            "TensorRT-LLM is not installed in this Python environment; install it with "
            f"`{INSTALL_COMMAND}`, or take the native backend, which needs nothing more: serve the "
            "checkpoint with `llmserve serve --backend native`"
        )
    return release
