"""Directories that appear whole or not at all.

A directory is filled beside its place, as ``.NAME.tmp-RANDOM``, and renamed into it at the end.
Whoever fills one holds a lock on it, so that what a killed process left is told from what another
is filling, and removed, or gone on with.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmserve.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumable:
    """How filling a directory is gone on with after its process was killed or interrupted.

    Attributes:
        journal: Name of the file in it that says how far it is; the finished one has it not.
        can_go_on: Whether a directory that was left is one to go on with.
    """

    journal: str
    can_go_on: Callable[[Path], bool]


@contextmanager
def staged_directory(
    target: Path, *, required_bytes: int = 0, resumable: Resumable | None = None
) -> Iterator[Path]:
    """Yield a directory that becomes ``target`` if the block ends without an error.

    It is empty, or what was left of an earlier try that can be gone on with. After an error it is
    removed and ``target`` is as it was; so it is after Ctrl-C, unless it can be gone on with.

    Args:
        target: Where the directory goes. It must not exist, or be empty.
        required_bytes: What will be written, about; checked against the free disk space first.
        resumable: How to go on after a kill; None: begin anew.

    Raises:
        CheckpointError: ``target`` exists, or the file system refuses (full, read-only, ...).
    """
    check_free(target)
    place = _place(target)
    missing_parents = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        left = _take_stale(place, resumable)
        staging, lock = left or _create(place)
    except OSError as error:
        raise _refused(target, error) from error
    keep = False
    try:
        _check_disk(place.parent, required_bytes - _allocated_bytes(staging))
        if resumable is not None:
            _sync(place.parent)  # a power cut must not lose the name of what is gone on with
        yield staging
        if resumable is not None:
            (staging / resumable.journal).unlink(missing_ok=True)
        _sync(staging)
        staging.rename(place)
        _sync(place.parent)
    except OSError as error:
        raise _refused(target, error) from error
    except Exception:
        raise
    except BaseException:  # Ctrl-C, or whatever a signal is turned into
        keep = resumable is not None
        raise
    finally:
        if not keep:
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)
        with suppress(OSError):  # one that is not empty stays, and those above it
            for parent in missing_parents:
                parent.rmdir()


def check_free(target: Path) -> None:
    """Check that a directory can be put at ``target``, and nothing is lost by it.

    Raises:
        CheckpointError: There is a file, or a directory that is not empty or cannot be replaced.
    """
    place = _place(target)
    try:
        occupied = any(place.iterdir()) if place.is_dir() else os.path.lexists(place)
        # The one could not be renamed onto, the other would leave a shell in a removed directory.
        fixed = place.is_mount() or place == Path.cwd()
    except OSError as error:
        raise _refused(target, error) from error
    if occupied:
        raise CheckpointError(f"{target} exists already; remove it or choose another output")
    if fixed:
        raise CheckpointError(
            f"{target} is a mount point or the current directory and cannot be replaced; name a "
            "directory in it"
        )


def _place(target: Path) -> Path:
    """Where ``target`` is with links and '..' followed: what is renamed onto must be no link."""
    return Path(os.path.realpath(target))


def _take_stale(target: Path, resumable: Resumable | None) -> tuple[Path, int] | None:
    """Remove what processes that died left, but for one directory that can be gone on with.

    Returns:
        That one and the descriptor that holds its lock.
    """
    taken = None
    for path in sorted(target.parent.glob(f".{glob.escape(target.name)}.tmp-*")):
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)  # someone is filling it
            continue
        # Until the lock was held, whoever had it may have put the directory into its place.
        ours = path.exists() and os.path.samestat(os.fstat(lock), path.stat())
        if ours and taken is None and resumable is not None and resumable.can_go_on(path):
            taken = path, lock
            continue
        if ours:
            shutil.rmtree(path, ignore_errors=True)
        os.close(lock)
    return taken


def _create(target: Path) -> tuple[Path, int]:
    """A new locked staging directory, and the descriptor that holds the lock."""
    while True:
        staging = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
        staging.mkdir()
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Between mkdir and flock it looked stale, and another process may have removed it.
        if staging.exists():
            return staging, lock
        os.close(lock)


def _allocated_bytes(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def _check_disk(directory: Path, required_bytes: int) -> None:
    free = shutil.disk_usage(directory).free
    if required_bytes > free:
        raise CheckpointError(
            f"{directory} has {free / 2**20:.1f} MiB free and {required_bytes / 2**20:.1f} MiB are "
            "needed; free some space or choose an output on another disk"
        )


def _sync(directory: Path) -> None:
    """Make the names in a directory durable; the files in it are synced by who wrote them."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refused(target: Path, error: OSError) -> CheckpointError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "the disk is full; free some space or choose an output on another disk"
    elif error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        advice = f"{error.filename2 or error.filename or target} is in the way"
    elif error.errno == errno.EFBIG:
        advice = "the file size limit of this process or file system is too low (see ulimit -f)"
    else:
        where = f" ({error.filename})" if error.filename else ""
        advice = f"{error.strerror or error}{where}"
    return CheckpointError(f"{target} cannot be written: {advice}")
