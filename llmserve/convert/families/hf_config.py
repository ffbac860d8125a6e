"""Reads the keys of a Hugging Face config.json, each with its kind checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.errors import CheckpointError, UnsupportedCheckpointError


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


def optional_number_key(hf: Mapping[str, Any], key: str) -> float | None:
    """A number of config.json, None where it is missing or null."""
    return None if hf.get(key) is None else number_key(hf, key, 0.0)


def bool_key(hf: Mapping[str, Any], key: str) -> bool:
    """A switch of config.json; missing or null is off."""
    value = hf.get(key) or False
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json has {key} {value!r}; it must be true or false")
    return value


def check_key(hf: Mapping[str, Any], key: str, *implemented: Any) -> None:
    """Check a key that changes the arithmetic and has only these implemented values.

    Raises:
        UnsupportedCheckpointError: Another value.
    """
    if (value := hf.get(key, implemented[0])) not in implemented:
        raise UnsupportedCheckpointError(
            f"config.json has {key} {value!r}, which is not implemented for model_type "
            f"{hf.get('model_type')!r}; it must be {' or '.join(map(repr, implemented))}"
        )


def rope_object(hf: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of rotary embeddings in an object, empty where there is none.

    Up to version 4 transformers wrote ``rope_theta`` and ``rope_scaling``; version 5 writes both
    in ``rope_parameters``.

    Raises:
        CheckpointError: It is of the wrong kind, or there are two that differ.
    """
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(key) or {}, Mapping):
            raise CheckpointError(f"config.json has {key} {hf[key]!r}; it must be an object")
    scaling, parameters = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    if scaling and parameters and scaling != parameters:
        raise CheckpointError(
            f"config.json has rope_scaling {scaling!r} and rope_parameters {parameters!r}; keep "
            "one of them"
        )
    return dict(scaling or parameters)


def rope_settings(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and the scaling object, None for plain rotary embeddings.

    Raises:
        CheckpointError: One of them is of the wrong kind.
        UnsupportedCheckpointError: Rotary embeddings on a part of the head.
    """
    scaling = rope_object(hf)
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
