"""A checkpoint's tensors seen as an engine's: what TensorRT-LLM quantises at load is quantised.

``build`` writes what this shows; whoever measures a checkpoint runs it without building.
"""

from __future__ import annotations

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.errors import CheckpointError
from llmserve.quantization import weight_format
from llmserve.quantization.layout import engine_tensors, follows, stored_tensors


class EngineTensors:
    """A ``TensorSource`` of an engine's tensors.

    Args:
        source: A checkpoint's tensors: the whole model's, or one rank's.
        config: Its config.json.
    """

    def __init__(self, source: TensorSource, config: PretrainedConfig) -> None:
        self._source = source
        self._format = weight_format(config.quantization.quant_algo)
        specs = stored_tensors(config, source.names())
        # By name in the engine, the weight that the checkpoint holds plain: W8A16's form A.
        self._weights: dict[str, str] = {}
        for name, spec in engine_tensors(config).items():
            if specs.get(name) != spec:
                self._weights[name] = follows(config, name)[0]
        self._names = sorted(engine_tensors(config))
        self._last: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self._weights:
            return self._source.spec(name)
        plain = self._source.spec(self._weights[name])
        return self._format.stored(plain.shape, plain.dtype)[name.rpartition(".")[2]].spec

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, quantised now if the checkpoint holds its weight plain.

        Raises:
            CheckpointError: There is no such tensor, it cannot be read, or is not finite.
        """
        if name not in self._weights:
            return self._source.tensor(name)
        weight = self._weights[name]
        # A weight and its scales are asked for one after the other: one of them is kept.
        if self._last[0] != weight:
            try:
                self._last = (weight, self._format.quantize(self._source.tensor(weight)))
            except CheckpointError as error:
                raise CheckpointError(f"{weight}: {error}") from error
        return self._last[1][name.rpartition(".")[2]]
