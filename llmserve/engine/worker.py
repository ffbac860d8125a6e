"""The program of the engine's process: ``python -m llmserve.engine.worker``, started by its parent.

One thread, one loop: take what the parent has sent, run a step, send what it brought. Between
steps the socket is only looked at; while there is nothing to do the process sleeps on it. It ends
with its parent, whatever ends that, and leaves Ctrl-C and SIGTERM to it: a service manager that
signals every process must not cut off the requests which the parent lets end.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

import msgspec
import zmq

from llmserve.core.request import Output
from llmserve.engine.messages import (
    Abort,
    Failed,
    FromWorker,
    Progress,
    Ready,
    Refused,
    Start,
    Stop,
    Submit,
    ToWorker,
    WireError,
)
from llmserve.engine.native import EngineCore
from llmserve.errors import LlmserveError
from llmserve.runtime.child_process import live_with_parent

_STATS_INTERVAL_S = 0.1
_IDLE_MS = 1000


class ParentSocket:
    """Messages from and to the parent."""

    def __init__(self, parent_pid: int, requests: str, outputs: str) -> None:
        self._parent_pid = parent_pid
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._outbox = self._context.socket(zmq.PUSH)
        for socket in (self._inbox, self._outbox):
            socket.set_hwm(0)
            socket.set(zmq.LINGER, 0)
        self._inbox.bind(requests)
        self._outbox.connect(outputs)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToWorker)

    def send(self, message: FromWorker) -> None:
        """Send a message; does not block."""
        self._outbox.send(self._encoder.encode(message))

    def receive(self, *, wait: bool) -> ToWorker | None:
        """The next message; None if there is none, in a second's time if the caller waits."""
        if not self._inbox.poll(_IDLE_MS if wait else 0):
            # The kernel's parent-death signal comes first wherever there is one.
            if os.getppid() != self._parent_pid:
                sys.exit(1)
            return None
        message: ToWorker = self._decoder.decode(self._inbox.recv())
        return message

    def close(self) -> None:
        """Close, once what was sent has left (or the parent is gone)."""
        self._outbox.close(linger=1000)
        self._inbox.close()
        self._context.term()


class Worker:
    """Drives an engine core on behalf of the parent."""

    def __init__(self, core: EngineCore, parent: ParentSocket) -> None:
        self._core = core
        self._parent = parent
        self._stats_sent_s = 0.0
        self._books_checked = False  # since a request last ran

    def run(self) -> None:
        """Serve until the parent says stop. What a step raises comes out of here."""
        while self._take_messages():
            self._report(self._core.step())

    def _take_messages(self) -> bool:
        """Take all that the parent has sent; wait for some while there is nothing to compute."""
        while True:
            idle = not self._core.has_unfinished_requests()
            message = self._parent.receive(wait=idle)
            match message:
                case None if idle:
                    self._check_books()
                case None:
                    return True
                case Stop():
                    return False
                case Submit(request):
                    try:
                        self._core.add_request(request)
                    except LlmserveError as error:
                        self._parent.send(Refused(request.request_id, WireError.of(error)))
                case Abort(request_id):
                    output = self._core.abort_request(request_id)
                    self._report([output] if output is not None else [])
                case _:
                    raise AssertionError(f"{type(message).__name__} is not for a running worker")

    def _report(self, outputs: list[Output]) -> None:
        idle = not self._core.has_unfinished_requests()
        self._books_checked = False
        now_s = time.monotonic()
        stats = None
        if idle or now_s - self._stats_sent_s >= _STATS_INTERVAL_S:
            stats = self._core.stats()
            self._stats_sent_s = now_s
        if outputs or stats is not None:
            self._parent.send(Progress(outputs, stats))

    def _check_books(self) -> None:
        # It looks at every block, which takes longer than a short answer: nobody is to wait for it.
        if not self._books_checked:
            self._core.check_integrity()
            self._books_checked = True


def main(parent_pid: int, requests: str, outputs: str) -> int:
    """Run the process: load as the first message says, then serve.

    Args:
        parent_pid: Whose child this is; if it no longer is, it ends at once.
        requests: Endpoint to bind, for what the parent sends.
        outputs: Endpoint to connect to, for what it is told.

    Returns:
        The exit status: 0 if the parent asked for the end, 1 after a failure.
    """
    live_with_parent(parent_pid)
    parent = ParentSocket(parent_pid, requests, outputs)
    try:
        while (start := parent.receive(wait=True)) is None:
            pass
        assert isinstance(start, Start)
        runner, limits = start.runner.load(start.config)
        core = EngineCore(runner, limits, start.config)
        parent.send(Ready(core.info, core.stats()))
        Worker(core, parent).run()
        core.shutdown()
    except Exception as error:
        # A sentence suffices for what was raised on purpose; anything else needs its traceback.
        if not isinstance(error, LlmserveError):
            traceback.print_exc()
        parent.send(Failed(WireError.of(error)))
        return 1
    finally:
        parent.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
