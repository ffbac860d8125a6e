"""Whatever the user names -> an engine directory, with the missing steps done once.

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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from llmserve.checkpoint.config_file import KIND_NAMES, ArtifactKind, artifact_kind
from llmserve.checkpoint.engine_dir import ENGINE_VERSION
from llmserve.checkpoint.progress import Report, no_report
from llmserve.config import BuildConfig, ConvertConfig, DType
from llmserve.convert.hub import locate
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from llmserve.runtime.tensorrt_llm_release import TensorRTLLMRelease, required_release

Backend = Literal["auto", "native", "tensorrt-llm"]


def ensure_engine(
    model: str | Path,
    *,
    dtype: DType = "auto",
    quant: str | None = None,
    kv_cache_dtype: str | None = None,
    tp_size: int | None = None,
    build_config: BuildConfig | None = None,
    backend: Backend = "auto",
    cache_dir: Path | None = None,
    report: Report = no_report,
) -> Path:
    """Return a directory that an engine can run, converting and building what is missing.

    Args:
        model: An engine, a TensorRT-LLM checkpoint, a Hugging Face checkpoint, or a Hub id.
        dtype: As ``convert`` takes it; only for a Hugging Face checkpoint.
        quant: One of ``QUANT_ALGOS``, None for 'none'; only for a Hugging Face one.
        kv_cache_dtype: One of ``KV_CACHE_QUANT_ALGOS``, None for 'auto'; likewise.
        tp_size: Tensor-parallel ranks, None for 1; likewise.
        build_config: Limits of an engine built here; an engine that is there has its own, which
            whoever starts it may lower.
        backend: Which engine is to run it; 'auto' takes TensorRT-LLM for its own engines alone.
        cache_dir: Where results are kept; None for the default.
        report: Told of the progress of both stages.

    Returns:
        ``model`` itself if it can be run as it is, else a directory in the cache: an engine of the
        native runtime or of TensorRT-LLM. (From 1.3 on, that runs Hugging Face checkpoints.)

    Raises:
        ConfigError: A setting of the conversion for something whose weights are fixed already.
        CheckpointError: The model cannot be found, read or converted.
    """
    asked = {"quant": quant, "kv_cache_dtype": kv_cache_dtype, "tp_size": tp_size}
    asked["dtype"] = None if dtype == "auto" else dtype
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    conversion = ConvertConfig(**given)
    source = locate(str(model))
    kind = artifact_kind(source)
    release = None
    if kind == "tensorrt_llm_engine":
        if backend == "native":
            raise UnsupportedCheckpointError(
                f"{source} is {KIND_NAMES[kind]}, which the native backend cannot run; give the "
                "checkpoint it was built from, or leave --backend out"
            )
    elif backend == "tensorrt-llm":
        release = _release_for(source, kind)
    as_it_is = kind.endswith("engine") or (release is not None and not release.has_engines)
    if kind != "huggingface" or as_it_is:
        _refuse_fixed(source, kind, given)
    if as_it_is:
        return source
    limits = build_config or BuildConfig()
    settings = dataclasses.asdict(conversion) | dataclasses.asdict(limits)
    if release is not None:
        settings["builder"] = str(release)
    cache = (cache_dir or default_cache_dir()) / "engines"
    engine = cache / f"{source.resolve().name}-{_key(source, settings)}"
    with _locked(engine):
        if not engine.exists():
            _make(source, kind, engine, conversion, limits, report, release)
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
    conversion: ConvertConfig,
    limits: BuildConfig,
    report: Report,
    release: TensorRTLLMRelease | None,
) -> None:
    # Imported here: a server started on a finished engine does without torch in this process.
    from llmserve.build import native, tensorrt_llm
    from llmserve.convert.converter import convert

    def build(checkpoint: Path) -> None:
        if release is None:
            native.build(checkpoint, engine, limits, report=report)
        else:
            tensorrt_llm.build(checkpoint, engine, limits)

    if kind == "checkpoint":
        build(source)
        return
    # The checkpoint between is as large as the source and is not kept. One that is found was left
    # by a process that was killed while it built: it is whole, so that step is done.
    checkpoint = engine.with_name(f"{engine.name}.checkpoint")
    if not checkpoint.exists():
        convert(source, checkpoint, settings=conversion, report=report)
    try:
        build(checkpoint)
    finally:
        shutil.rmtree(checkpoint, ignore_errors=True)


def _release_for(source: Path, kind: ArtifactKind) -> TensorRTLLMRelease:
    """The installed TensorRT-LLM, if it can run what is made of an artefact, or the artefact."""
    if kind == "engine":
        raise ConfigError(
            f"backend is 'tensorrt-llm', but {source} is an engine for the native backend; give "
            "the checkpoint it was built from"
        )
    release = required_release()
    if kind == "checkpoint" and not release.has_engines:
        raise UnsupportedCheckpointError(
            f"{source} is {KIND_NAMES[kind]}, and {release}, which is installed, runs Hugging Face "
            "checkpoints alone: make one with `llmserve convert --format hf`"
        )
    return release


def _refuse_fixed(source: Path, kind: ArtifactKind, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        raise ConfigError(
            f"{name} is {value!r}, but {source} is {KIND_NAMES[kind]}, whose weights are fixed; "
            "leave it out, or start from the Hugging Face checkpoint"
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
