"""Quantises whole weights by the ranges that calibration found, and makes the scales of K and V."""

from __future__ import annotations

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import layer_linears, torch_dtype
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.convert.calibrate import ActivationRanges
from llmserve.convert.plan import Target
from llmserve.errors import CheckpointError, UnsupportedCheckpointError
from llmserve.quantization import weight_format
from llmserve.quantization.amax import row_amax
from llmserve.quantization.kv_cache import scales
from llmserve.quantization.layout import kv_cache_scale, same_scale


def needs_calibration(config: PretrainedConfig) -> bool:
    """Whether a config.json's quantisation needs the ranges of activations.

    Raises:
        UnsupportedCheckpointError: The format has no form for the model's linears.
    """
    fmt = weight_format(config.quantization.quant_algo)
    for linear in layer_linears(config).values():
        fmt.stored(linear.weight, torch_dtype(config.dtype))
    return fmt.CALIBRATED or config.quantization.kv_cache_quant_algo is not None


class Quantizer:
    """Quantises a conversion's weights.

    Args:
        plain: The plain tensors of the whole model.
        config: Of the result.
        ranges: Of calibration; None where nothing needs it.
    """

    def __init__(
        self, plain: TensorSource, config: PretrainedConfig, ranges: ActivationRanges | None
    ) -> None:
        self._plain, self._config, self._ranges = plain, config, ranges
        self._format = weight_format(config.quantization.quant_algo)

    def __call__(self, target: Target, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors, by suffix, of a target's whole weight in the model's dtype.

        Raises:
            CheckpointError: Weight or range are not finite; the sentence names the linear.
        """
        linear = target.name.removesuffix(".weight")
        amax: torch.Tensor | None = None
        if self._format.CALIBRATED and self._ranges is not None:
            amax = self._ranges.input_amax(linear)
        others = [name for name in same_scale(self._config, target.name) if name != target.name]
        partners = [row_amax(self._plain.tensor(name)).amax() for name in others]
        try:
            return self._format.quantize(
                weight,
                amax,
                smoothquant_val=self._config.quantization.smoothquant_val,
                weight_amax=torch.stack(partners).amax() if partners else None,
            )
        except UnsupportedCheckpointError:
            raise
        except CheckpointError as error:
            raise CheckpointError(f"{linear}: {error}") from error

    def kv_cache_scales(self) -> dict[str, torch.Tensor]:
        """The scales of every layer's K and V by name; none where the cache is not quantised."""
        algo = self._config.quantization.kv_cache_quant_algo
        if algo is None or self._ranges is None:
            return {}
        dtype = torch_dtype(self._config.dtype)
        return {
            kv_cache_scale(layer, suffix): scale
            for layer in range(self._config.num_hidden_layers)
            for suffix, scale in scales(
                algo, self._ranges.keys[layer], self._ranges.values[layer], dtype
            ).items()
        }

    def kv_amax(self) -> dict[int, tuple[float, float]]:
        """Each layer's largest magnitudes of K and of V; none where the cache is not quantised."""
        if self._config.quantization.kv_cache_quant_algo is None or self._ranges is None:
            return {}
        pairs = zip(self._ranges.keys.tolist(), self._ranges.values.tolist(), strict=True)
        return dict(enumerate(pairs))
