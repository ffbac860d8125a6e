"""The parent's handle on one engine process: start it, talk to it, see it die, stop it.

It knows operating-system processes and sockets, and nothing of requests or restarts: a process that
died is not started again, a new handle is.

Two ZeroMQ sockets join the two: the parent pushes to the one that the child binds, the child to the
one that the parent binds, so that neither side's first message has to wait for the other. Both
sockets lie in a private directory, which is removed as soon as both ends are connected: before the
model is loaded, so that a parent that is killed meanwhile leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from llmserve.config import EngineConfig
from llmserve.core.request import Request
from llmserve.core.stats import EngineStats
from llmserve.engine.engine import EngineInfo
from llmserve.engine.messages import (
    Failed,
    FromWorker,
    Hello,
    Ready,
    Start,
    Stop,
    Submit,
    ToWorker,
)
from llmserve.engine.runner_spec import RunnerSpec
from llmserve.errors import EngineDeadError, EngineError, InvalidRequestError
from llmserve.runtime.host import available_cores

# How long a process may take to end when it is asked to, in seconds: a step can't be interrupted.
_STOP_S = 2.0
# A process that fails by itself says why just before it ends; the message may come a little later.
_LAST_WORDS_S = 0.5


class WorkerProcess:
    """One process of the native engine. Made by ``start``; belongs to the loop that made it.

    Attributes:
        loop: That loop.
        info: What the engine in it is.
        stats: How it started out.
    """

    info: EngineInfo
    stats: EngineStats

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._directory: str | None = None
        self._context = zmq.Context()
        try:
            self._outbox = self._context.socket(zmq.PUSH)
            self._inbox = zmq.asyncio.Socket(self._context, zmq.PULL)
        except zmq.ZMQError:  # out of files, say
            self._context.destroy(linger=0)
            raise
        for socket in (self._outbox, self._inbox):
            socket.set(zmq.LINGER, 0)
            # What is under way is bounded by the scheduler's queue, not by the socket's.
            socket.set_hwm(0)
        self._outbox.set(zmq.RECONNECT_IVL, 10)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromWorker)
        self._submit_decoder = msgspec.msgpack.Decoder(Submit)
        self._process: asyncio.subprocess.Process | None = None

    @classmethod
    async def start(cls, runner: RunnerSpec, config: EngineConfig) -> WorkerProcess:
        """Start a process and wait until its engine is loaded and warm.

        Its standard error is this process's; nothing of it is left behind if this fails.

        Raises:
            LlmserveError: What the process said when it could not load.
            EngineDeadError: It ended without a word.
        """
        worker = cls()
        try:
            begun_s = time.monotonic()
            config = replace(config, threads=_threads(config.threads, runner))
            await worker._spawn(config.threads)
            worker.send(Start(runner=runner, config=config))
            ready = await worker._until_ready()
            worker.info = replace(ready.info, load_s=time.monotonic() - begun_s)
            worker.stats = ready.stats
        except BaseException:
            await worker.kill()
            raise
        return worker

    async def _spawn(self, threads: int | None) -> None:
        self._directory = tempfile.mkdtemp(prefix="llmserve-")
        requests = f"ipc://{self._directory}/requests"
        outputs = f"ipc://{self._directory}/outputs"
        try:
            self._inbox.bind(outputs)
            self._outbox.connect(requests)
        except zmq.ZMQError as error:
            raise EngineError(
                f"no socket can be made in {self._directory} ({error}); TMPDIR says where they go"
            ) from error
        self._process = await asyncio.create_subprocess_exec(
            # -P: the current directory is nowhere to import from, unless it is for the parent.
            *(sys.executable, "-P", "-m", "llmserve.engine.worker"),
            *(str(os.getpid()), requests, outputs),
            env=_environment(threads),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=2,  # this process's standard output belongs to its program
            # Ctrl-C reaches the parent alone, from the first instruction on.
            start_new_session=True,
        )

    async def _until_ready(self) -> Ready:
        ready = asyncio.ensure_future(self._receive_ready())
        ended = asyncio.ensure_future(self.wait())
        try:
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise EngineDeadError(f"the engine process {ended.result()} while it was loading")
            return ready.result()
        finally:
            ready.cancel()
            ended.cancel()

    async def _receive_ready(self) -> Ready:
        message = await self.receive()
        if isinstance(message, Hello):
            # Connections outlive the names.
            self._remove_directory()
            message = await self.receive()
        if isinstance(message, Failed):
            raise message.error.to_exception()
        assert isinstance(message, Ready)
        return message

    def pack(self, request: Request) -> bytes:
        """A request as the message that submits it, for ``send_packed``.

        Raises:
            InvalidRequestError: Something in it is of a wrong type or size. The process, which ends
                at a message that it cannot read, never sees it.
        """
        try:
            message: bytes = self._encoder.encode(Submit(request))
            self._submit_decoder.decode(message)
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
            raise InvalidRequestError(
                f"the request has a value of a wrong type or size: {error}"
            ) from error
        return message

    def send(self, message: ToWorker) -> None:
        """Queue a message; never blocks. One to a process that has died is lost."""
        self.send_packed(self._encoder.encode(message))

    def send_packed(self, message: bytes) -> None:
        """Queue a message of ``pack``; otherwise as ``send``."""
        if not self._outbox.closed:
            self._outbox.send(message, zmq.NOBLOCK)

    async def receive(self) -> FromWorker:
        """The next message. Waits for ever if the process has died."""
        message: FromWorker = self._decoder.decode(await self._inbox.recv())
        return message

    def compute_s(self) -> float:
        """CPU time, in seconds, that all of the process's threads but the main one have taken: the
        model's, for the main thread computes nothing. 0 where nothing tells it.
        """
        assert self._process is not None
        process = Path(f"/proc/{self._process.pid}")
        try:
            return _cpu_s(process) - _cpu_s(process / "task" / process.name)
        except OSError:
            return 0.0

    async def wait(self) -> str:
        """Wait for the process's end and say how it came, as in 'was killed by SIGKILL'."""
        assert self._process is not None
        code = await self._process.wait()
        if code < 0:
            names = {known.value: known.name for known in signal.Signals}
            return f"was killed by {names.get(-code, f'signal {-code}')}"
        await asyncio.sleep(_LAST_WORDS_S)
        return f"ended with exit code {code}"

    async def stop(self) -> None:
        """Ask the process to end, then ``kill`` it. Safe to call twice."""
        if self._process is not None and self._process.returncode is None:
            self.send(Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), _STOP_S)
        await self.kill()

    async def kill(self) -> None:
        """End the process at once and give back everything. Safe to call twice; whoever cancels
        it waits for the end all the same.
        """
        try:
            if self._process is not None:
                if self._process.returncode is None:
                    self._process.kill()
                ended = asyncio.ensure_future(self._process.wait())
                try:
                    await asyncio.shield(ended)
                except asyncio.CancelledError:
                    await ended
                    raise
        finally:
            self._inbox.close()
            self._outbox.close()
            self._context.term()
            self._remove_directory()

    def _remove_directory(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def _cpu_s(directory: Path) -> float:
    """User and system time of a process or a thread."""
    # The name before the other fields may hold anything.
    fields = (directory / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _threads(asked: int | None, runner: RunnerSpec) -> int:
    """Threads that compute: as asked, as OMP_NUM_THREADS says, or as many as the model is worth."""
    inherited = os.environ.get("OMP_NUM_THREADS", "")
    told = asked or (int(inherited) if inherited.isdigit() else 0)
    return told or runner.compute_threads(available_cores())


def _environment(threads: int | None) -> dict[str, str]:
    """The child's: it imports what its parent would, and OpenMP reads its threads at import."""
    # A thread that spins at a barrier keeps its core from the thread it waits for, and from the
    # parent: beside one busy process, libgomp's 300,000 turns made steps ten times slower. These
    # few bridge the gap between most operations of a step (docs/log.md).
    return {"GOMP_SPINCOUNT": "2000"} | dict(
        os.environ,
        PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path),
        OMP_NUM_THREADS=str(threads),
    )
