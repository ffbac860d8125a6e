"""``rotary_scaling``: Hugging Face's rope_scaling object, and which of them are implemented.

The type stands under ``rope_type`` (``type`` in older files). It knows the rules, not the angles:
those are the runtime's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmserve.errors import CheckpointError, UnsupportedCheckpointError

# The numbers that each type needs.
_REQUIRED_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}


def rope_type(scaling: Mapping[str, Any] | None) -> str:
    """The type of a rotary_scaling object: 'default' where there is none."""
    if scaling is None:
        return "default"
    return str(scaling.get("rope_type", scaling.get("type", "default")))


def check_rotary_scaling(scaling: Mapping[str, Any] | None, max_position_embeddings: int) -> None:
    """Check that a rotary_scaling object is one that the runtime computes.

    ``dynamic`` changes the angles of a sequence only once it is longer than
    original_max_position_embeddings, and then with every length anew, which a KV cache cannot
    follow. So it is taken for models that are never run beyond, where it does nothing.

    Raises:
        UnsupportedCheckpointError: Another type, or dynamic beyond its original length.
        CheckpointError: A number that the type needs is missing or not positive.
    """
    kind = rope_type(scaling)
    if kind not in _REQUIRED_KEYS:
        raise UnsupportedCheckpointError(
            f"rotary scaling of type {kind!r} is not implemented; these are: "
            f"{', '.join(_REQUIRED_KEYS)}"
        )
    if scaling is None:
        return
    for key in _REQUIRED_KEYS[kind]:
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise CheckpointError(
                f"rotary scaling {kind!r} has {key} {value!r}; it must be a positive number"
            )
    for key in ("mscale", "mscale_all_dim") if kind == "yarn" else ():
        if scaling.get(key) is not None:
            raise UnsupportedCheckpointError(
                f"rotary scaling 'yarn' with {key} {scaling[key]!r} is not implemented; leave it "
                "out"
            )
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise CheckpointError(
            "rotary scaling 'llama3': high_freq_factor must exceed low_freq_factor"
        )
    original = scaling.get("original_max_position_embeddings", max_position_embeddings)
    if kind == "dynamic" and max_position_embeddings > original:
        raise UnsupportedCheckpointError(
            f"rotary scaling 'dynamic' is implemented up to original_max_position_embeddings, "
            f"{original}; max_position_embeddings is {max_position_embeddings}"
        )
