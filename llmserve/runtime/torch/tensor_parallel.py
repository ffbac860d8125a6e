"""The ModelRunner over the ranks of a tensor-parallel engine.

Rank 0 is in this process, each other in one of its own (``rank_process``), started here. Every call
goes to all: they compute each layer together, rank 0 samples, and the others are given its tokens.
They live and die as one. When a rank ends, whatever ended it, an error that names it is raised in
this process's main thread at once; when this process ends, so do they.

Importing this imports no torch, which takes seconds: the ranks do it while this process does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.core.step import ModelRunnerOutput, SchedulerOutput
from llmserve.errors import ConfigError
from llmserve.runtime.host import available_cores
from llmserve.runtime.model_runner import ModelInfo, TokenMasks
from llmserve.runtime.torch.rank_handle import RankHandle, raise_failure
from llmserve.runtime.torch.rank_messages import (
    AllocateKvCache,
    Join,
    Joined,
    Load,
    Loaded,
    Step,
    ToRank,
    WarmUp,
)
from llmserve.runtime.torch.rank_process import load_rank, make_group

if TYPE_CHECKING:
    from llmserve.runtime.torch.runner import StepHandle

# A rank's connections close a moment before its parent is told that it has ended.
_BLAME_S = 1.0


class TensorParallelRunner:
    """Executes steps of a native engine of several ranks. One in a process, on its main thread.

    Args:
        engine_dir: What ``llmserve build`` wrote.
        tp_size: Its ranks.
        max_batch_size: Most requests known at a time.
        max_num_tokens: Most tokens computed in one step.
        max_seq_len: Longest prompt plus answer, in tokens.
        tokens_per_block: Tokens of one KV block.
        device: 'cpu', 'cuda' or 'auto'; rank r is on cuda:r.
        threads: CPU threads of all ranks together, of which each has one at least; None takes the
            cores there are.
        deterministic: As for ``TorchRunner``.
        max_draft_len: As for ``TorchRunner``.

    Attributes:
        info: On the CPU the bytes of weights and blocks are all ranks' together, for they share
            the host's memory; on CUDA they are those of each GPU. ``device`` is rank 0's.

    Raises:
        CheckpointError: As ``TorchRunner``, from any rank.
        ConfigError: There is no such device, or fewer GPUs than ranks.
        EngineError: A rank ended while it was loading.
    """

    info: ModelInfo

    def __init__(
        self,
        engine_dir: Path,
        tp_size: int,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        tokens_per_block: int,
        device: str = "auto",
        threads: int | None = None,
        deterministic: bool = False,
        max_draft_len: int = 0,
    ) -> None:
        threads = max(1, (threads or available_cores()) // tp_size)
        self._others: list[RankHandle] = []
        with contextlib.ExitStack() as stack, self._blaming():
            for rank in range(1, tp_size):
                self._others.append(RankHandle(rank, tp_size, threads))
                stack.callback(self._others[-1].kill)
            # Unwound before the ranks are killed: that is no failure.
            previous = signal.signal(signal.SIGCHLD, self._on_child_ended)
            stack.callback(signal.signal, signal.SIGCHLD, previous)
            devices = rank_devices(device, tp_size)
            load = Load(
                engine_dir=str(engine_dir),
                max_batch_size=max_batch_size,
                max_num_tokens=max_num_tokens,
                max_seq_len=max_seq_len,
                tokens_per_block=tokens_per_block,
                devices=devices,
                threads=threads,
                deterministic=deterministic,
                max_draft_len=max_draft_len,
            )
            self._send(load)
            self._group = make_group(load, 0)
            stack.callback(self._group.leave)
            self._runner = load_rank(load, 0, self._group)
            loaded = [other.receive(Loaded).weights_bytes for other in self._others]
            port = self._group.open()
            self._send(Join(port))
            self._group.join(port)
            joined = [other.receive(Joined).available_kv_bytes for other in self._others]
            self._close = stack.pop_all().close
        if devices[0] == "cpu":
            self.info, self._other_kv_bytes = _of_one_host(self._runner.info, loaded), []
        else:
            self.info, self._other_kv_bytes = self._runner.info, joined
            threading.Thread(target=self._abort_when_one_ends, daemon=True).start()

    def available_kv_bytes(self) -> int:
        """On the CPU what it takes by default, for all ranks; on CUDA what the fullest GPU has."""
        if self.info.device == "cpu":
            # Imported late, as the runner is: the ranks are started before torch is.
            from llmserve.runtime.torch.runner import default_kv_bytes

            return default_kv_bytes(self.info)
        return min([self._runner.available_kv_bytes(), *self._other_kv_bytes])

    def allocate_kv_cache(self, num_blocks: tuple[int, ...]) -> None:
        """Reserve the KV cache: on every rank so many blocks of its own heads.

        Raises:
            ValueError: It is there already, or the counts are not one per KV group.
        """
        with self._blaming():
            self._send(AllocateKvCache(num_blocks))
            self._runner.allocate_kv_cache(num_blocks)

    def warm_up(self) -> None:
        """Run a prefill and a decode in block 0, greedy and sampled, and forget them."""
        with self._blaming():
            self._send(WarmUp())
            self._runner.warm_up()

    def launch(self, scheduler_output: SchedulerOutput) -> StepHandle:
        """Start a step on every rank.

        Raises:
            EngineError: A rank has ended.
            ValueError: The step is not what the scheduler's contract allows.
        """
        with self._blaming():
            self._send(Step(scheduler_output))
            return self._runner.launch(scheduler_output)

    def finish(self, handle: StepHandle, masks: TokenMasks | None = None) -> ModelRunnerOutput:
        """Sample the step's next tokens, tell them to all ranks, and wait for them.

        Raises:
            EngineError: A rank has ended.
            ValueError: There is a mask for a request that does not sample, or that has drafts.
        """
        with self._blaming():
            return self._runner.finish(handle, masks)

    def shutdown(self) -> None:
        """End the other ranks, and free the KV cache and the weights."""
        self._close()
        self._runner.shutdown()

    def _send(self, message: ToRank) -> None:
        for other in self._others:
            other.send(message)

    @contextlib.contextmanager
    def _blaming(self) -> Iterator[None]:
        """Raise what ended a rank in place of the broken connection that came of it."""
        try:
            yield
        except (OSError, EOFError):
            raise_failure(self._others, wait_s=_BLAME_S)
            raise

    def _on_child_ended(self, *_: object) -> None:
        raise_failure(self._others)

    def _abort_when_one_ends(self) -> None:
        # gloo's connections break with the process; NCCL would wait, and Python sees no signal
        # while it does.
        sentinels = [os.pidfd_open(other.pid) for other in self._others]
        wait(sentinels)
        if any(other.ended for other in self._others):
            self._group.abort()
        for sentinel in sentinels:
            os.close(sentinel)


def rank_devices(device: str, tp_size: int) -> tuple[str, ...]:
    """Where each rank computes: all on the CPU, or rank r on cuda:r.

    Args:
        device: 'auto', 'cpu' or 'cuda'.
        tp_size: Ranks.

    Raises:
        ConfigError: There is no such device, or fewer GPUs than ranks.
    """
    import torch

    from llmserve.runtime.torch.runner import resolve_device

    if resolve_device(device).type == "cpu":
        return ("cpu",) * tp_size
    if ":" in device:
        raise ConfigError(
            f"device is {device!r}, but the engine has {tp_size} ranks (mapping.tp_size), and rank "
            "r takes cuda:r: say cuda; CUDA_VISIBLE_DEVICES chooses others"
        )
    if (count := torch.cuda.device_count()) < tp_size:
        raise ConfigError(
            f"the engine has {tp_size} ranks (mapping.tp_size), each on a GPU of its own, and "
            f"{count} are visible; set device to cpu, or convert again with --tp {count} or less"
        )
    return tuple(f"cuda:{rank}" for rank in range(tp_size))


def _of_one_host(rank: ModelInfo, other_weights_bytes: Sequence[int]) -> ModelInfo:
    """The model of a rank with all ranks' bytes; they have as much of the KV cache each."""
    groups = (
        replace(group, bytes_per_block=group.bytes_per_block * (1 + len(other_weights_bytes)))
        for group in rank.kv_groups
    )
    weights_bytes = rank.weights_bytes + sum(other_weights_bytes)
    return replace(
        rank,
        kv_groups=tuple(groups),
        weights_bytes=weights_bytes,
        workspace_bytes=rank.workspace_bytes * (1 + len(other_weights_bytes)),
    )
