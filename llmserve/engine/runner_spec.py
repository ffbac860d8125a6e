"""Which model runner an engine's process loads, as plain data that can be sent to it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeAlias

import msgspec

from llmserve.checkpoint.engine_dir import read_engine
from llmserve.config import BuildConfig, EngineConfig
from llmserve.engine.sizing import EngineLimits, resolve_limits
from llmserve.runtime.fake import FakeRunner
from llmserve.runtime.model_runner import ModelRunner


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
        )
        return runner, limits


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
    """

    build: BuildConfig
    vocab_size: int = 256
    load_s: float = 0.0
    step_s: float = 0.0
    step_computes: bool = False
    fail_at_step: int | None = None
    errors: dict[str, str] = {}

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


RunnerSpec: TypeAlias = TorchRunnerSpec | FakeRunnerSpec
