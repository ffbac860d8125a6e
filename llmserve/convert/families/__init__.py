"""One file per Hugging Face ``model_type``, each with a ``FAMILY``.

A new family is a file of its model_type's name with a literal table of names, a line in
``MODEL_TYPES``, and a test that compares its logits with transformers': docs/families.md has the
recipe.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from llmserve.convert.families.family import Family
from llmserve.errors import UnsupportedCheckpointError

MODEL_TYPES = (
    *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
    *("gemma", "gemma2", "gemma3_text", "phi3"),
)
# Models with a text model in them that is one of ours.
_WRAPPERS = {
    "gemma3": "only the text model of Gemma 3 is implemented (gemma3_text): save it by itself with "
    "transformers, as docs/families.md shows, and convert that",
}


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config.json.

    Raises:
        UnsupportedCheckpointError: It is none of ours.
    """
    model_type, architectures = hf.get("model_type"), hf.get("architectures")
    if wrapped := _WRAPPERS.get(str(model_type)):
        raise UnsupportedCheckpointError(f"config.json has model_type {model_type!r}: {wrapped}")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    found = _load(str(model_type)) if model_type in MODEL_TYPES else None
    if found is None or architecture not in (None, found.architecture):
        known = ", ".join(f"{name} ({_load(name).architecture})" for name in MODEL_TYPES)
        raise UnsupportedCheckpointError(
            f"the architecture {architecture} (model_type {model_type!r}) is not implemented; "
            f"these are: {known}"
        )
    return found


def _load(model_type: str) -> Family:
    module = importlib.import_module(f"llmserve.convert.families.{model_type}")
    loaded: Family = module.FAMILY
    return loaded
