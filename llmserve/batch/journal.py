"""The durable record of a job's finished answers: an append-only file beside the output.

Layout: one record a line, eight hex digits of CRC-32, a space, JSON, a line feed::

    8f2a01c7 {"journal": 1, "job": {"input": "sha256...", ...}}      the header: whose journal it is
    03be77d0 {"id": "batch_req_...", "custom_id": "a-1", ...}        an answer, as the output has it
    ...

An answer counts as finished once ``append`` has returned, after fdatasync. A record that a crash
has cut or damaged fails its checksum and counts as never written; since each record stands for
itself, no other one suffers. Plain appends and fdatasync hold on network file systems too, where a
database's shared memory does not.

One process at a time: the file is locked while it is open. This module knows records and jobs'
identities, neither engines nor the input's format.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmserve.batch.format import Answer, read_answer
from llmserve.errors import BatchJournalError

_VERSION = 1
_CRC_BYTES = 9  # eight hex digits and a space


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a finished answer lies in the journal.

    Attributes:
        offset: Of its JSON text, in bytes.
        num_bytes: Of the text, without the line's end.
        failed: Whether it goes to the error file.
    """

    offset: int
    num_bytes: int
    failed: bool


class Journal:
    """An open, locked journal. Use it as a context manager.

    Attributes:
        path: The file.
        job: The identity in its header; None while it is new.
        entries: Finished answers by custom_id.
        num_damaged: Records that a crash or the disk has damaged; they count as never written.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.job: dict[str, str] | None = None
        self.entries: dict[str, Entry] = {}
        self.num_damaged = 0
        self._fd = fd
        self._end = 0  # where the next record goes: behind the last whole one

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Lock and read the journal; a missing one is made, empty.

        Raises:
            BatchJournalError: Another run holds it, or the file is no journal or can't be opened.
        """
        journal = cls(path, _open_locked(path))
        try:
            journal._load()
        except BaseException:
            os.close(journal._fd)
            raise
        return journal

    @property
    def num_failed(self) -> int:
        """Finished answers that are failures."""
        return sum(entry.failed for entry in self.entries.values())

    def bind(self, job: Mapping[str, str]) -> None:
        """Make it this job's journal: write the header of a new one, compare an old one's.

        A journal without answers is as good as new: there is nothing in it to mix up.

        Args:
            job: What the answers depend on, each with a name for people.

        Raises:
            BatchJournalError: It is another job's; the message names what differs.
        """
        if self.job is None or (self.job != job and not self.entries):
            self._end = 0
            header = {"journal": _VERSION, "job": dict(job)}
            self._write(_record(json.dumps(header, ensure_ascii=False).encode()))
            sync_directory(self.path.parent)
            self.job = dict(job)
            return
        names = [name for name in {**self.job, **job} if self.job.get(name) != job.get(name)]
        if names:
            raise BatchJournalError(
                f"{self.path} holds {len(self.entries)} answers of another job: "
                f"{', '.join(names)} changed since. Finish that job as it was started, "
                "choose another output file, or delete the journal to begin anew"
            )

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers; they are durable when this returns.

        Raises:
            BatchJournalError: The disk is full or failing. Nothing that was durable is touched.
        """
        records = [_record(answer.line) for answer in answers]
        offset = self._end
        self._write(b"".join(records))
        for answer, record in zip(answers, records, strict=True):
            self.entries[answer.custom_id] = Entry(
                offset + _CRC_BYTES, len(answer.line), answer.failed
            )
            offset += len(record)

    def read(self, custom_id: str) -> bytes:
        """The finished answer to a request: a line of the output, without the line's end."""
        entry = self.entries[custom_id]
        return os.pread(self._fd, entry.num_bytes, entry.offset)

    def remove(self) -> None:
        """Delete the file: the job is complete, or was refused before it began."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file and free the lock."""
        os.close(self._fd)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _load(self) -> None:
        offset = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            for record in file:
                self._load_record(record, offset)
                offset += len(record)
        if self.job is None and offset:
            if b"\n" in os.pread(self._fd, offset, 0):
                raise BatchJournalError(
                    f"{self.path} is no journal of a batch job, or its first line is damaged; "
                    "move it away, or choose another output file"
                )
            self.num_damaged = 0  # not a record was lost: a crash cut the header itself

    def _load_record(self, record: bytes, offset: int) -> None:
        payload = _payload(record)
        if payload is None:
            self.num_damaged += 1
            return
        if self.job is None:
            header = json.loads(payload)
            if offset or not isinstance(header, dict) or header.get("journal") != _VERSION:
                return
            self.job = header["job"]
        else:
            custom_id, failed = read_answer(payload)
            self.entries.setdefault(custom_id, Entry(offset + _CRC_BYTES, len(payload), failed))
        self._end = offset + len(record)

    def _write(self, records: bytes) -> None:
        """Append, and be back at the last whole record if that fails."""
        try:
            # Whatever a crash or a full disk left behind the last whole record goes first.
            os.ftruncate(self._fd, self._end)
            written = 0
            while written < len(records):
                written += os.pwrite(self._fd, records[written:], self._end + written)
            os.fdatasync(self._fd)
        except OSError as error:
            raise BatchJournalError(
                f"cannot write to {self.path}: {error.strerror}. {len(self.entries)} answers are "
                "safe in it; make room and run the same command again to go on"
            ) from error
        self._end += len(records)


def sync_directory(path: Path) -> None:
    """Make a directory's entries durable: files made, renamed or removed in it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _record(payload: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(payload), payload)


def _payload(record: bytes) -> bytes | None:
    """A record's JSON text; None if the record is cut or damaged."""
    payload = record[_CRC_BYTES:-1]
    return payload if record == _record(payload) else None


def _open_locked(path: Path) -> int:
    """A descriptor of the file at ``path``, with its exclusive lock."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BatchJournalError(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A run that ended between the two calls has unlinked what we hold: begin again.
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError):
                raise BatchJournalError(
                    f"{path} is in use: another run of this job is going on"
                ) from error
            if isinstance(error, FileNotFoundError):
                continue
            raise BatchJournalError(f"cannot lock {path}: {error.strerror}") from error
        os.close(fd)
