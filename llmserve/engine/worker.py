"""The program of the engine's process: ``python -m llmserve.engine.worker``, started by its parent.

One loop: take what the parent has sent, keep the model busy, send what a step brought. While the
model computes, in a thread of its own, the loop sleeps until a step has ended or the parent says
something; so what is submitted, aborted or refused is so at once, however long the step takes. The
process ends with its parent, whatever ends that, and leaves Ctrl-C and SIGTERM to it: a service
manager that signals every process must not cut off the requests which the parent lets end.
"""

from __future__ import annotations

import os
import sys
import time
import traceback

import msgspec
import zmq

from llmserve.core.request import Output, Request
from llmserve.engine.messages import (
    Abort,
    Failed,
    FromWorker,
    Hello,
    Progress,
    Ready,
    Refused,
    Start,
    Stop,
    Submit,
    ToWorker,
    WireError,
)
from llmserve.engine.native import EngineCore, calm_collector
from llmserve.errors import LlmserveError
from llmserve.runtime.child_process import live_with_parent

_STATS_INTERVAL_S = 0.1
_IDLE_S = 1.0
_BUSY_S = 0.1  # and so late may a timeout come while a long step runs


class ParentSocket:
    """Messages from and to the parent, and a bell that other threads can ring."""

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
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToWorker)

    def send(self, message: FromWorker) -> None:
        """Send a message; does not block."""
        self._outbox.send(self._encoder.encode(message))

    def receive(self) -> ToWorker | None:
        """The next message, or None if there is none."""
        try:
            message: ToWorker = self._decoder.decode(self._inbox.recv(zmq.NOBLOCK))
        except zmq.Again:
            return None
        return message

    def ring(self) -> None:
        """End a ``wait``, or the next one. From any thread."""
        os.eventfd_write(self._bell, 1)

    def wait(self, timeout_s: float) -> bool:
        """Wait for a message or the bell; return whether either came in time."""
        events = self._poller.poll(round(timeout_s * 1000))
        if any(source == self._bell for source, _ in events):
            os.eventfd_read(self._bell)
        # The kernel's parent-death signal comes first wherever there is one.
        elif not events and os.getppid() != self._parent_pid:
            sys.exit(1)
        return bool(events)

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
            self._core.launch()
            if self._core.step_is_under_way():
                self._serve()
            elif not self._parent.wait(_IDLE_S):
                self._use_pause()

    def _serve(self) -> None:
        self._parent.wait(_BUSY_S)
        outputs = self._core.expire_requests()
        if self._core.step_is_done():
            outputs += self._core.collect()
        self._report(outputs)

    def _take_messages(self) -> bool:
        """Take all that the parent has sent; return whether to go on."""
        while (message := self._parent.receive()) is not None:
            match message:
                case Submit(request):
                    self._submit(request)
                case Abort(request_id):
                    output = self._core.abort_request(request_id)
                    self._report([output] if output is not None else [])
                case Stop():
                    return False
                case Start():
                    raise AssertionError("a worker is started once")
        return True

    def _submit(self, request: Request) -> None:
        self._books_checked = False
        try:
            self._core.add_request(request)
        except LlmserveError as error:
            self._parent.send(Refused(request.request_id, WireError.of(error)))

    def _report(self, outputs: list[Output]) -> None:
        now_s = time.monotonic()
        was_last = bool(outputs) and not self._core.has_unfinished_requests()
        stats = None
        if was_last or now_s - self._stats_sent_s >= _STATS_INTERVAL_S:
            stats = self._core.stats()
            self._stats_sent_s = now_s
        if outputs or stats is not None:
            self._parent.send(Progress(outputs, stats))

    def _use_pause(self) -> None:
        # Both take longer than a short answer: nobody is to wait for them.
        if not self._books_checked:
            self._core.check_integrity()
            self._core.prepare()
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
        while (start := parent.receive()) is None:
            parent.wait(_IDLE_S)
        assert isinstance(start, Start)
        parent.send(Hello())
        runner, limits = start.runner.load(start.config)
        core = EngineCore(
            runner,
            limits,
            start.config,
            structured_output=start.runner.structured_output(),
            on_step_done=parent.ring,
        )
        calm_collector()
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
