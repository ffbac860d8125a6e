"""Rank 0's handles on the processes of the other ranks: start them, talk to them, see them die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TypeVar

from llmserve.errors import EngineError, LlmserveError
from llmserve.runtime.torch.rank_messages import Failed, FromRank, ToRank, receive_from_rank, send
from llmserve.runtime.torch.rank_process import PEER_LOST

_Answer = TypeVar("_Answer", bound=FromRank)


class RankHandle:
    """One process, started by the one that makes this. Its standard output is our standard error.

    Args:
        rank: Which, from 1.
        size: Ranks in all.
        threads: CPU threads of its products.
    """

    def __init__(self, rank: int, size: int, threads: int) -> None:
        self._name = f"rank {rank} of {size}"
        self._killed = False
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            fd = theirs.fileno()
            arguments = (os.getpid(), fd, rank)
            self._process = subprocess.Popen(
                # -P: the current directory is nowhere to import from, unless it is for the parent.
                [sys.executable, "-P", "-m", "llmserve.runtime.torch.rank_process"]
                + [str(argument) for argument in arguments],
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                stdout=2,
                # OpenMP reads its threads when it is imported.
                env=dict(os.environ, OMP_NUM_THREADS=str(threads)),
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the process has ended by itself."""
        return self._process.poll() is not None and not self._killed

    @property
    def to_blame(self) -> bool:
        """Whether it has, and not only because it lost another rank."""
        return self.ended and self._process.returncode != PEER_LOST

    def send(self, message: ToRank) -> None:
        """Send a message.

        Raises:
            OSError: The process is gone.
        """
        send(self._connection, message)

    def receive(self, kind: type[_Answer]) -> _Answer:
        """Wait for an answer.

        Raises:
            LlmserveError: What the rank says instead.
            EOFError: It ended without a word.
            ConnectionError: Likewise.
        """
        message = receive_from_rank(self._connection)
        if isinstance(message, Failed):
            raise message.to_exception(self._name)
        assert isinstance(message, kind)
        return message

    def failure(self) -> LlmserveError:
        """Why the process, which has ended, did so: what it said, else what it was ended by."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = receive_from_rank(self._connection)
                if isinstance(message, Failed):
                    return message.to_exception(self._name)
        code = self._process.returncode
        if code >= 0:
            return EngineError(f"{self._name} ended with exit code {code}")
        names = {known.value: known.name for known in signal.Signals}
        return EngineError(f"{self._name} was killed by {names.get(-code, f'signal {-code}')}")

    def kill(self) -> None:
        """End the process at once, which holds nothing that outlives it. Safe to call twice."""
        self._killed = True
        self._process.kill()
        self._process.wait()
        self._connection.close()


def raise_failure(ranks: Sequence[RankHandle], *, wait_s: float = 0.0) -> None:
    """Raise what ended a rank, if one has ended.

    Args:
        ranks: All but this process's own.
        wait_s: How long to wait for an end that shows already, in a broken connection.

    Raises:
        LlmserveError: The sentence names the rank.
    """
    limit_s = time.monotonic() + wait_s
    while True:
        for rank in ranks:
            if rank.to_blame:
                raise rank.failure()
        if time.monotonic() >= limit_s:
            break
        time.sleep(0.01)
    for rank in ranks if wait_s else ():
        if rank.ended:
            raise rank.failure()
