"""How a layer's K and V are kept in the cache: one class per kind, ``make_kv_storage`` picks."""

from __future__ import annotations

from typing import Protocol

import torch

from llmserve.quantization import kv_cache
from llmserve.runtime.torch.kernels.e4m3 import EXPONENT_OFFSET, unpacked_e4m3


class KvStorage(Protocol):
    """What of K and V the cache of one layer holds.

    Attributes:
        dtype: Of the cache.
    """

    dtype: torch.dtype

    def store(self, key_value: torch.Tensor) -> torch.Tensor:
        """K and V (tokens, width) in the model's dtype -> rows of the cache, likewise."""
        ...

    def load(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the cache (tokens, width) -> K and V in the model's dtype."""
        ...


class PlainKvStorage:
    """K and V as they are.

    Args:
        dtype: Of the model.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def store(self, key_value: torch.Tensor) -> torch.Tensor:
        """Return them."""
        return key_value

    def load(self, rows: torch.Tensor) -> torch.Tensor:
        """Return them."""
        return rows


class Int8KvStorage:
    """K and V in int8 under a scale of their layer.

    Every value is rounded by itself, and what lies outside the scale's range takes its end: an
    outlier touches no other value.

    Args:
        scale: float32 (1,).
        dtype: Of the model.
    """

    dtype = torch.int8

    def __init__(self, scale: torch.Tensor, dtype: torch.dtype) -> None:
        self._scale, self._model_dtype = scale, dtype
        self._step = float(scale)

    def store(self, key_value: torch.Tensor) -> torch.Tensor:
        """Quantise them."""
        return kv_cache.quantize(key_value, "INT8", self._scale)

    def load(self, rows: torch.Tensor) -> torch.Tensor:
        """Dequantise them."""
        # The numbers of ``kv_cache.dequantize``: steps are exact in every dtype, and a product with
        # a plain number is made in float32 and rounded once.
        return rows.to(self._model_dtype).mul_(self._step)


class Fp8KvStorage:
    """K and V in float8_e4m3fn under a scale of their layer, otherwise as in int8.

    The cache is one of bytes: torch cannot index float8 on a CPU.

    Args:
        scale: float32 (1,).
        dtype: Of the model.
    """

    dtype = torch.uint8

    def __init__(self, scale: torch.Tensor, dtype: torch.dtype) -> None:
        self._scale, self._model_dtype = scale, dtype
        self._unpacked_step = float(scale) * EXPONENT_OFFSET

    def store(self, key_value: torch.Tensor) -> torch.Tensor:
        """Quantise them."""
        return kv_cache.quantize(key_value, "FP8", self._scale).view(torch.uint8)

    def load(self, rows: torch.Tensor) -> torch.Tensor:
        """Dequantise them."""
        stored = rows.view(torch.float8_e4m3fn)
        if rows.device.type != "cpu":
            return kv_cache.dequantize(stored, self._scale).to(self._model_dtype)
        # As in int8: e4m3's numbers and their 256th part are exact in every dtype.
        bits = torch.empty(rows.shape, dtype=torch.int16)
        return unpacked_e4m3(stored, bits).to(self._model_dtype).mul_(self._unpacked_step)


def make_kv_storage(
    kv_cache_quant_algo: str | None, scale: torch.Tensor | None, dtype: torch.dtype
) -> KvStorage:
    """The storage behind a config.json's kv_cache_quant_algo.

    Args:
        kv_cache_quant_algo: 'INT8', 'FP8' or None.
        scale: The layer's kv_cache_scaling_factor, float32 (1,), on the device; None without one.
        dtype: Of the model.
    """
    if kv_cache_quant_algo is None:
        return PlainKvStorage(dtype)
    assert scale is not None
    storage = Int8KvStorage if kv_cache_quant_algo == "INT8" else Fp8KvStorage
    return storage(scale, dtype)
