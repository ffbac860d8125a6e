import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest

from llmserve.checkpoint.staging import Resumable, check_free, staged_directory
from llmserve.errors import CheckpointError


def _left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with staged_directory(target) as staging:
        (staging / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert _left(target.parent) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged_directory(tmp_path / "out") as staging:  # noqa: PT012
        (staging / "file").write_text("x")
        raise error
    assert _left(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "the disk is full"), (errno.EFBIG, "ulimit"), (errno.EROFS, "[Rr]ead-only")],
)
def test_what_the_file_system_refuses_is_one_sentence(
    tmp_path: Path, code: int, words: str
) -> None:
    with pytest.raises(CheckpointError, match=words), staged_directory(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert _left(tmp_path) == []


def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(CheckpointError, match="exists already"):  # noqa: SIM117
            with staged_directory(tmp_path / name):
                pytest.fail("the block ran")
    with staged_directory(tmp_path / "empty") as staging:
        (staging / "file").write_text("x")
    assert _left(tmp_path) == ["empty", "file", "full"]
    assert _left(tmp_path / "full") == ["precious"]


def test_a_full_disk_is_seen_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"1024\.0 MiB free and 2048\.0 MiB are needed"):  # noqa: SIM117
        with staged_directory(tmp_path / "out", required_bytes=2**31):
            pytest.fail("the block ran")
    assert _left(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_what_runs_is_not(tmp_path: Path) -> None:
    fill = textwrap.dedent("""
        import sys
        from pathlib import Path
        from llmserve.checkpoint.staging import Resumable, check_free, staged_directory
        with staged_directory(Path(sys.argv[1])) as staging:
            (staging / "half").write_text("x")
            print(staging.name, flush=True)
            sys.stdin.read()
    """)
    target = tmp_path / "o[u]t*"

    def start() -> tuple[subprocess.Popen[str], str]:
        process = subprocess.Popen(
            [sys.executable, "-c", fill, str(target)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        return process, process.stdout.readline().strip()

    killed, stale = start()
    running, kept = start()
    try:
        killed.kill()
        killed.wait()
        assert set(_left(tmp_path)) == {stale, kept}
        with pytest.raises(ValueError), staged_directory(target):  # noqa: PT012
            assert stale not in _left(tmp_path)
            assert kept in _left(tmp_path)
            raise ValueError
        assert _left(tmp_path) == [kept]
    finally:
        running.communicate()
        killed.communicate()
    assert _left(tmp_path) == [target.name]


def test_parents_that_were_made_for_it_go_again(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "a" / "b" / "out"
    with pytest.raises(ValueError), staged_directory(target):
        raise ValueError
    assert _left(tmp_path / "there") == []
    with staged_directory(target):
        pass
    assert _left(target.parent) == ["out"]


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with staged_directory(tmp_path / "link") as staging:
        (staging / "file").write_text("x")
    assert _left(tmp_path / "empty") == ["file"]
    with staged_directory(tmp_path / "nowhere" / ".." / "out"):
        pass
    assert _left(tmp_path) == ["empty", "link", "out"]


def test_what_cannot_be_replaced_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (Path(), tmp_path):
        with pytest.raises(CheckpointError, match="current directory and cannot be replaced"):
            check_free(target)
    mount = tmp_path / "volume"
    mount.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == mount)
    with pytest.raises(CheckpointError, match=r"volume is a mount point .* name a directory in it"):
        check_free(mount)
    check_free(mount / "name")


def test_a_read_only_place_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: int = 0o777) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    # The parent is there; it is the staging directory that cannot be made.
    monkeypatch.setattr(Path, "mkdir", lambda path, **kw: None if kw else refuse(path))
    with pytest.raises(CheckpointError, match="Read-only"):  # noqa: SIM117
        with staged_directory(tmp_path / "out", required_bytes=2**62):
            pytest.fail("the block ran")


def _resumable(can_go_on: bool) -> Resumable:
    return Resumable(journal="journal", can_go_on=lambda left: can_go_on)


@pytest.mark.parametrize("can_go_on", [False, True])
def test_what_was_interrupted_is_gone_on_with_if_it_can_be(tmp_path: Path, can_go_on: bool) -> None:
    target = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with staged_directory(target, resumable=_resumable(True)) as staging:
            (staging / "half").write_text("x")
            (staging / "journal").write_text("y")
            raise KeyboardInterrupt
    assert _left(target.parent) == [staging.name]
    with staged_directory(target, resumable=_resumable(can_go_on)) as again:
        assert (again == staging) == can_go_on
        assert _left(again) == (["half", "journal"] if can_go_on else [])
        assert _left(target.parent) == [again.name]
        (again / "whole").write_text("z")
    assert _left(target.parent) == ["out"]
    assert _left(target) == (["half", "whole"] if can_go_on else ["whole"])


def test_an_error_leaves_nothing_to_go_on_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError):  # noqa: PT012, SIM117
        with staged_directory(tmp_path / "out", resumable=_resumable(True)) as staging:
            (staging / "half").write_text("x")
            raise ValueError
    assert _left(tmp_path) == []


def test_what_is_written_already_needs_no_more_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012, SIM117
        with staged_directory(tmp_path / "out", resumable=_resumable(True)) as staging:
            (staging / "half").write_bytes(bytes(2**20))
            raise KeyboardInterrupt
    usage = namedtuple("usage", "total used free")(2**40, 2**40, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    required = 2**21
    with staged_directory(
        tmp_path / "out", required_bytes=required, resumable=_resumable(True)
    ) as again:
        assert _left(again) == ["half"]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(CheckpointError, match="are needed"):  # noqa: SIM117
        with staged_directory(tmp_path / "out", required_bytes=required):
            pytest.fail("the block ran")
