"""Weight formats: one file per quant_algo, with the two verbs of it and the tensors it stores.

A linear weight is (out, in), one of experts (experts, out, in). ``quantize`` runs when an artefact
is written, ``dequantize`` is the plain reference that every kernel of the runtime is compared with.
To add a format, add a file and its line in ``_MODULES``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol, cast

import torch

from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.errors import UnsupportedCheckpointError

_MODULES = {
    None: "unquantized",
    "W8A16": "w8a16",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8_rowwise",
    "FP8": "fp8",
    "W8A8_SQ_PER_CHANNEL": "smoothquant",
}

# How a stored tensor follows its weight when that is split over ranks: in both dimensions, with
# the output channels, with the input channels, or not at all.
Follows = Literal["weight", "rows", "columns", "nothing"]


class Stored(NamedTuple):
    """A tensor that a format stores for a linear.

    Attributes:
        spec: Its shape and dtype.
        follows: What of the weight it has one value for.
    """

    spec: TensorSpec
    follows: Follows


class WeightFormat(Protocol):
    """What each file of this package exports, as module-level names.

    Attributes:
        CALIBRATED: Whether ``quantize`` needs the range of the linear's inputs.
        ROWWISE: Whether rows of a weight are quantised each by itself, so that any of them can be
            quantised without the others.
    """

    CALIBRATED: bool
    ROWWISE: bool

    def quantize(
        self,
        weight: torch.Tensor,
        input_amax: torch.Tensor | None = None,
        smoothquant_val: float = 0.5,
        weight_amax: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Quantise a linear weight (..., out, in) of any float dtype.

        Args:
            weight: Of the linear.
            input_amax: float32 (in,): the largest magnitude of each input channel on representative
                text; only of calibrated formats.
            smoothquant_val: SmoothQuant's alpha; only of that.
            weight_amax: float32 (): the largest magnitude of all weights that have one scale with
                this one (``layout.same_scale``); only where there are others.

        Returns:
            The stored tensors by suffix: ``weight`` and, if the format has scales, theirs.

        Raises:
            CheckpointError: NaN or infinity in the weight, or in the range of its inputs.
        """
        ...

    def dequantize(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The float32 weight (..., out, in) that stored tensors stand for, as inputs see it."""
        ...

    def stored(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Stored]:
        """Every stored tensor by suffix.

        Args:
            shape: Of the weight, (..., out, in).
            dtype: Of the model.
        """
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
