"""Builds the native engine: quantises what the checkpoint holds plain, and fixes the limits.

The result has the checkpoint's ranks and tensor names. It is written a tensor at a time, from
mapped sources; nothing here knows how a step is computed.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import torch

from llmserve.checkpoint.companions import companions_bytes, copy_companions
from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.config_file import CONFIG_FILE, check_kind, read_json_object
from llmserve.checkpoint.decoder_tensors import tied_without_lm_head
from llmserve.checkpoint.engine_dir import rank_file, rank_files, write_engine_config
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.rotary_scaling import rope_type
from llmserve.checkpoint.sharding import check_tp_size
from llmserve.checkpoint.staging import check_free, staged_directory
from llmserve.checkpoint.writer import StreamingWriter
from llmserve.config import BuildConfig
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from llmserve.quantization.engine_view import EngineTensors
from llmserve.quantization.layout import engine_tensors, rank_tensors, stored_tensors

# A header of names and shapes, and config.json.
_OVERHEAD_BYTES = 2**20


def build(
    checkpoint_dir: str | Path,
    engine_dir: str | Path,
    build_config: BuildConfig | None = None,
    *,
    report: Report = no_report,
) -> Path:
    """Build a native engine directory from a TensorRT-LLM checkpoint.

    The engine has as many ranks as the checkpoint. W8A16 weights are quantised here, to int8
    (out, in) and a float32 scale per output channel, each rank's by themselves as TensorRT-LLM
    does; all others are copied. The tokenizer's files travel along.

    Args:
        checkpoint_dir: The checkpoint.
        engine_dir: The directory to make; it appears when it is whole.
        build_config: The engine's limits; None takes the defaults.
        report: Told after every tensor.

    Returns:
        ``engine_dir``.

    Raises:
        ConfigError: max_seq_len is above the model's max_position_embeddings.
        CheckpointError: The checkpoint cannot be read, is not whole or not supported, or the
            engine cannot be written. Nothing is left at ``engine_dir``.
    """
    checkpoint_dir, engine_dir = Path(checkpoint_dir).expanduser(), Path(engine_dir).expanduser()
    check_free(engine_dir)
    check_kind(checkpoint_dir, "checkpoint")
    config = PretrainedConfig.from_dict(read_json_object(checkpoint_dir / CONFIG_FILE))
    limits = resolve_build_config(build_config or BuildConfig(), config)
    check_tp_size(config, config.tp_size)
    with ExitStack() as stack:
        paths = rank_files(checkpoint_dir, config)
        readers = [stack.enter_context(RankReader(path)) for path in paths]
        config = tied_without_lm_head(config, readers[0].names())
        specs = [rank_tensors(config, engine_tensors(config), rank) for rank in range(len(readers))]
        for rank, reader in enumerate(readers):
            _check_tensors(reader, config, rank)
        total = sum(spec.nbytes for tensors in specs for spec in tensors.values())
        overhead = companions_bytes(checkpoint_dir) + _OVERHEAD_BYTES * len(readers)
        done = 0
        with staged_directory(engine_dir, required_bytes=total + overhead) as staging:
            for rank, reader in enumerate(readers):
                with StreamingWriter(staging / rank_file(rank), specs[rank]) as writer:
                    tensors = EngineTensors(reader, config)
                    for name, spec in specs[rank].items():
                        writer.write(name, tensors.tensor(name))
                        done += spec.nbytes
                        report("build", done, total)
            write_engine_config(staging, config, limits)
            copy_companions(checkpoint_dir, staging)
    return engine_dir


def resolve_build_config(build_config: BuildConfig, config: PretrainedConfig) -> BuildConfig:
    """Fill in max_seq_len from the model.

    Raises:
        ConfigError: max_seq_len is above max_position_embeddings.
    """
    limit = config.max_position_embeddings
    if build_config.max_seq_len is None:
        return dataclasses.replace(build_config, max_seq_len=limit)
    if build_config.max_seq_len > limit:
        why = ""
        if rope_type(config.rotary_scaling) == "dynamic":
            why = " (dynamic rotary scaling is not implemented beyond the original length)"
        raise ConfigError(
            f"max_seq_len is {build_config.max_seq_len}; it must be at most the model's "
            f"max_position_embeddings, {limit}{why}"
        )
    return build_config


def _check_tensors(reader: RankReader, config: PretrainedConfig, rank: int) -> None:
    """Raise CheckpointError unless a rank's file holds exactly what config.json says."""
    names = set(reader.names())
    specs = rank_tensors(config, stored_tensors(config, names), rank)
    if missing := sorted(set(specs) - names):
        raise CheckpointError(f"{reader.path} lacks the tensor {missing[0]}")
    for name, spec in specs.items():
        if (given := reader.spec(name)) == spec:
            continue
        if given.dtype == torch.int8 and config.quantization.quant_algo == "W8A16":
            raise UnsupportedCheckpointError(
                f"{name} in {reader.path} is int8 already, in an order made for one generation of "
                "GPUs; convert the original checkpoint again with `llmserve convert --quant w8a16`"
            )
        raise CheckpointError(f"{name} in {reader.path} is {given}; by config.json it is {spec}")
    if extra := sorted(names - set(specs)):
        raise CheckpointError(
            f"{reader.path} has the tensor {extra[0]}, for which config.json has no place"
        )
