"""Executes a plan: reads the source a few rows at a time and writes every rank's file on the way.

One target is one thread's work from end to end: rows are read into memory that stays in the cache,
checked, rounded, quantised, digested and written before the next ones are read, so that memory
does not grow with the model and nothing is read twice. Several threads take targets in parallel;
the thread that called writes down what is finished. It knows plans, formats and files, and nothing
of models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.engine_dir import rank_file
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.checkpoint.writer import StreamingWriter
from llmserve.convert.journal import Journal
from llmserve.convert.plan import Target
from llmserve.convert.record import ConversionRecord, FinishedTarget, file_digests
from llmserve.convert.target_conversion import Quantize, TargetConversion
from llmserve.errors import CheckpointError
from llmserve.quantization.layout import checkpoint_tensors, rank_tensors

# So many bytes of the source and their float32 copies stay in a core's share of the cache, and one
# operation on them takes long enough to pay for its call.
CHUNK_BYTES = 2**21
# A kill costs at most the work on so many bytes, and the tensors that are under way.
BATCH_BYTES = 2**28
# Their memory together stays far below 1 GiB, and no disk is faster.
_MAX_THREADS = 16
# Tensors as large as this are begun first: one alone at the end would leave all but one core idle.
_LARGE_BYTES = 2**28

logger = logging.getLogger(__name__)


def execute(
    plan: Sequence[Target],
    checkpoint: HuggingFaceCheckpoint,
    config: PretrainedConfig,
    staging: Path,
    *,
    identity: Mapping[str, Any],
    quantize: Quantize | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
    report: Report = no_report,
    chunk_bytes: int = CHUNK_BYTES,
) -> ConversionRecord:
    """Write the rank files of a checkpoint, going on where the same conversion was stopped.

    Args:
        plan: Of ``make_plan``.
        checkpoint: What it was made for.
        config: Of the result.
        staging: A directory that nobody else writes to.
        identity: Of ``conversion_identity``; what another conversion left in ``staging`` is
            overwritten.
        quantize: Quantises a whole weight in ``config.dtype``; for formats that need one whole.
            Returns the stored tensors by suffix.
        constants: Tensors of the result that no source has, whole, by name, e.g. scales of the KV
            cache.
        report: Told after every target.
        chunk_bytes: Of the source, to work on at once.

    Returns:
        Digests and errors.

    Raises:
        CheckpointError: The source cannot be read or a tensor is not finite, or not in
            ``config.dtype``.
        OSError: The file system refuses.
    """
    checkpoint.open_for_reading()
    specs = _specs(config)
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(staging, identity))
        writers = _open_writers(staging, specs, journal)
        for writer in writers:
            stack.enter_context(writer)
        conversion = TargetConversion(checkpoint, config, writers, quantize, chunk_bytes)
        result = conversion.write_constants(constants or {})
        _convert_all(conversion, plan, journal, writers, specs, report)
        source = {name: d for done in journal.finished.values() for name, d in done.source.items()}
        for reader in checkpoint.readers():
            left = [name for name in reader.names() if name not in source]
            source |= {name: conversion.digest(name) for name in left}
    for done in journal.finished.values():
        for rank, digests in enumerate(done.result):
            result[rank] |= digests
    errors = {target.name: journal.finished[target.name].quantization_error for target in plan}
    return ConversionRecord(
        source={
            reader.path.name: file_digests(reader.header, reader.names_in_order(), source)
            for reader in checkpoint.readers()
        },
        result={
            writer.path.name: file_digests(writer.header, writer.names_in_order(), digests)
            for writer, digests in zip(writers, result, strict=True)
        },
        quantization_error={name: e for name, e in errors.items() if e is not None},
    )


def written_bytes(config: PretrainedConfig) -> int:
    """Bytes of the tensors that ``execute`` writes, of all ranks together."""
    return _total_bytes(_specs(config))


def _specs(config: PretrainedConfig) -> list[dict[str, TensorSpec]]:
    """The tensors of each rank's file."""
    tensors = checkpoint_tensors(config)
    return [rank_tensors(config, tensors, rank) for rank in range(config.tp_size)]


