"""Which model a job was begun with, so that no other one finishes it unnoticed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from llmserve.errors import CheckpointError

# What answers depend on; figures and notes beside it (quality.json, README.md) may change.
_SUFFIXES = (".safetensors", ".engine", ".json", ".jinja", ".model")
_NOTES = ("quality.json", "tactics.json")
_CHUNK_BYTES = 1 << 16
_NUM_CHUNKS = 64


def model_fingerprint(directory: Path) -> str:
    """A digest of a model directory's files.

    Names, sizes and content count, not times or places: a copy has the same one. Of a file beyond
    4 MiB, 64 evenly spread chunks of 64 KiB count, so it takes moments for any size; a model that
    was trained further differs in all of them.

    Raises:
        CheckpointError: A file can't be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(directory.iterdir()):
            if path.suffix in _SUFFIXES and path.name not in _NOTES and path.is_file():
                digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
                _update_with_samples(digest, path)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
    return f"sha256:{digest.hexdigest()}"


def _update_with_samples(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _NUM_CHUNKS * _CHUNK_BYTES:
            digest.update(file.read())
            return
        for i in range(_NUM_CHUNKS):
            # The last chunk ends with the file.
            offset = (size - _CHUNK_BYTES) * i // (_NUM_CHUNKS - 1)
            digest.update(os.pread(file.fileno(), _CHUNK_BYTES, offset))
