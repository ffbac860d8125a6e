"""Weight formats: one file per quant_algo, with the two verbs of it and the tensors it stores.

A linear weight is always (out, in). ``quantize`` runs when an artefact is written, ``dequantize``
is the plain reference that every kernel of the runtime is compared with. To add a format, add a
file and its line in ``_MODULES``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol, cast

import torch

from llmserve.errors import UnsupportedCheckpointError

_MODULES = {
    None: "unquantized",
    "W8A16": "w8a16",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_rowwise",
}


class WeightFormat(Protocol):
    """What each file of this package exports, as module-level names."""

    def quantize(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantise a linear weight (out, in) of any float dtype.

        Returns:
            The stored tensors by suffix: ``weight`` and, if the format has scales, theirs.

        Raises:
            CheckpointError: NaN or infinity in the weight.
        """
        ...

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The float32 weight (out, in) that stored tensors stand for."""
        ...

    def stored(
        self, out_features: int, in_features: int, dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every stored tensor by suffix, for a model of dtype ``dtype``."""
        ...


def weight_format(quant_algo: str | None) -> WeightFormat:
    """The format behind a config.json's quant_algo.

    Raises:
        UnsupportedCheckpointError: It is none of ours.
    """
    if quant_algo not in _MODULES:
        known = ", ".join(str(name) for name in _MODULES)
        raise UnsupportedCheckpointError(
            f"quant_algo {quant_algo!r} is not implemented; these are: {known}"
        )
    module = importlib.import_module(f"llmserve.quantization.{_MODULES[quant_algo]}")
    return cast(WeightFormat, module)
