"""What a family of models is to the conversion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One Hugging Face ``model_type``.

    Attributes:
        architecture: Its ``architectures[0]``, which is TensorRT-LLM's architecture too.
        tensors: Hugging Face name -> TensorRT-LLM name; None: dropped on purpose. ``{i}`` is the
            layer, ``{e}`` the expert. Tensors with the same target are concatenated on dim 0:
            expert by expert, and in the order of the table.
        pretrained_config: TensorRT-LLM's config.json for a Hugging Face one (its object, the dtype
            and the quantisation of the checkpoint to write).
        other_spelling: Names that the sources of a target may have instead of those in ``tensors``.
        swapped_halves: Names in the tables whose rows (of each expert) are the gate and then up,
            and are stored the other way around.
        norm_offset: Added to the norms' weights: Gemma multiplies with 1 + w, TensorRT-LLM with
            what is stored.
    """

    architecture: str
    tensors: Mapping[str, str | None]
    pretrained_config: Callable[[Mapping[str, Any], str, QuantConfig], PretrainedConfig]
    other_spelling: Mapping[str, str] = field(default_factory=dict)
    swapped_halves: frozenset[str] = frozenset()
    norm_offset: float = 0.0
