"""A conversion as a command runs it: told at once what cannot work, with progress on the way."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.cli.progress import ProgressReport
from llmserve.config import CalibrationConfig, ConvertConfig, QualityConfig

if TYPE_CHECKING:
    from llmserve.checkpoint.quality_file import Quality


def run_conversion(
    source: str,
    output: Path,
    settings: ConvertConfig,
    *,
    calibration: CalibrationConfig | None = None,
    quality: QualityConfig | None = None,
    halve_float32: bool = False,
) -> Path:
    """Convert with a progress bar, print what was measured, and return the checkpoint's directory.

    Args:
        source: As ``convert`` takes it.
        output: The directory to make.
        settings: As ``convert`` takes them.
        calibration: As ``convert`` takes it.
        quality: As ``convert`` takes it.
        halve_float32: Let the dtype 'auto' make float16 of a float32 source, as TensorRT-LLM's own
            scripts do.

    Raises:
        CheckpointError: The source cannot be read, or the output not be written.
        QualityError: The result misses a limit.
    """
    from llmserve.checkpoint.config_file import check_kind
    from llmserve.checkpoint.staging import check_free
    from llmserve.convert.hub import locate

    # Looked at before torch is imported, so that a wrong path is answered at once.
    check_free(output.expanduser())
    path = locate(source)
    check_kind(path, "huggingface")
    from llmserve.cli.quality import chat_renderer, format_quality
    from llmserve.convert.converter import convert
    from llmserve.convert.target_config import half_precision

    if halve_float32 and settings.dtype == "auto":
        settings = dataclasses.replace(settings, dtype=half_precision(path))
    measured: list[Quality] = []
    try:
        with ProgressReport() as report:
            return convert(
                path,
                output,
                settings=settings,
                calibration=calibration,
                quality=quality,
                render_chat=chat_renderer(path),
                report=report,
                measured=measured.append,
            )
    finally:  # whatever the limits say of it
        for told in measured:
            assert told.measurement is not None
            print(format_quality(told.measurement, told))