def _total_bytes(specs: Sequence[Mapping[str, TensorSpec]]) -> int:
    return sum(spec.nbytes for rank in specs for spec in rank.values())


def _convert_all(
    conversion: TargetConversion,
    plan: Sequence[Target],
    journal: Journal,
    writers: Sequence[StreamingWriter],
    specs: Sequence[Mapping[str, TensorSpec]],
    report: Report,
) -> None:
    """Convert what is not finished, in parallel, and write down what is."""
    total = _total_bytes(specs)
    done = sum(_num_bytes(finished, specs) for finished in journal.finished.values())
    if journal.finished:
        logger.warning(
            "going on with %d of %d tensors, which are converted already",
            len(journal.finished),
            len(plan),
        )
        report("convert", done, total)
    todo = [target for target in plan if target.name not in journal.finished]
    todo.sort(key=lambda target: target.spec.nbytes < _LARGE_BYTES)
    num_threads = torch.get_num_threads()
    # One more than cores: while a thread waits for the disk, another computes.
    pool = ThreadPoolExecutor(
        min(num_threads + 1, _MAX_THREADS), "convert", torch.set_num_threads, (1,)
    )
    try:
        futures = [pool.submit(conversion.convert, target) for target in todo]
        batch: list[FinishedTarget] = []
        batch_bytes = 0
        for future in as_completed(futures):
            finished = future.result()
            batch.append(finished)
            num_bytes = _num_bytes(finished, specs)
            batch_bytes, done = batch_bytes + num_bytes, done + num_bytes
            if batch_bytes >= BATCH_BYTES:
                _write_down(batch, journal, writers)
                batch, batch_bytes = [], 0
            report("convert", done, total)
        _write_down(batch, journal, writers)
    finally:
        conversion.stopped = True
        pool.shutdown(cancel_futures=True)
        # The number that a thread sets for itself is that of every thread which starts later.
        torch.set_num_threads(num_threads)


def _write_down(
    batch: Sequence[FinishedTarget], journal: Journal, writers: Sequence[StreamingWriter]
) -> None:
    if batch:
        for writer in writers:
            writer.sync()
        journal.append(batch)


def _num_bytes(finished: FinishedTarget, specs: Sequence[Mapping[str, TensorSpec]]) -> int:
    """Bytes that were written for a target."""
    ranks = zip(finished.result, specs, strict=True)
    return sum(rank_specs[name].nbytes for names, rank_specs in ranks for name in names)


def _open_writers(
    staging: Path, specs: Sequence[Mapping[str, TensorSpec]], journal: Journal
) -> list[StreamingWriter]:
    """Open the ranks' files with what the journal says is in them, or begin them anew."""
    paths = [staging / rank_file(rank) for rank in range(len(specs))]
    if journal.finished:
        writers: list[StreamingWriter] = []
        try:
            for path, tensors in zip(paths, specs, strict=True):
                writers.append(StreamingWriter(path, tensors, resume=True))
            for finished in journal.last_batch():
                _check_kept(finished, writers)
        except CheckpointError as error:
            logger.warning("what an earlier conversion left is damaged, starting over: %s", error)
            for writer in writers:
                writer.close()
            journal.restart()
        else:
            for finished in journal.finished.values():
                for writer, names in zip(writers, finished.result, strict=True):
                    for name in names:
                        writer.keep(name)
            return writers
    for path in paths:
        path.unlink(missing_ok=True)
    return [StreamingWriter(path, tensors) for path, tensors in zip(paths, specs, strict=True)]


def _check_kept(finished: FinishedTarget, writers: Sequence[StreamingWriter]) -> None:
    """Check the bytes of a target that was written by an earlier process."""
    for writer, digests in zip(writers, finished.result, strict=True):
        for name, digest in digests.items():
            hasher = blake3()
            for part in writer.read(name, CHUNK_BYTES):
                hasher.update(part)
            if hasher.hexdigest() != digest:
                raise CheckpointError(f"{name} in {writer.path} is not what was written")
