"""The durable record of a conversion's finished tensors, in the directory that is being filled.

Layout: one record a line, eight hex digits of CRC-32, a space, JSON, a line feed::

    1f09a3c2 {"journal": 1, "conversion": {"source": [...], "config": {...}, ...}}
    7d0e55aa {"batch": 0, "target": "transformer.vocab_embedding.weight", "source": {...}, ...}
    ...

A record is written after its tensors are durable, so every record that is there can be gone on
from. The last line may be cut by a crash and counts as never written; any other damage means that
nothing in the directory is to be trusted. Whoever holds the directory's lock is the only writer.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.convert.record import FinishedTarget

JOURNAL_FILE = "conversion.journal"
_VERSION = 1


def conversion_identity(
    source: Path, config: PretrainedConfig, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a result depends on: two conversions with the same have the same bytes.

    Args:
        source: The Hugging Face checkpoint; its files count by name, size and time.
        config: Of the result.
        settings: What is not in ``config``, e.g. a digest of the calibration text; JSON.
    """
    files = sorted(path for path in source.iterdir() if path.is_file())
    stats = [(path.name, path.stat()) for path in files]
    identity = {
        "llmserve": version("llmserve"),
        "torch": torch.__version__,
        "source": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "config": config.to_dict(),
        "settings": dict(settings),
    }
    loaded: dict[str, Any] = json.loads(json.dumps(identity))
    return loaded


class Journal:
    """A conversion's journal. Use as a context manager.

    Args:
        directory: Being filled, and locked by the caller.
        identity: Of the conversion. A journal of another one, or a damaged one, is begun anew.

    Attributes:
        finished: Targets that are written, by name.

    Raises:
        OSError: The file system refuses.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._directory, self._identity = directory, dict(identity)
        self.finished: dict[str, FinishedTarget] = {}
        self._batches: dict[str, int] = {}
        path = directory / JOURNAL_FILE
        content = path.read_bytes() if path.is_file() else b""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            records = _records(content)
            if records is None or _conversion(records) != self._identity:
                self.restart()
            else:
                os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)
                os.lseek(self._descriptor, 0, os.SEEK_END)
                for record in records[1:]:
                    self._batches[record["target"]] = record.pop("batch")
                    self.finished[record["target"]] = FinishedTarget(**record)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._descriptor)

    def last_batch(self) -> list[FinishedTarget]:
        """Those that were written down last, together."""
        last = max(self._batches.values(), default=0)
        return [self.finished[name] for name, batch in self._batches.items() if batch == last]

    def restart(self) -> None:
        """Forget what is finished."""
        self.finished, self._batches = {}, {}
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._write([{"journal": _VERSION, "conversion": self._identity}])
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def append(self, finished: Sequence[FinishedTarget]) -> None:
        """Write targets down, which must be durable; so are the records when this returns.

        Raises:
            OSError: The file system refuses.
        """
        batch = max(self._batches.values(), default=-1) + 1
        self._write([{"batch": batch, **asdict(target)} for target in finished])
        for target in finished:
            self.finished[target.target] = target
            self._batches[target.target] = batch

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
        data = b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fdatasync(self._descriptor)


def can_go_on(directory: Path, identity: Mapping[str, Any]) -> bool:
    """Whether a directory was being filled by the same conversion."""
    try:
        content = (directory / JOURNAL_FILE).read_bytes()
    except OSError:
        return False
    records = _records(content)
    return records is not None and _conversion(records) == identity


def _records(content: bytes) -> list[dict[str, Any]] | None:
    """All records, without a last line that was cut; None if anything else is wrong."""
    records = []
    for line in content.split(b"\n")[:-1]:
        payload = line[9:]
        if line[:9] != b"%08x " % zlib.crc32(payload):
            return None
        records.append(json.loads(payload))
    return records


def _conversion(records: Sequence[Mapping[str, Any]]) -> Any:
    header = records[0] if records else {}
    return header.get("conversion") if header.get("journal") == _VERSION else None
