"""Converts: a Hugging Face checkpoint to a TensorRT-LLM one, or to a quantised Hugging Face one.

It says what is done in which order: plan, calibrate, write, judge. Who knows families, formats and
files are the modules that it calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from llmserve.checkpoint.companions import (
    GENERATION_CONFIG,
    QUALITY_FILE,
    companions_bytes,
    copy_companions,
)
from llmserve.checkpoint.config_file import CONFIG_FILE, check_kind, write_json
from llmserve.checkpoint.engine_dir import rank_file
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.quality_file import (
    Measurement,
    Quality,
    read_quality,
    write_measurement,
)
from llmserve.checkpoint.scratch import bytes_of
from llmserve.checkpoint.staging import Resumable, check_free, staged_directory
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.checkpoint.writer import StreamingWriter
from llmserve.config import CalibrationConfig, ConvertConfig, QualityConfig
from llmserve.convert.artifact import Artifact, open_artifact
from llmserve.convert.calibrate import RANGES_FILE, ActivationRanges, calibrate, plain_config
from llmserve.convert.export_hf import check_exportable, export_hf
from llmserve.convert.families import family
from llmserve.convert.hub import locate
from llmserve.convert.import_hf import ImportedTensors, quantization_of
from llmserve.convert.journal import JOURNAL_FILE, can_go_on, conversion_identity
from llmserve.convert.plain_tensors import PlainTensors
from llmserve.convert.plan import Target, make_plan
from llmserve.convert.quality import check_limits, held_out_samples, measure
from llmserve.convert.quantizer import Quantizer, needs_calibration
from llmserve.convert.record import (
    ConversionRecord,
    FileDigests,
    file_digests,
    source_digests,
)
from llmserve.convert.samples import RenderChat, Samples, load_samples
from llmserve.convert.stream import execute, written_bytes
from llmserve.convert.target_config import target_config
from llmserve.convert.tokenizer_model import write_tokenizer_json
from llmserve.errors import ConfigError
from llmserve.quantization.layout import engine_tensors, rank_shards, rank_tensors

# A header of names and shapes, and config.json.
_OVERHEAD_BYTES = 2**20

logger = logging.getLogger(__name__)


def convert(
    source: str | Path,
    out_dir: str | Path,
    *,
    settings: ConvertConfig | None = None,
    calibration: CalibrationConfig | None = None,
    quality: QualityConfig | None = None,
    render_chat: RenderChat | None = None,
    report: Report = no_report,
    measured: Callable[[Quality], None] | None = None,
    **changes: Any,
) -> Path:
    """Convert a Hugging Face checkpoint.

    W8A16 is written as TensorRT-LLM's quantize.py does, with plain weights that the build
    quantises: such a checkpoint is as large as its source. A source that is quantised already, in
    ModelOpt's layout, keeps its quantisation; FP8 linears that are one weight in TensorRT-LLM and
    stand under several scales are brought to the largest. After a kill or Ctrl-C the same call goes
    on where it stopped.

    Args:
        source: A directory, or a Hub id, 'owner/name' or 'owner/name@revision'.
        out_dir: The directory to make; it appears when it is whole.
        settings: What to make; None takes ``ConvertConfig(**changes)``.
        calibration: The text for formats that need ranges of activations; None takes llmserve's.
        quality: Whether to run the result against the source, and the limits it must keep.
        render_chat: Writes the messages of a text as the model's chat template does.
        report: Told of the progress.
        measured: Told what was measured, before it is held against the limits.
        changes: Fields of ``ConvertConfig``, e.g. ``quant='fp8'``; only without ``settings``.

    Returns:
        ``out_dir``.

    Raises:
        ConfigError: A setting is none of the choices, or they do not go together.
        CheckpointError: The source cannot be read, is not whole or not supported, or the output
            cannot be written. Nothing is left at ``out_dir``.
        QualityError: The result misses a limit. Nothing is left at ``out_dir``.
    """
    if settings is not None and changes:
        raise TypeError(f"settings are given, and {', '.join(changes)} besides")
    settings = settings or ConvertConfig(**changes)
    out_dir = Path(out_dir).expanduser()
    check_free(out_dir)
    path = locate(str(source))
    check_kind(path, "huggingface")
    with HuggingFaceCheckpoint(path) as checkpoint:
        conversion = _Conversion(checkpoint, settings, report)
        ranges_from = conversion.calibration(calibration or CalibrationConfig(), render_chat)
        held_out = conversion.held_out(quality or QualityConfig(), render_chat)
        required = conversion.required_bytes + companions_bytes(path) + _OVERHEAD_BYTES
        with staged_directory(
            out_dir, required_bytes=required, resumable=conversion.resumable(ranges_from)
        ) as staging:
            conversion.write(staging, ranges_from)
            copy_companions(path, staging)
            if not (staging / GENERATION_CONFIG).exists():
                write_json(staging / GENERATION_CONFIG, _generation_config(checkpoint.config))
            write_tokenizer_json(path, staging)
            if quality is not None and held_out is not None:
                measurement = conversion.judge(staging, held_out)
                if measured is not None and (told := read_quality(staging)) is not None:
                    measured(told)
                check_limits(measurement, quality.max_kl, quality.min_top1)
    if not (out_dir / "tokenizer.json").exists():
        logger.warning("%s has no tokenizer.json: what is made of it takes token ids only", path)
    return out_dir


class _Calibration(NamedTuple):
    """What the ranges of activations come from: a text to run, or an earlier calibration's."""

    samples: Samples | None
    ranges: ActivationRanges | None
    digest: str


