"""A conversion as a command runs it: told at once what cannot work, with progress on the way."""

from __future__ import annotations

from pathlib import Path

from llmserve.cli.progress import ProgressReport
from llmserve.config import DType


def run_conversion(
    source: str, output: Path, *, quant: str, dtype: DType, halve_float32: bool = False
) -> Path:
    """Convert with a progress bar and return the checkpoint's directory.

    Args:
        source: As ``convert`` takes it.
        output: The directory to make.
        quant: As ``convert`` takes it.
        dtype: As ``convert`` takes it.
        halve_float32: Let the dtype 'auto' make float16 of a float32 source, as TensorRT-LLM's own
            scripts do.

    Raises:
        CheckpointError: The source cannot be read, or the output not be written.
    """
    from llmserve.checkpoint.config_file import check_kind
    from llmserve.checkpoint.staging import check_free
    from llmserve.convert.hub import locate

    # Looked at before torch is imported, so that a wrong path is answered at once.
    check_free(output.expanduser())
    path = locate(source)
    check_kind(path, "huggingface")
    from llmserve.convert.converter import convert, half_precision

    if halve_float32 and dtype == "auto":
        dtype = half_precision(path)
    with ProgressReport() as report:
        return convert(path, output, quant=quant, dtype=dtype, report=report)
