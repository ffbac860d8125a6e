"""The output file and the error file: written whole, in input order, or not at all.

Both are made beside their place and renamed into it. They are copied from the journal, so a run
that is killed here does it again and gets the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llmserve.batch.format import InputLine, read_answer
from llmserve.batch.journal import Journal, sync_directory
from llmserve.errors import BatchError


def write_results(
    journal: Journal, lines: Sequence[InputLine], output_path: Path, error_path: Path
) -> None:
    """Write the answers of a complete journal, the failed ones to ``error_path``.

    The output file is always made, the error file only if something failed.

    Raises:
        BatchError: A file can't be written; neither is there then, and the journal is whole.
    """
    good = [line.custom_id for line in lines if not journal.entries[line.custom_id].failed]
    failed = [line.custom_id for line in lines if journal.entries[line.custom_id].failed]
    parts = [(output_path, good)]
    if failed:
        # First: as soon as the output is in its place, everything is.
        parts.insert(0, (error_path, failed))
    try:
        for path, custom_ids in parts:
            _write_beside(path, journal, custom_ids)
        for path, _ in parts:
            os.replace(_beside(path), path)
            sync_directory(path.parent)
    except OSError as error:
        for path, _ in parts:
            _beside(path).unlink(missing_ok=True)
        raise BatchError(
            f"cannot write {path}: {error.strerror}. All {len(lines)} answers are safe in "
            f"{journal.path}; make room and run the same command again to finish"
        ) from error


def check_absent(lines: Sequence[InputLine], output_path: Path, error_path: Path) -> int | None:
    """Before a new job begins: see that no earlier result stands in its way.

    Returns:
        None if the job may begin; if the files there answer every line already, the number of
        failed ones among the answers: there is nothing to do.

    Raises:
        BatchError: A file is there that isn't this job's whole result.
    """
    there = [path for path in (output_path, error_path) if path.exists()]
    if not there:
        return None
    answers: list[tuple[str, bool]] = []
    try:
        for path in there:
            with path.open("rb") as file:
                answers += [read_answer(line) for line in file]
    except (OSError, ValueError):
        answers.clear()
    custom_ids = sorted(custom_id for custom_id, _ in answers)
    if output_path in there and custom_ids == sorted(line.custom_id for line in lines):
        return sum(failed for _, failed in answers)
    raise BatchError(
        f"{' and '.join(map(str, there))} exists and is not the result of this job; "
        "move it away, or choose another output file"
    )


def _write_beside(path: Path, journal: Journal, custom_ids: Sequence[str]) -> None:
    with _beside(path).open("wb") as file:
        for custom_id in custom_ids:
            file.write(journal.read(custom_id) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")
