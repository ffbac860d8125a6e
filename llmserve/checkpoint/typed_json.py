"""JSON objects -> the fields of a dataclass, with a value of the wrong kind refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from llmserve.errors import CheckpointError

# By a field's annotation: the kinds of JSON value it takes, and the word for them.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a string"),
    "str | None": ((str,), "a string or null"),
    "dict[str, Any] | None": ((dict,), "an object or null"),
    "list[str] | None": ((list,), "a list of strings or null"),
    "list[float] | None": ((list,), "a list of numbers or null"),
    "int | None": ((int,), "a whole number or null"),
    "float | None": ((int, float), "a number or null"),
}
_ITEMS: dict[str, tuple[type, ...]] = {
    "list[str] | None": (str,),
    "list[float] | None": (int, float),
}


def typed(cls: type, data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``data`` with every value checked against the annotation of the field of its name.

    A null counts as not given: TensorRT-LLM writes it for a default.

    Args:
        cls: A dataclass whose annotations are in ``_KINDS``; fields of other types are left out.
        data: A JSON object; keys that are no field are left alone.
        prefix: Put before a field's name in an error, e.g. 'quantization.'.

    Raises:
        CheckpointError: A value of the wrong kind.
    """
    values: dict[str, Any] = {}
    for spec in fields(cls):
        value: Any = data.get(spec.name)
        if value is None or str(spec.type) not in _KINDS:
            continue
        kinds, wanted = _KINDS[str(spec.type)]
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if items := _ITEMS.get(str(spec.type)):
            fits = fits and all(isinstance(v, items) and not isinstance(v, bool) for v in value)
        if not fits:
            raise CheckpointError(f"{prefix}{spec.name} is {value!r}; it must be {wanted}")
        values[spec.name] = float(value) if str(spec.type).startswith("float") else value
    return values


def json_object(value: Any, name: str) -> Mapping[str, Any]:
    """``value`` if it is an object, an empty one if it is null.

    Raises:
        CheckpointError: It is neither.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{name} is {value!r}; it must be an object")
    return value
