"""One batch job from the jobs file to the result files: the order in which the parts come in."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llmserve.batch import results
from llmserve.batch.format import BatchInput
from llmserve.batch.journal import Journal
from llmserve.batch.progress import BatchProgress
from llmserve.batch.runner import Responder, Runner
from llmserve.errors import BatchError

logger = logging.getLogger(__name__)

# Default concurrency is the engine's batch size up to here: more only lengthens the engine's queue.
_MAX_DEFAULT_CONCURRENCY = 256


OpenResponder = Callable[[], contextlib.AbstractAsyncContextManager[Responder]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """What to run, and where the answers go.

    Attributes:
        input_path: The jobs file.
        output_path: Answers in the order of the jobs file, all of status 200.
        error_path: Failed lines; made only if there are any.
        served_model_name: What the bodies' ``model`` must be.
        settings: What else the answers depend on (model, dtype, ...), each with a name for people:
            a job can only be resumed with the same.
        concurrency: Most lines in flight; None takes the engine's batch size, at most 256.
        retry_pause_s: First pause after a fault of the engine.
        engine_timeout_s: How long a dead engine may take to come back.
    """

    input_path: Path
    output_path: Path
    error_path: Path
    served_model_name: str
    settings: Mapping[str, str] = field(default_factory=dict)
    concurrency: int | None = None
    retry_pause_s: float = 1.0
    engine_timeout_s: float = 600.0

    @property
    def journal_path(self) -> Path:
        """The journal, beside the output: it exists from the job's beginning to its end."""
        return self.output_path.with_name(self.output_path.name + ".journal")


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A complete job.

    Attributes:
        total: Its lines.
        failed: How many of them are in the error file.
        already_complete: An earlier run had done everything.
    """

    total: int
    failed: int
    already_complete: bool = False


class OpenJob:
    """A job whose input is checked and whose journal is held. Made by ``open_job``.

    Attributes:
        job: The job.
    """

    def __init__(
        self, job: BatchJob, jobs: BatchInput, journal: Journal, complete: BatchResult | None
    ) -> None:
        self.job = job
        self._jobs = jobs
        self._journal = journal
        self._complete = complete

    @property
    def num_open(self) -> int:
        """Lines that still need an answer."""
        return 0 if self._complete else len(self._jobs.lines) - len(self._journal.entries)

    async def answer(self, responder: Responder) -> None:
        """Answer the open lines.

        Cancel it to stop: lines in flight are given up, finished ones stay in the journal.

        Raises:
            BatchError: The journal can't be written, or the input changed meanwhile.
            EngineDeadError: The engine died and did not come back.
        """
        job, journal, total = self.job, self._journal, len(self._jobs.lines)
        with BatchProgress(total, len(journal.entries), journal.num_failed) as progress:
            runner = Runner(
                self._jobs,
                journal,
                responder,
                progress,
                concurrency=job.concurrency
                or min(responder.max_batch_size, _MAX_DEFAULT_CONCURRENCY),
                retry_pause_s=job.retry_pause_s,
                engine_timeout_s=job.engine_timeout_s,
            )
            await runner.run()

    def finish(self) -> BatchResult:
        """Write the result files of a job without open lines, and remove its journal.

        Raises:
            BatchError: A file can't be written; nothing is lost.
        """
        if self._complete:
            return self._complete
        lines, journal = self._jobs.lines, self._journal
        results.write_results(journal, lines, self.job.output_path, self.job.error_path)
        journal.remove()
        return BatchResult(len(lines), journal.num_failed)


@contextlib.contextmanager
def open_job(job: BatchJob) -> Iterator[OpenJob]:
    """Check a job's input, lock and read its journal, see that nothing is in its way.

    Raises:
        BatchError: The input is at fault, the journal is another job's or in use, or an output
            file is there that isn't this job's result.
    """
    _check_paths(job)
    with (
        BatchInput.open(job.input_path, served_model_name=job.served_model_name) as jobs,
        Journal.open(job.journal_path) as journal,
    ):
        if journal.num_damaged:
            logger.warning(
                "%d answers in %s were cut off or damaged; they are computed again",
                journal.num_damaged,
                journal.path,
            )
        complete = _begin(job, jobs, journal) if journal.job is None else None
        if complete is None:
            journal.bind({**job.settings, "the jobs file": jobs.sha256})
        yield OpenJob(job, jobs, journal, complete)


async def run_job(job: BatchJob, open_responder: OpenResponder) -> BatchResult:
    """Run a job, or the rest of one, to its end.

    Args:
        job: The job.
        open_responder: Starts the engine; called only if there are lines to answer.

    Raises:
        BatchError: As ``open_job``, ``OpenJob.answer`` and ``OpenJob.finish`` say.
        EngineError: The engine can't be started or did not come back.
    """
    with open_job(job) as opened:
        if opened.num_open:
            async with open_responder() as responder:
                await opened.answer(responder)
        return opened.finish()


def _begin(job: BatchJob, jobs: BatchInput, journal: Journal) -> BatchResult | None:
    """See that nothing is in a new job's way; the result if an earlier run had done it all."""
    try:
        failed = results.check_absent(jobs.lines, job.output_path, job.error_path)
    except BatchError:
        journal.remove()
        raise
    if failed is None:
        return None
    journal.remove()
    return BatchResult(len(jobs.lines), failed, already_complete=True)


def _check_paths(job: BatchJob) -> None:
    paths = [job.input_path, job.output_path, job.error_path, job.journal_path]
    if len({path.resolve() for path in paths}) < len(paths):
        raise BatchError(
            f"jobs file {job.input_path}, output {job.output_path}, error file {job.error_path} "
            f"and journal {job.journal_path} must be four different files"
        )
    for path in (job.output_path, job.error_path):
        if not path.resolve().parent.is_dir():
            raise BatchError(f"cannot write {path}: there is no directory {path.parent}")
        if path.is_dir():
            raise BatchError(f"cannot write {path}: it is a directory")
