"""What a conversion will write, worked out before any value is read.

Every plain TensorRT-LLM tensor is a concatenation of row blocks of Hugging Face tensors: q, k and v
one after the other, up and gate, one expert after the other. So a plan is a list of targets with
their sources, and whoever executes it needs to know nothing of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import EMBEDDING, FINAL_NORM, LM_HEAD, plain_tensors
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.convert.families.family import Family
from llmserve.errors import CheckpointError, UnsupportedCheckpointError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rows of a Hugging Face tensor, seen as a matrix with its last dimension as columns.

    Attributes:
        name: The tensor.
        rows: Half-open range; None: all of them.
    """

    name: str
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A plain tensor: not quantised, not sharded.

    Attributes:
        name: TensorRT-LLM's.
        spec: Its shape, and the dtype that values are rounded to.
        sources: Row blocks that make it up, in order.
        offset: Added to every value, before it is rounded.
    """

    name: str
    spec: TensorSpec
    sources: tuple[Source, ...]
    offset: float = 0.0


def make_plan(
    checkpoint: HuggingFaceCheckpoint, family: Family, config: PretrainedConfig
) -> list[Target]:
    """Find every target's sources, with names, shapes and dtypes checked.

    Returns:
        A target for each of ``plain_tensors(config)``, in that order.

    Raises:
        CheckpointError: A tensor is missing, left over, or of the wrong shape or dtype.
    """
    targets = plain_tensors(config)
    found = _match(checkpoint, family, config, targets)
    plan = []
    for name, spec in targets.items():
        sources = [part for item in found[name] for part in _parts(item, family)]
        is_norm = "norm" in name or name == FINAL_NORM
        offset = family.norm_offset if is_norm else 0.0
        plan.append(Target(name=name, spec=spec, sources=tuple(sources), offset=offset))
    return plan


class _Found(NamedTuple):
    """A Hugging Face tensor of a target: its name, the pattern it is filled in from, its shape."""

    name: str
    pattern: str
    shape: tuple[int, ...]


def _match(
    checkpoint: HuggingFaceCheckpoint,
    family: Family,
    config: PretrainedConfig,
    targets: dict[str, TensorSpec],
) -> dict[str, list[_Found]]:
    """The Hugging Face tensors of each target, in order; nothing is missing or left over."""
    unused = set(checkpoint.names())
    usual = names_by_target(family.tensors, config)
    other = names_by_target(family.other_spelling, config)
    found: dict[str, list[_Found]] = {}
    for target, spec in targets.items():
        named = usual[target]
        if any(name in unused for name, _ in other.get(target, ())):
            named = other[target]
        rows = source_rows(target, spec, len(named), config)
        found[target] = []
        for (name, pattern), count in zip(named, rows, strict=True):
            if name not in unused:
                raise CheckpointError(f"{checkpoint.path} lacks the tensor {name}")
            unused.remove(name)
            # A tensor of all experts has the target's shape, one of a single expert is a matrix.
            shape = (count, *spec.shape[-1:]) if len(spec.shape) > 1 else (count,)
            shape = spec.shape if len(spec.shape) > 2 and "{e}" not in pattern else shape
            _check_source(checkpoint, name, shape)
            found[target].append(_Found(name, pattern, shape))
    unused -= {name for name, _ in usual.get(None, ())}
    for lm_head, _ in usual[LM_HEAD]:
        if lm_head in unused:
            _check_tied(checkpoint, found[EMBEDDING][0].name, lm_head)
            unused.remove(lm_head)
    if unused:
        raise CheckpointError(_left_over(checkpoint, sorted(unused), config))
    return found


def names_by_target(
    table: Mapping[str, str | None], config: PretrainedConfig
) -> dict[str | None, list[tuple[str, str]]]:
    """A table with layers and experts filled in: the names of a target, each with its pattern."""
    experts = config.moe.num_experts if config.moe is not None else 0
    names: dict[str | None, list[tuple[int, str, str]]] = {}
    for pattern, target in table.items():
        for layer in range(config.num_hidden_layers) if "{i}" in pattern else (0,):
            place = target and target.replace("{i}", str(layer))
            for expert in range(experts) if "{e}" in pattern else (0,):
                name = pattern.replace("{i}", str(layer)).replace("{e}", str(expert))
                names.setdefault(place, []).append((expert, name, pattern))
    # Expert by expert; the sort is stable, so within one the order is the table's.
    return {
        place: [(name, pattern) for _, name, pattern in sorted(parts, key=lambda part: part[0])]
        for place, parts in names.items()
    }


def _parts(found: _Found, family: Family) -> list[Source]:
    """The rows of a tensor in the order of the target: gate and up change places."""
    if found.pattern not in family.swapped_halves:
        return [Source(name=found.name)]
    rows = math.prod(found.shape[:-1])
    half = rows // (2 * (found.shape[0] if len(found.shape) > 2 else 1))
    return [
        Source(name=found.name, rows=(begin, begin + half))
        for gate in range(0, rows, 2 * half)
        for begin in (gate + half, gate)
    ]


def source_rows(
    target: str, spec: TensorSpec, count: int, config: PretrainedConfig
) -> Sequence[int]:
    """Rows of each source of a target: the same number each, except for q, k and v."""
    rows = math.prod(spec.shape[:-1]) if len(spec.shape) > 1 else spec.shape[0]
    if count == 3 and ".attention.qkv." in target:
        kv = config.num_key_value_heads * config.head_size
        return (config.num_attention_heads * config.head_size, kv, kv)
    return (rows // max(count, 1),) * count


def _check_source(checkpoint: HuggingFaceCheckpoint, name: str, shape: tuple[int, ...]) -> None:
    spec = checkpoint.spec(name)
    if spec.shape != shape:
        raise CheckpointError(
            f"{name} in {checkpoint.file_of(name)} has shape {list(spec.shape)}; by config.json "
            f"it must be {list(shape)}"
        )
    if spec.dtype not in _FLOATS:
        raise UnsupportedCheckpointError(
            f"{name} in {checkpoint.file_of(name)} is {spec}; it must be floating point: convert "
            "the checkpoint before quantisation"
        )


def _check_tied(checkpoint: HuggingFaceCheckpoint, embedding: str, lm_head: str) -> None:
    """Some tied checkpoints store both; that loses nothing only where they are the same."""
    if not torch.equal(checkpoint.tensor(embedding), checkpoint.tensor(lm_head)):
        raise CheckpointError(
            f"config.json has tie_word_embeddings, yet {lm_head} differs from {embedding}: set "
            "tie_word_embeddings to false if the model was trained so"
        )


def _left_over(
    checkpoint: HuggingFaceCheckpoint, names: list[str], config: PretrainedConfig
) -> str:
    first, more = names[0], f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    layer = _LAYER.search(first)
    why = "the architecture has no place for it"
    if layer and int(layer[1]) >= config.num_hidden_layers:
        why = f"config.json has num_hidden_layers {config.num_hidden_layers}"
    elif first.endswith("_proj.bias"):
        why = "config.json has attention_bias or mlp_bias off"
    return f"{checkpoint.file_of(first)} has the tensor {first}{more} left over: {why}"
