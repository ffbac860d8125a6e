"""Builds a TensorRT engine: runs TensorRT-LLM's own ``trtllm-build``, its most stable face.

Written against the description of its flags (1.1 and 1.2) and tested with a stand-in; it has not
run on TensorRT-LLM itself.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from llmserve.checkpoint.companions import companions_bytes, copy_companions
from llmserve.checkpoint.config_file import (
    CONFIG_FILE,
    artifact_kind,
    check_kind,
    read_json_object,
)
from llmserve.checkpoint.engine_dir import rank_file
from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.staging import check_free, staged_directory
from llmserve.config import BuildConfig
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from llmserve.runtime.tensorrt_llm_release import (
    INSTALL_ENGINE_BUILDER_COMMAND,
    installed_release,
)

PROGRAM = "trtllm-build"
_LAST_LINES = 20
_TERMINATE_S = 5.0
# What is decided by BuildConfig, or here: not to be contradicted by extra arguments.
_OWN_FLAGS = (
    *("--checkpoint_dir", "--output_dir", "--max_batch_size", "--max_num_tokens"),
    *("--max_seq_len", "--max_decoder_seq_len", "--max_input_len", "--tokens_per_block"),
)
_TIMING_CACHE = "--output_timing_cache"


def print_line(line: str) -> None:
    """Pass a line of trtllm-build on to standard error."""
    print(line, file=sys.stderr, flush=True)


def build(
    checkpoint_dir: str | Path,
    engine_dir: str | Path,
    build_config: BuildConfig | None = None,
    *,
    extra_arguments: Sequence[str] = (),
    on_line: Callable[[str], None] = print_line,
) -> Path:
    """Build a TensorRT engine directory from a TensorRT-LLM checkpoint, on the GPU it is for.

    The tokenizer's files and quality.json travel along. The program runs in a process group of its
    own, which ends with this call however that ends.

    Args:
        checkpoint_dir: The checkpoint, with the ranks that it was converted for.
        engine_dir: The directory to make; it appears when it is whole.
        build_config: The engine's limits; None takes the defaults. ``max_seq_len`` None takes the
            model's max_position_embeddings.
        extra_arguments: More arguments of trtllm-build, such as ``["--gemm_plugin", "auto"]``.
        on_line: Gets its output, line by line.

    Returns:
        ``engine_dir``.

    Raises:
        ConfigError: TensorRT-LLM is not installed or builds no engines any more, or an extra
            argument is not to be given here.
        UnsupportedCheckpointError: W8A16 weights are in INT8 already.
        CheckpointError: The checkpoint cannot be read, trtllm-build failed (with its last lines),
            or the engine cannot be written. Nothing is left at ``engine_dir``.
    """
    checkpoint_dir, engine_dir = Path(checkpoint_dir).expanduser(), Path(engine_dir).expanduser()
    check_free(engine_dir)
    check_kind(checkpoint_dir, "checkpoint")
    program = find_program()
    config = read_json_object(checkpoint_dir / CONFIG_FILE)
    _refuse_quantized_weights(checkpoint_dir, config)
    flags = _flags(config, build_config or BuildConfig(), extra_arguments)
    weights_bytes = sum(path.stat().st_size for path in checkpoint_dir.glob("rank*.safetensors"))
    required = weights_bytes + companions_bytes(checkpoint_dir)
    with (
        staged_directory(engine_dir, required_bytes=required) as staging,
        tempfile.TemporaryDirectory(prefix="llmserve-") as scratch,
    ):
        command = [program, "--checkpoint_dir", str(checkpoint_dir.resolve())]
        command += ["--output_dir", str(staging), *flags]
        if not any(_names(argument, _TIMING_CACHE) for argument in extra_arguments):
            # By default it would land in the current directory.
            command += [_TIMING_CACHE, str(Path(scratch) / "model.cache")]
        _run(command, on_line)
        _check_engine(staging, config)
        copy_companions(checkpoint_dir, staging)
        _sync_files(staging)
    return engine_dir


def find_program() -> str:
    """The path of trtllm-build: beside this Python, else on PATH.

    Raises:
        ConfigError: There is none, or the installed TensorRT-LLM has no engines.
    """
    release = installed_release()
    if release is not None and not release.has_engines:
        raise ConfigError(
            f"{release} is installed, and TensorRT-LLM builds no engines from 1.3 on; write a "
            "Hugging Face checkpoint with `llmserve convert --format hf` and serve that with "
            "--backend tensorrt-llm, install tensorrt-llm<1.3, or build with --backend native"
        )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(PROGRAM, path=path)
    if program is None:
        raise ConfigError(
            f"{PROGRAM} is neither beside {sys.executable} nor on PATH; install TensorRT-LLM 1.2 "
            f"with `{INSTALL_ENGINE_BUILDER_COMMAND}`, or build with --backend native, which needs "
            "nothing more"
        )
    return program


def _refuse_quantized_weights(checkpoint_dir: Path, config: dict[str, Any]) -> None:
    """Raise UnsupportedCheckpointError for W8A16 weights that trtllm-build would quantise again."""
    if (config.get("quantization") or {}).get("quant_algo") != "W8A16":
        return
    with RankReader(checkpoint_dir / rank_file(0)) as reader:
        scales = [name for name in reader.names() if name.endswith(".per_channel_scale")]
    if scales:
        raise UnsupportedCheckpointError(
            f"{checkpoint_dir} has W8A16 weights in INT8 already ({scales[0]} is theirs), which "
            f"{PROGRAM} takes for plain ones; convert the original checkpoint, or build with "
            "--backend native"
        )


def _flags(config: dict[str, Any], limits: BuildConfig, extra: Sequence[str]) -> list[str]:
    for argument in extra:
        for flag in _OWN_FLAGS:
            if _names(argument, flag):
                raise ConfigError(
                    f"{flag} is among the arguments for {PROGRAM}; it follows from the command's "
                    "own arguments: use those"
                )
    max_seq_len = limits.max_seq_len
    if max_seq_len is None:
        max_seq_len = config.get("max_position_embeddings")
    if not isinstance(max_seq_len, int):
        raise ConfigError(
            f"max_seq_len is not given, and the checkpoint's {CONFIG_FILE} has no "
            "max_position_embeddings to take it from: give --max-seq-len"
        )
    values = {
        "--max_batch_size": limits.max_batch_size,
        "--max_num_tokens": limits.max_num_tokens,
        "--max_seq_len": max_seq_len,
        # Else a prompt could have 1024 tokens at most.
        "--max_input_len": max_seq_len,
        "--tokens_per_block": limits.tokens_per_block,
    }
    return [*(text for flag, value in values.items() for text in (flag, str(value))), *extra]


def _names(argument: str, flag: str) -> bool:
    return argument == flag or argument.startswith(f"{flag}=")


def _run(command: Sequence[str], on_line: Callable[[str], None]) -> None:
    """Run a program, passing its lines on; raise CheckpointError unless it succeeds."""
    last_lines: deque[str] = deque(maxlen=_LAST_LINES)

    def read(output: IO[str]) -> None:
        for line in output:
            last_lines.append(line.rstrip("\n"))
            on_line(last_lines[-1])

    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise ConfigError(f"{command[0]} cannot be run: {error.strerror or error}") from error
    assert process.stdout is not None
    reader = threading.Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        code = process.wait()
    finally:
        # Workers of it hold the pipe open and would outlive it.
        _end_group(process)
        reader.join(_TERMINATE_S)
        if not reader.is_alive():
            process.stdout.close()
    if code != 0:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        raise CheckpointError(
            f"{PROGRAM} {how}; the command was `{shlex.join(command)}`, its last lines:\n"
            + "\n".join(f"    {line}" for line in last_lines)
        )


def _end_group(process: subprocess.Popen[str]) -> None:
    """End a process and all that it has started: politely, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TERMINATE_S)


def _check_engine(directory: Path, checkpoint_config: dict[str, Any]) -> None:
    """Raise CheckpointError unless trtllm-build has left a whole engine."""
    if not (directory / CONFIG_FILE).is_file() or artifact_kind(directory) != "tensorrt_llm_engine":
        raise CheckpointError(f"{PROGRAM} ended well and left no {CONFIG_FILE} of an engine")
    world_size = (checkpoint_config.get("mapping") or {}).get("world_size", 1)
    for rank in range(world_size):
        file = f"rank{rank}.engine"
        if not (directory / file).is_file():
            raise CheckpointError(
                f"{PROGRAM} ended well and left no {file}; the checkpoint has {world_size} ranks"
            )


def _sync_files(directory: Path) -> None:
    """Make what trtllm-build has written durable."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
