"""What a conversion will write, worked out before any value is read.

Every plain TensorRT-LLM tensor is a concatenation of row blocks of Hugging Face tensors: q, k and v
one after the other, up and gate, one expert after the other. So a plan is a list of targets with
their sources, and whoever executes it needs to know nothing of models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import EMBEDDING, LM_HEAD, plain_tensors
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
    sources = _match(checkpoint, family, config, targets)
    plan = []
    for name, spec in targets.items():
        parts = [Source(name=source) for source in sources[name]]
        if name.partition(".layers.")[2].partition(".")[2] in family.swapped_halves:
            rows = math.prod(spec.shape[:-1])
            halves = ((rows // 2, rows), (0, rows // 2))
            parts = [Source(name=parts[0].name, rows=half) for half in halves]
        is_norm = "norm" in name or name == "transformer.ln_f.weight"
        offset = family.norm_offset if is_norm else 0.0
        plan.append(Target(name=name, spec=spec, sources=tuple(parts), offset=offset))
    return plan


def _match(
    checkpoint: HuggingFaceCheckpoint,
    family: Family,
    config: PretrainedConfig,
    targets: dict[str, TensorSpec],
) -> dict[str, list[str]]:
    """The Hugging Face names of each target, in order; nothing is missing or left over."""
    unused = set(checkpoint.names())
    found: dict[str, list[tuple[int, str]]] = {name: [] for name in targets}
    for name, target, expert in _expanded(family, config):
        if target is None:
            unused.discard(name)
        elif target in targets:
            found[target].append((expert, name))
        elif target == LM_HEAD and name in unused:
            _check_tied(checkpoint, found[EMBEDDING][0][1], name)
            unused.discard(name)
    # Expert by expert; the sort is stable, so within one the order is the table's.
    sources = {
        target: [name for _, name in sorted(parts, key=lambda part: part[0])]
        for target, parts in found.items()
    }
    for target, names in sources.items():
        for name, rows in zip(names, _rows(target, targets, len(names), config), strict=True):
            if name not in unused:
                raise CheckpointError(f"{checkpoint.path} lacks the tensor {name}")
            unused.remove(name)
            spec = targets[target]
            shape = (rows, *spec.shape[-1:]) if len(spec.shape) > 1 else (rows,)
            _check_source(checkpoint, name, shape)
    if unused:
        raise CheckpointError(_left_over(checkpoint, sorted(unused), config))
    return sources


def _expanded(family: Family, config: PretrainedConfig) -> list[tuple[str, str | None, int]]:
    """The family's table with layers and experts filled in: name, target, expert."""
    experts = config.moe.num_experts if config.moe is not None else 0
    expanded: list[tuple[str, str | None, int]] = []
    for pattern, target in family.tensors.items():
        for layer in range(config.num_hidden_layers) if "{i}" in pattern else (0,):
            name = pattern.replace("{i}", str(layer))
            place = target and target.replace("{i}", str(layer))
            numbers = range(experts) if "{e}" in pattern else (0,)
            expanded += [(name.replace("{e}", str(e)), place, e) for e in numbers]
    return expanded


def _rows(
    target: str, targets: dict[str, TensorSpec], count: int, config: PretrainedConfig
) -> Sequence[int]:
    """Rows of each source of a target: the same number each, except for q, k and v."""
    shape = targets[target].shape
    rows = math.prod(shape[:-1]) if len(shape) > 1 else shape[0]
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