class _Conversion:
    """One conversion: a source, what becomes of it, and how."""

    def __init__(
        self, checkpoint: HuggingFaceCheckpoint, settings: ConvertConfig, report: Report
    ) -> None:
        self._checkpoint, self._report = checkpoint, report
        self._format = settings.checkpoint_format
        self._family = family(checkpoint.config)
        self._config = target_config(checkpoint, settings)
        self._imported = quantization_of(checkpoint.path)
        self._plan: list[Target] = []
        self._plain: TensorSource
        if self._imported is not None:
            self._plain = ImportedTensors(checkpoint, self._family, self._config, self._imported)
            self._calibrated = False
            return
        if self._format == "hf":
            check_exportable(self._config)
        self._plan = make_plan(checkpoint, self._family, self._config)
        self._plain = PlainTensors(checkpoint, self._plan)
        self._calibrated = needs_calibration(self._config)

    @property
    def required_bytes(self) -> int:
        """Of the disk, about."""
        config = self._config
        if self._format == "hf" or self._imported is not None:  # W8A16 is stored in 8 bits there
            return sum(spec.nbytes for spec in engine_tensors(config).values())
        return written_bytes(config)

    def calibration(
        self, settings: CalibrationConfig, render_chat: RenderChat | None
    ) -> _Calibration | None:
        """What ranges are found on, or the ranges themselves; None where none are needed."""
        if not self._calibrated:
            if settings != CalibrationConfig():
                raise ConfigError(
                    "calibration settings are given and nothing is calibrated: only fp8, int8_sq "
                    "and a quantised KV cache are; leave them out"
                )
            return None
        if settings.path is not None and settings.path.suffix == ".safetensors":
            if settings != CalibrationConfig(path=settings.path):
                raise ConfigError(
                    f"samples, a length or a seed of calibration are given with {settings.path}, "
                    "which is of an earlier calibration; leave them out"
                )
            path = settings.path.expanduser()
            ranges = ActivationRanges.load(path, self._config)
            return _Calibration(None, ranges, blake3(path.read_bytes()).hexdigest())
        samples = load_samples(
            settings.path,
            self._checkpoint.path,
            default="calibration",
            samples=settings.samples,
            seq_len=min(settings.seq_len, self._config.max_position_embeddings),
            seed=settings.seed,
            vocab_size=self._config.vocab_size,
            render_chat=render_chat,
        )
        return _Calibration(samples, None, samples.sha256)

    def resumable(self, calibration: _Calibration | None) -> Resumable | None:
        """How to go on after a kill; None for what is always begun anew."""
        if self._imported is not None or self._format == "hf":
            return None
        identity = self._identity(calibration)
        return Resumable(journal=JOURNAL_FILE, can_go_on=lambda left: can_go_on(left, identity))

    def write(self, staging: Path, calibration: _Calibration | None) -> None:
        """Write weights and config.json, with the record of it."""
        if self._imported is not None:
            self._write_imported(staging)
            return
        quantizer = Quantizer(self._plain, self._config, self._ranges(staging, calibration))
        if self._format == "hf":
            export_hf(
                self._checkpoint,
                self._family,
                self._plan,
                self._config,
                staging,
                quantize=quantizer,
                kv_amax=quantizer.kv_amax(),
                report=self._report,
            )
            return
        record = execute(
            self._plan,
            self._checkpoint,
            self._config,
            staging,
            identity=self._identity(calibration),
            quantize=quantizer,
            constants=quantizer.kv_cache_scales(),
            report=self._report,
        )
        write_json(staging / QUALITY_FILE, record.to_dict())
        write_json(staging / CONFIG_FILE, self._config.to_dict())

    def held_out(self, settings: QualityConfig, render_chat: RenderChat | None) -> Samples | None:
        """What the result is judged on; None where it is not."""
        if not settings.wanted:
            return None
        if self._imported is not None:
            raise ConfigError(
                "quality is asked for, but the source is quantised already; compare the result "
                "with the model before quantisation: llmserve quality REFERENCE CANDIDATE"
            )
        return held_out_samples(settings, self._checkpoint.path, self._config, render_chat)

    def judge(self, staging: Path, samples: Samples) -> Measurement:
        """Run the result against the source, and write what was measured."""
        # The model before quantisation, in the dtype that was asked for.
        plain = Artifact(self._plain, plain_config(self._config))
        with open_artifact(staging) as candidate:
            measurement = measure(plain, candidate, samples, report=self._report)
        write_measurement(staging, measurement)
        return measurement

    def _identity(self, calibration: _Calibration | None) -> dict[str, Any]:
        digest = calibration.digest if calibration is not None else None
        return conversion_identity(self._checkpoint.path, self._config, {"calibration": digest})

    def _ranges(self, staging: Path, calibration: _Calibration | None) -> ActivationRanges | None:
        if calibration is None:
            return None
        # Readers of the Hugging Face format take every .safetensors beside its weights for weights.
        folder = staging / "calibration" if self._format == "hf" else staging
        folder.mkdir(exist_ok=True)
        file, ranges = folder / RANGES_FILE, calibration.ranges
        if ranges is None and file.exists():  # of this very conversion, which was stopped later
            return ActivationRanges.load(file, self._config)
        if ranges is None:
            assert calibration.samples is not None
            ranges = calibrate(self._plain, self._config, calibration.samples, report=self._report)
        ranges.save(file)
        return ranges

    def _write_imported(self, staging: Path) -> None:
        """Put the source's own quantised tensors together, a tensor at a time, and record it."""
        config, tensors = self._config, engine_tensors(self._config)
        total = sum(spec.nbytes for spec in tensors.values()) * config.tp_size
        done = 0
        result: dict[str, FileDigests] = {}
        for rank in range(config.tp_size):
            digests: dict[str, str] = {}
            shards = rank_shards(config, tensors, rank)
            specs = rank_tensors(config, tensors, rank)
            with StreamingWriter(staging / rank_file(rank), specs) as writer:
                for name, shard in shards.items():
                    part = shard.take(self._plain.tensor(name)).contiguous()
                    writer.write(name, part)
                    digests[name] = blake3(bytes_of(part)).hexdigest()
                    done += tensors[name].nbytes
                    self._report("convert", done, total)
            names = writer.names_in_order()
            result[writer.path.name] = file_digests(writer.header, names, digests)
        record = ConversionRecord(source=source_digests(self._checkpoint), result=result)
        write_json(staging / QUALITY_FILE, record.to_dict())
        write_json(staging / CONFIG_FILE, config.to_dict())


def _generation_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers derives from config.json where there is no generation_config.json."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: hf[key] for key in keys if hf.get(key) is not None}
