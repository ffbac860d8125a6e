"""A Hugging Face checkpoint seen under TensorRT-LLM's names: not quantised, not sharded.

What calibration and quality measurements run on, without anything being written first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.convert.plan import Source, Target
from llmserve.errors import CheckpointError


class PlainTensors:
    """A ``TensorSource`` of a plan's targets.

    Args:
        checkpoint: What the plan was made for; must stay open.
        plan: Of ``make_plan``.
    """

    def __init__(self, checkpoint: HuggingFaceCheckpoint, plan: Sequence[Target]) -> None:
        self._checkpoint = checkpoint
        self._targets = {target.name: target for target in plan}

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._targets)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor.

        Raises:
            CheckpointError: There is no such tensor.
        """
        return self._target(name).spec

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, put together now.

        Raises:
            CheckpointError: There is no such tensor, it cannot be read, or holds NaN, infinity or
                what is infinite in the plan's dtype.
        """
        target = self._target(name)
        if len(target.sources) == 1:
            return self._rows(target.sources[0], target).reshape(target.spec.shape)
        whole = torch.empty(target.spec.shape, dtype=target.spec.dtype)
        rows = whole.view(-1, *target.spec.shape[-1:]) if whole.ndim > 1 else whole
        begin = 0
        for source in target.sources:
            part = self._rows(source, target)
            rows[begin : begin + len(part)] = part
            begin += len(part)
        return whole

    def _target(self, name: str) -> Target:
        if name not in self._targets:
            raise CheckpointError(f"{self._checkpoint.path} has no tensor for {name}")
        return self._targets[name]

    def _rows(self, source: Source, target: Target) -> torch.Tensor:
        tensor = self._checkpoint.tensor(source.name)
        if tensor.ndim > 1:
            tensor = tensor.reshape(-1, tensor.shape[-1])
        if source.rows is not None:
            tensor = tensor[source.rows[0] : source.rows[1]]
        result = (tensor.float() + target.offset if target.offset else tensor).to(target.spec.dtype)
        # Extremes tell as much as isfinite() would, without a tensor of flags: NaN is both of them.
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(result)):
            raise CheckpointError(
                not_finite(self._checkpoint, source.name, tensor, target.spec.dtype)
            )
        return result


def not_finite(
    checkpoint: HuggingFaceCheckpoint, name: str, tensor: torch.Tensor, dtype: torch.dtype
) -> str:
    """The sentence about a tensor that is not finite, or is not any more in ``dtype``."""
    if all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
        wider = "bfloat16" if dtype == torch.float16 else "float32"
        return (
            f"{name} in {checkpoint.file_of(name)} has values beyond "
            f"{str(dtype).removeprefix('torch.')}'s largest; convert with dtype {wider}"
        )
    return f"{name} in {checkpoint.file_of(name)} holds NaN or infinity"
