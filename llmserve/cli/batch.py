"""``llmserve batch``: OpenAI batch files, answered offline and resumably."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.cli import COMMANDS, Subparsers
from llmserve.cli.engine_options import add_engine_options, default_model_name, engine_config
from llmserve.cli.progress import ProgressReport
from llmserve.config import check_at_least
from llmserve.errors import ConfigError

if TYPE_CHECKING:
    from llmserve.batch.job import BatchJob, BatchResult, OpenJob
    from llmserve.config import EngineConfig

_SOME_FAILED = 3
_INTERRUPTED = 130

_DESCRIPTION = """\
Answer every line of an OpenAI batch file exactly once, with an engine of its own: no server needed.

The output is written when all lines are done, in the order of the jobs file. Until then finished
answers are kept in OUTPUT.journal. However a run ends, by Ctrl-C, kill -9, a crash or a full disk:
the same command goes on where it stopped, and no finished line is computed again. Lines without a
seed get one derived from their custom_id, so that a resumed job answers as an undisturbed one.
"""
_EPILOG = """\
exit codes:
  0    every line has its answer
  1    the job could not be run or not be finished; standard error says what to do
  2    wrong usage of the command line
  3    the job is done, and some lines failed: they are in the error file
  130  interrupted; the same command goes on
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add ``batch run JOBS -o OUTPUT --model MODEL``."""
    batch = subparsers.add_parser("batch", help=COMMANDS["batch"])
    actions = batch.add_subparsers(dest="action", required=True, metavar="ACTION")
    run_parser = actions.add_parser(
        "run",
        help="run a batch file, or the rest of it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run_parser.add_argument("jobs", type=Path, help="the batch file: one JSON request a line")
    run_parser.add_argument(
        "-o", "--output", type=Path, required=True, help="where the answers go; must not exist"
    )
    run_parser.add_argument(
        "--error-file",
        type=Path,
        help="where failed lines go, if there are any (default: OUTPUT with .errors.jsonl)",
    )
    run_parser.add_argument(
        "--model",
        required=True,
        help="directory of an engine or a checkpoint, or a Hub id with or without @revision",
    )
    run_parser.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="most lines in flight (default: the engine's max_batch_size, at most 256)",
    )
    run_parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what the requests have as model (default: the directory's name)",
    )
    add_engine_options(run_parser)


def run(args: argparse.Namespace) -> int:
    """Run the job. Returns one of the exit codes in the help."""
    from llmserve.artifacts import ensure_engine
    from llmserve.batch.fingerprint import model_fingerprint
    from llmserve.batch.job import BatchJob, open_job

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    check_at_least("--concurrency", args.concurrency, 1)
    config = engine_config(args)
    directory = _locate(args.model)
    output: Path = args.output
    if not output.name:
        raise ConfigError(f"--output is {str(output)!r}; it must name a file")
    name = args.served_model_name or default_model_name(args.model)
    job = BatchJob(
        input_path=args.jobs,
        output_path=output,
        error_path=args.error_file or output.with_name(f"{output.stem}.errors.jsonl"),
        served_model_name=name,
        settings={
            "the model": model_fingerprint(directory),
            "--served-model-name": name,
            "--dtype": args.dtype,
            "--quant": args.quant or "none",
            "--kv-cache-dtype": args.kv_cache_dtype or "auto",
            "--tp": str(args.tp or 1),
            "--max-seq-len": str(args.max_seq_len),
            "--deterministic": str(args.deterministic),
        },
        concurrency=args.concurrency,
    )
    with open_job(job) as opened:
        if opened.num_open:
            # Not in the event loop: conversion takes minutes, and there Ctrl-C could not end it.
            with ProgressReport() as report:
                engine_dir = ensure_engine(
                    directory,
                    dtype=args.dtype,
                    quant=args.quant,
                    kv_cache_dtype=args.kv_cache_dtype,
                    tp_size=args.tp,
                    report=report,
                )
            if not asyncio.run(_answer_until_signal(opened, engine_dir, config)):
                print(
                    f"llmserve: interrupted; finished answers are in {job.journal_path}, "
                    "the same command goes on",
                    file=sys.stderr,
                )
                return _INTERRUPTED
        return _report(job, opened.finish())


def _locate(model: str) -> Path:
    """The model's directory, downloaded if it is a Hub id."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    # Imported here: what is on disk needs neither the Hub nor torch in this process.
    from llmserve.convert.hub import locate

    return locate(model)


async def _answer_until_signal(opened: OpenJob, engine_dir: Path, config: EngineConfig) -> bool:
    """Answer what is open; False if SIGINT or SIGTERM came first."""
    answering = asyncio.ensure_future(_answer(opened, engine_dir, config))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, answering.cancel)
    try:
        await answering
    except asyncio.CancelledError:
        return False
    return True


async def _answer(opened: OpenJob, engine_dir: Path, config: EngineConfig) -> None:
    from llmserve.batch.responder import open_engine_responder

    name = opened.job.served_model_name
    async with open_engine_responder(engine_dir, name, engine_config=config) as responder:
        await opened.answer(responder)


def _report(job: BatchJob, result: BatchResult) -> int:
    if result.already_complete:
        print(
            f"{job.output_path} answers every line of {job.input_path} already; "
            "to run the job anew, move it away"
        )
    if result.failed:
        print(
            f"{result.total - result.failed} of {result.total} answers are in {job.output_path}, "
            f"{result.failed} failed lines in {job.error_path}"
        )
        return _SOME_FAILED
    print(f"{result.total} of {result.total} answers are in {job.output_path}")
    return 0
