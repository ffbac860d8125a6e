"""Which layers see a sliding window, as TensorRT-LLM's config.json can say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.convert.families.hf_config import int_key
from llmserve.errors import CheckpointError, UnsupportedCheckpointError

_SLIDING, _FULL = "sliding_attention", "full_attention"


def sliding_window(hf: Mapping[str, Any]) -> int | None:
    """``sliding_window`` of config.json: tokens that a layer sees, its own included; None: all."""
    return None if hf.get("sliding_window") is None else int_key(hf, "sliding_window")


def windows(
    hf: Mapping[str, Any],
    window: int | None,
    *,
    pattern: int | None = None,
    max_window_layers: int | None = None,
) -> dict[str, int | None]:
    """The keys of a ``PretrainedConfig`` that say which layers slide.

    Newer versions of transformers list every layer in ``layer_types``, and then that list counts.

    Args:
        hf: Hugging Face's config.json.
        window: Tokens that a sliding layer sees; None: there are no sliding layers.
        pattern: The family's rule, where there is no list: every so many-th layer sees everything.
        max_window_layers: The family's rule: the first so many layers see everything.

    Returns:
        ``sliding_window``, ``sliding_window_pattern`` and ``max_window_layers``.

    Raises:
        CheckpointError: ``layer_types`` is not a list of one word a layer, or has sliding layers
            without a window.
        UnsupportedCheckpointError: Another kind of layer, or an order of them that the three keys
            cannot say.
    """
    rule = {"sliding_window_pattern": pattern, "max_window_layers": max_window_layers}
    none = dict.fromkeys(("sliding_window", *rule))
    types, layers = hf.get("layer_types"), int_key(hf, "num_hidden_layers")
    if types is None:
        return none if window is None else {"sliding_window": window, **rule}
    if not isinstance(types, list) or len(types) != layers:
        raise CheckpointError(
            f"config.json has layer_types {types!r}; it must be a list of num_hidden_layers, "
            f"{layers}, names"
        )
    if unknown := [kind for kind in types if kind not in (_SLIDING, _FULL)]:
        raise UnsupportedCheckpointError(
            f"config.json has a layer of type {unknown[0]!r} in layer_types; "
            f"implemented are {_SLIDING} and {_FULL}"
        )
    if _SLIDING not in types:
        return none
    if window is None:
        raise CheckpointError(
            f"config.json has {_SLIDING} in layer_types and no sliding_window; add its tokens"
        )
    if types != _layer_types(layers, **rule):
        rule = _rule_of(types)
    return {"sliding_window": window, **rule}


def _layer_types(
    layers: int, *, sliding_window_pattern: int | None, max_window_layers: int | None
) -> list[str]:
    pattern, first = sliding_window_pattern, max_window_layers or 0
    return [
        _FULL if layer < first or (pattern and (layer + 1) % pattern == 0) else _SLIDING
        for layer in range(layers)
    ]


def _rule_of(types: list[str]) -> dict[str, int | None]:
    """The pattern or the max_window_layers that say the same as a list with sliding layers."""
    rules: list[dict[str, int | None]] = [
        {"sliding_window_pattern": None, "max_window_layers": types.index(_SLIDING)}
    ]
    if _FULL in types:
        rules.append({"sliding_window_pattern": types.index(_FULL) + 1, "max_window_layers": None})
    for rule in rules:
        if types == _layer_types(len(types), **rule):
            return rule
    raise UnsupportedCheckpointError(
        "config.json has layer_types in an order that is not implemented; either every n-th layer "
        f"is {_FULL}, or the first n are"
    )
