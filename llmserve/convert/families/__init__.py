"""One file per Hugging Face ``model_type``, each with the same three names.

``TENSORS`` is a literal table of names, ``split_rows`` says how concatenated targets are made up,
``pretrained_config`` translates config.json. A new family is a file, a line in ``_MODULES``, and a
test that compares its logits with transformers'. This file also has what reads config.json's keys.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from llmserve.checkpoint.config import PretrainedConfig, QuantConfig
from llmserve.errors import CheckpointError, UnsupportedCheckpointError

# Hugging Face's model_type, its architectures[0], and the file.
_MODULES = {"llama": ("LlamaForCausalLM", "llama")}


class Family(Protocol):
    """What each file of this package exports, as module-level names."""

    TENSORS: dict[str, str | None]

    def split_rows(self, target: str, config: PretrainedConfig) -> tuple[int, ...]:
        """Rows of each source of a concatenated target, in the order of ``TENSORS``."""
        ...

    def pretrained_config(
        self, hf: Mapping[str, Any], dtype: str, quantization: QuantConfig
    ) -> PretrainedConfig:
        """TensorRT-LLM's config.json for a Hugging Face one."""
        ...


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.json.

    Raises:
        UnsupportedCheckpointError: It is none of ours, or the weights are quantised already.
    """
    model_type, architectures = hf.get("model_type"), hf.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    if (
        not isinstance(model_type, str)
        or model_type not in _MODULES
        or architecture not in (None, _MODULES[model_type][0])
    ):
        known = ", ".join(f"{name} ({kind})" for name, (kind, _) in _MODULES.items())
        raise UnsupportedCheckpointError(
            f"the architecture {architecture} (model_type {model_type!r}) is not implemented; "
            f"these are: {known}"
        )
    if hf.get("quantization_config"):
        raise UnsupportedCheckpointError(
            "config.json has a quantization_config: the weights are quantised already; convert "
            "the checkpoint that they were made from"
        )
    module = importlib.import_module(f"llmserve.convert.families.{_MODULES[model_type][1]}")
    return cast(Family, module)


def int_key(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of config.json; a missing or null one is ``default``.

    Raises:
        CheckpointError: No number, or missing without a default.
    """
    value = hf.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json has {key} {value!r}; it must be a whole number")
    return value


def number_key(hf: Mapping[str, Any], key: str, default: float) -> float:
    """A number of config.json, as ``int_key``."""
    value = hf.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json has {key} {value!r}; it must be a number")
    return float(value)


def bool_key(hf: Mapping[str, Any], key: str) -> bool:
    """A switch of config.json; missing or null is off."""
    value = hf.get(key) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json has {key} {value!r}; it must be true or false")
    return value


def rope_settings(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and the scaling object, None for plain rotary embeddings.

    Up to version 4 transformers wrote ``rope_theta`` and ``rope_scaling``; version 5 writes both
    in ``rope_parameters``.

    Raises:
        CheckpointError: One of them is of the wrong kind.
        UnsupportedCheckpointError: Rotary embeddings on a part of the head.
    """
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"config.json has rope_scaling {scaling!r}; it must be an object")
    scaling = dict(scaling)
    theta = number_key(scaling, "rope_theta", number_key(hf, "rope_theta", 10000.0))
    scaling.pop("rope_theta", None)
    for values in (hf, scaling):
        if (part := values.get("partial_rotary_factor")) not in (None, 1, 1.0):
            raise UnsupportedCheckpointError(f"partial_rotary_factor {part} is not implemented")
    scaling.pop("partial_rotary_factor", None)
    if (kind := scaling.get("rope_type", scaling.get("type"))) in (None, "default"):
        # Without a type, what is left says something that would be lost: a factor, or the angles
        # of each kind of layer under its name.
        if kind is None and scaling:
            raise UnsupportedCheckpointError(
                f"config.json has rotary scaling without a rope_type, {scaling!r}; add the type "
                "that the model was trained with"
            )
        return theta, None
    return theta, scaling
