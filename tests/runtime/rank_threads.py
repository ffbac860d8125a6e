"""All ranks of a tensor-parallel engine as threads of one process.

Tests of the ranks' arithmetic need no processes: these start at once, and can be looked into.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from llmserve.checkpoint.engine_dir import read_engine
from llmserve.core.step import ModelRunnerOutput, SchedulerOutput
from llmserve.runtime.model_runner import TokenMasks
from llmserve.runtime.torch.runner import TorchRunner
from tests.runtime.torch_engines import MAX_SEQ_LEN

_Result = TypeVar("_Result")


class _Meeting:
    """Where the threads exchange tensors."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.brought: list[torch.Tensor] = [torch.empty(0)] * size


class ThreadGroup:
    """A ``RankGroup`` of threads."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self._rank, self._meeting = rank, meeting

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._exchange(x, lambda all_: torch.stack(all_).sum(0)))

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        return self._exchange(x, partial(torch.cat, dim=-1))

    def broadcast_(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._exchange(x, lambda all_: all_[0].clone()))

    def _exchange(
        self, x: torch.Tensor, combine: Callable[[list[torch.Tensor]], torch.Tensor]
    ) -> torch.Tensor:
        self._meeting.brought[self._rank] = x
        self._meeting.barrier.wait()
        assert len({(part.shape, part.dtype) for part in self._meeting.brought}) == 1
        result = combine(self._meeting.brought)
        self._meeting.barrier.wait()
        return result


class RankThreads:
    """A ModelRunner over the ranks of an engine, with a KV cache whose every value is NaN."""

    def __init__(self, engine: Path, *, num_blocks: int = 64, tokens_per_block: int = 8) -> None:
        size = read_engine(engine)[0].tp_size
        self._meeting = _Meeting(size)
        self._tokens_per_block = tokens_per_block
        self.ranks = [
            TorchRunner(
                engine,
                max_batch_size=16,
                max_num_tokens=512,
                max_seq_len=MAX_SEQ_LEN,
                tokens_per_block=tokens_per_block,
                device="cpu",
                rank=rank,
                group=ThreadGroup(rank, self._meeting),
            )
            for rank in range(size)
        ]
        for runner in self.ranks:
            runner.allocate_kv_cache((num_blocks,) * len(runner.info.kv_groups))
            for cache in runner._kv_cache:
                cache.fill_(float("nan") if cache.is_floating_point() else 127)
        self.info = self.ranks[0].info

    def each(self, act: Callable[..., _Result], *arguments: list[Any]) -> list[_Result]:
        """Do something on every rank at a time: the results in order."""
        with ThreadPoolExecutor(len(self.ranks)) as pool:
            futures = [pool.submit(act, *each) for each in zip(self.ranks, *arguments, strict=True)]
            for future in futures:
                # One that fails must not leave the others waiting for it.
                future.add_done_callback(lambda f: f.exception() and self._meeting.barrier.abort())
        return [future.result() for future in futures]

    def launch(self, step: SchedulerOutput) -> list[Any]:
        return self.each(lambda runner: runner.launch(step))

    def finish(self, handles: list[Any], masks: TokenMasks | None = None) -> ModelRunnerOutput:
        others_have_none = [None] * (len(self.ranks) - 1)
        first, *others = self.each(TorchRunner.finish, handles, [masks, *others_have_none])
        assert all(other == ModelRunnerOutput() for other in others)
        return first
