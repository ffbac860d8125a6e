"""Whatever the user names -> a native engine directory, with the missing steps done once.

What is built on the way is kept in a cache directory ($LLMSERVE_CACHE, else ``llmserve`` under
$XDG_CACHE_HOME or ~/.cache), keyed by the source's files and all settings. A lock per key makes a
second process wait for the first one's result. Imports torch only when there is work to do.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmserve.checkpoint.config_file import KIND_NAMES, ArtifactKind, artifact_kind
from llmserve.checkpoint.engine_dir import ENGINE_VERSION
from llmserve.checkpoint.progress import Report, no_report
from llmserve.config import QUANT_ALGOS, BuildConfig, DType, check_choice
from llmserve.convert.hub import locate
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError


def ensure_engine(
    model: str | Path,
    *,
    dtype: DType = "auto",
    quant: str | None = None,
    build_config: BuildConfig | None = None,
    cache_dir: Path | None = None,
    report: Report = no_report,
) -> Path:
    """Return the native engine directory of a model, converting and building what is missing.

    Args:
        model: An engine, a TensorRT-LLM checkpoint, a Hugging Face checkpoint, or a Hub id.
        dtype: As ``convert`` takes it; only for a Hugging Face checkpoint.
        quant: 'none', 'w8a16' or 'fp8_rowwise', None for 'none'; only for a Hugging Face one.
        build_config: Limits of an engine built here; an engine that is there has its own, which
            whoever starts it may lower.
        cache_dir: Where results are kept; None for the default.
        report: Told of the progress of both stages.

    Returns:
        ``model`` itself if it is an engine, else a directory in the cache.

    Raises:
        ConfigError: ``dtype`` or ``quant`` for something whose weights are fixed already.
        CheckpointError: The model cannot be found, read or converted.
    """
    if quant is not None:
        check_choice("quant", quant, tuple(QUANT_ALGOS))
    source = locate(str(model))
    kind = artifact_kind(source)
    if kind == "tensorrt_llm_engine":
        raise UnsupportedCheckpointError(
            f"{source} is {KIND_NAMES[kind]}, which is not implemented here yet; "
            "give the checkpoint it was built from"
        )
    if kind != "huggingface":
        _refuse_fixed(source, kind, dtype, quant)
    if kind == "engine":
        return source
    limits = build_config or BuildConfig()
    settings = {"dtype": dtype, "quant": quant or "none", **dataclasses.asdict(limits)}
    cache = (cache_dir or default_cache_dir()) / "engines"
    engine = cache / f"{source.resolve().name}-{_key(source, settings)}"
    with _locked(engine):
        if not engine.exists():
            _make(source, kind, engine, dtype, quant or "none", limits, report)
    return engine


def default_cache_dir() -> Path:
    """$LLMSERVE_CACHE, else ``llmserve`` in the user's cache directory."""
    if explicit := os.environ.get("LLMSERVE_CACHE"):
        return Path(explicit)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "llmserve"


def _make(
    source: Path,
    kind: ArtifactKind,
    engine: Path,
    dtype: DType,
    quant: str,
    limits: BuildConfig,
    report: Report,
) -> None:
    # Imported here: a server started on a finished engine does without torch in this process.
    from llmserve.build.native import build
    from llmserve.convert.converter import convert

    if kind == "checkpoint":
        build(source, engine, limits, report=report)
        return
    # The checkpoint between is as large as the source and is not kept. One that is found was left
    # by a process that was killed while it built: it is whole, so that step is done.
    checkpoint = engine.with_name(f"{engine.name}.checkpoint")
    if not checkpoint.exists():
        convert(source, checkpoint, quant=quant, dtype=dtype, report=report)
    try:
        build(checkpoint, engine, limits, report=report)
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _refuse_fixed(source: Path, kind: ArtifactKind, dtype: DType, quant: str | None) -> None:
    given = [("dtype", dtype if dtype != "auto" else None), ("quant", quant)]
    for name, value in given:
        if value is not None:
            raise ConfigError(
                f"{name} is {value!r}, but {source} is {KIND_NAMES[kind]}, whose weights are "
                "fixed; leave it out, or start from the Hugging Face checkpoint"
            )


def _key(source: Path, settings: dict[str, object]) -> str:
    """A digest of the source's files (names, sizes, times) and of everything that is asked for."""
    files = sorted(path for path in source.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    identity = [str(source.resolve()), stats, settings, ENGINE_VERSION]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


@contextmanager
def _locked(engine: Path) -> Iterator[None]:
    """Hold the lock of one engine of the cache, across processes."""
    try:
        engine.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(engine.with_name(f"{engine.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise CheckpointError(
            f"the cache {engine.parent} cannot be written ({error.strerror}); set LLMSERVE_CACHE "
            "to a directory that can"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
