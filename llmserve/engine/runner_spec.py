"""Which model runner an engine's process loads, as plain data that can be sent to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeAlias

import msgspec

from llmserve.checkpoint.engine_dir import read_engine
from llmserve.config import BuildConfig, EngineConfig
from llmserve.engine.sizing import EngineLimits, resolve_limits
from llmserve.engine.structured_output import StructuredOutput
from llmserve.runtime.fake import FakeRunner
from llmserve.runtime.idle import IdleRunner
from llmserve.runtime.model_runner import ModelRunner

# One thread serves the demo model's 5 MiB better than two (docs/log.md): its operations are over
# before a second thread is awake. Where exactly that ends is not known.
_SHARED_FROM_BYTES = 32 * 2**20
# From so many cores on, one is left to the API process and to the engine's own bookkeeping.
_MANY_CORES = 4


class TorchRunnerSpec(msgspec.Struct, frozen=True, tag="torch"):
    """The PyTorch runtime on an engine directory, with a process for each rank but the first.

    Attributes:
        engine_dir: What ``llmserve build`` wrote.
    """

    engine_dir: str

    def load(self, config: EngineConfig) -> tuple[ModelRunner, EngineLimits]:
        """Load the model's weights under the limits that ``config`` and the build leave.

        Raises:
            ConfigError: ``config`` asks for more than the engine was built for, or than there is.
            CheckpointError: The directory is no engine, or damaged.
            EngineError: A rank ended while it was loading.
        """
        directory = Path(self.engine_dir)
        _, build = read_engine(directory)
        limits = resolve_limits(config, build)
        # Importing torch takes seconds; a wrong directory or limit is told before.
        from llmserve.runtime.torch import load_runner

        runner = load_runner(
            directory,
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            max_seq_len=limits.max_seq_len,
            tokens_per_block=limits.tokens_per_block,
            device=config.device,
            threads=config.threads,
            deterministic=config.deterministic,
            max_draft_len=config.speculative.max_draft_len if config.speculative else 0,
        )
        return runner, limits

    def structured_output(self) -> StructuredOutput | None:
        """What compiles grammars for the engine's tokenizer; None if it was built without one."""
        directory = Path(self.engine_dir)
        config, _ = read_engine(directory)
        return _structured_output(directory / "tokenizer.json", config.vocab_size)

    def compute_threads(self, cores: int) -> int:
        """How many threads the model is worth on so many cores."""
        files = Path(self.engine_dir).glob("*.safetensors")
        if sum(file.stat().st_size for file in files) < _SHARED_FROM_BYTES:
            return 1
        return cores - 1 if cores >= _MANY_CORES else cores


class FakeRunnerSpec(msgspec.Struct, frozen=True, kw_only=True, tag="fake"):
    """A runner without a model, for tests of everything around it.

    Attributes:
        build: Stands in for an engine's build_config; max_seq_len set.
        vocab_size: Generated ids are in [0, vocab_size).
        load_s: How long loading takes.
        step_s: How long each step takes.
        step_computes: Whether it computes for that time; otherwise it sleeps.
        fail_at_step: The step that raises.
        errors: By request id, the sentence with which that request fails.
        tokenizer_file: A tokenizer.json for guided decoding; None: there is none.
    """

    build: BuildConfig
    vocab_size: int = 256
    load_s: float = 0.0
    step_s: float = 0.0
    step_computes: bool = False
    fail_at_step: int | None = None
    errors: dict[str, str] = {}
    tokenizer_file: str | None = None

    def load(self, config: EngineConfig) -> tuple[ModelRunner, EngineLimits]:
        """Make the runner.

        Raises:
            ConfigError: ``config`` asks for more than ``build`` grants.
        """
        limits = resolve_limits(config, self.build)
        time.sleep(self.load_s)
        runner = FakeRunner(
            max_batch_size=limits.max_batch_size,
            max_num_tokens=limits.max_num_tokens,
            max_seq_len=limits.max_seq_len,
            tokens_per_block=limits.tokens_per_block,
            vocab_size=self.vocab_size,
            step_s=self.step_s,
            step_computes=self.step_computes,
            fail_at_step=self.fail_at_step,
            errors=self.errors,
        )
        return runner, limits

    def structured_output(self) -> StructuredOutput | None:
        """What compiles grammars for ``tokenizer_file``."""
        if self.tokenizer_file is None:
            return None
        return _structured_output(Path(self.tokenizer_file), self.vocab_size)

    def compute_threads(self, cores: int) -> int:
        """One: it shares nothing out."""
        return 1


class IdleRunnerSpec(msgspec.Struct, frozen=True, kw_only=True, tag="idle"):
    """A runner that only waits, for measuring everything around it: see ``IdleRunner``.

    Attributes:
        build: Stands in for an engine's build_config; max_seq_len set.
        vocab_size: Generated ids are in [0, vocab_size).
        step_s: How long each step takes.
    """

    build: BuildConfig
    vocab_size: int = 2**30
    step_s: float = 0.0

    def load(self, config: EngineConfig) -> tuple[ModelRunner, EngineLimits]:
        """Make the runner.

        Raises:
            ConfigError: ``config`` asks for more than ``build`` grants.
        """
        limits = resolve_limits(config, self.build)
        runner = IdleRunner(
            max_seq_len=limits.max_seq_len, vocab_size=self.vocab_size, step_s=self.step_s
        )
        return runner, limits

    def structured_output(self) -> None:
        """It has no tokenizer."""

    def compute_threads(self, cores: int) -> int:
        """One: it computes nothing."""
        return 1


def _structured_output(tokenizer_file: Path, vocab_size: int) -> StructuredOutput | None:
    if not tokenizer_file.exists():
        return None
    return StructuredOutput(tokenizer_file, vocab_size)


RunnerSpec: TypeAlias = TorchRunnerSpec | FakeRunnerSpec | IdleRunnerSpec
