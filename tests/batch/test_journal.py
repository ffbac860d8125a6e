from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.batch.format import Answer, Response
from llmserve.batch.journal import Journal
from llmserve.errors import BatchJournalError

JOB = {"the jobs file": "abc", "the model": "def"}


def make_answer(custom_id: str, status: int = 200) -> Answer:
    return Answer.from_response(custom_id, f"r{custom_id}", Response(status, {"text": "né" * 5}))


def write_journal(path: Path, answers: Sequence[Answer]) -> list[int]:
    """A journal with these answers; returns its size after the header and after each of them."""
    with Journal.open(path) as journal:
        journal.bind(JOB)
        sizes = [path.stat().st_size]
        for answer in answers:
            journal.append([answer])
            sizes.append(path.stat().st_size)
    return sizes


def test_what_is_appended_is_there_when_opened_again(tmp_path: Path) -> None:
    answers = [make_answer("a"), make_answer("ü", 400), make_answer("c")]
    with Journal.open(tmp_path / "j") as journal:
        assert journal.job is None
        journal.bind(JOB)
        journal.append(answers[:2])
        journal.append(answers[2:])
        assert [journal.read(a.custom_id) for a in answers] == [a.line for a in answers]
    with Journal.open(tmp_path / "j") as journal:
        journal.bind(JOB)
        assert list(journal.entries) == ["a", "ü", "c"]
        assert journal.num_failed == 1
        assert journal.num_damaged == 0
        assert [journal.read(a.custom_id) for a in answers] == [a.line for a in answers]


def test_a_tail_torn_at_any_byte_loses_that_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "j"
    answers = [make_answer("a"), make_answer("b")]
    sizes = write_journal(path, answers)
    content = path.read_bytes()
    edges = {size + by for size in sizes for by in (-1, 0, 1)}
    for length in sorted({*range(0, len(content), 7), *edges} - {len(content) + 1}):
        path.write_bytes(content[:length])
        whole = sum(length >= size for size in sizes[1:])
        with Journal.open(path) as journal:
            journal.bind(JOB)
            assert list(journal.entries) == ["a", "b"][:whole]
            journal.append(answers[whole:])
        assert path.read_bytes() == content


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_damage_anywhere_loses_at_most_the_records_it_hits(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    names = ["a", "b", "c", "d"]
    sizes = write_journal(path, [make_answer(name) for name in names])
    content = bytearray(path.read_bytes())
    start = data.draw(st.integers(sizes[0], len(content) - 1))
    end = min(len(content), start + data.draw(st.integers(1, 300)))
    garbage = data.draw(st.binary(min_size=end - start, max_size=end - start))
    content[start:end] = garbage
    path.write_bytes(content)
    # A record suffers if any byte of it, or the line feed before it, is overwritten.
    untouched = [
        name
        for name, begin, stop in zip(names, sizes, sizes[1:], strict=False)
        if end < begin or start >= stop
    ]
    with Journal.open(path) as journal:
        journal.bind(JOB)
        assert set(untouched) <= set(journal.entries)
        lost = [name for name in names if name not in journal.entries]
        if lost:
            journal.append([make_answer(name) for name in lost])
        for name in names:
            assert journal.read(name) == make_answer(name).line
    with Journal.open(path) as journal:
        assert set(journal.entries) == set(names)


def test_another_jobs_journal_is_refused_naming_what_changed(tmp_path: Path) -> None:
    write_journal(tmp_path / "j", [make_answer("a")])
    with (
        Journal.open(tmp_path / "j") as journal,
        pytest.raises(BatchJournalError, match="holds 1 answers of another job: the model changed"),
    ):
        journal.bind({**JOB, "the model": "xyz"})


def test_a_journal_without_answers_may_become_any_jobs(tmp_path: Path) -> None:
    write_journal(tmp_path / "j", [])
    other = {"the jobs file": "x", "the model": "y"}
    with Journal.open(tmp_path / "j") as journal:
        journal.bind(other)
        journal.append([make_answer("a")])
    with Journal.open(tmp_path / "j") as journal:
        assert journal.job == other
        journal.bind(other)
        assert journal.read("a") == make_answer("a").line


@pytest.mark.parametrize(
    "content", [b"hello\nworld\n", b"12345678 {}\n", b'{"a": 1}\n', b"\n", b"0" * 8 + b" x\nrest"]
)
def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(BatchJournalError, match="is no journal"):
        Journal.open(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == content


def test_a_journal_of_another_version_is_refused(tmp_path: Path) -> None:
    write_journal(tmp_path / "j", [make_answer("a")])
    with Journal.open(tmp_path / "other") as journal:
        header = b'{"journal": 99, "job": {}}'
        journal._write(b"%08x %s\n" % (zlib.crc32(header), header))
    with pytest.raises(BatchJournalError, match="is no journal"):
        Journal.open(tmp_path / "other")


def test_two_at_once_are_refused_and_the_lock_ends_with_the_first(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j"), pytest.raises(BatchJournalError, match="another run"):
        Journal.open(tmp_path / "j")
    Journal.open(tmp_path / "j").close()


def test_a_journal_removed_while_another_run_waited_at_its_door(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and lock the first run ends: its unlinked file must not be taken for ours."""
    import fcntl

    path = tmp_path / "j"
    real_flock = fcntl.flock
    calls = []

    def flock(fd: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(fd)
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Journal.open(path) as journal:
        journal.bind(JOB)
        journal.append([make_answer("a")])
    assert len(calls) == 2
    with Journal.open(path) as journal:
        assert list(journal.entries) == ["a"]


def test_a_full_disk_leaves_what_was_durable_and_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pwrite, room = os.pwrite, [300]  # one record and a half

    def full_disk(fd: int, content: bytes, offset: int) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real_pwrite(fd, content[: room[0]], offset)
        room[0] -= written
        return written

    path = tmp_path / "j"
    write_journal(path, [make_answer("a")])
    with Journal.open(path) as journal:
        journal.bind(JOB)
        monkeypatch.setattr(os, "pwrite", full_disk)
        with pytest.raises(BatchJournalError) as caught:
            journal.append([make_answer("b"), make_answer("c")])
        assert "No space left on device. 1 answers are safe" in str(caught.value)
        assert "\n" not in str(caught.value)
        monkeypatch.undo()
        assert list(journal.entries) == ["a"]
        journal.append([make_answer("d", 400)])
    with Journal.open(path) as journal:
        assert list(journal.entries) == ["a", "d"]
        assert journal.num_damaged == 0
        assert journal.read("d") == make_answer("d", 400).line
