"""Calibration: the ranges of activations on representative text, through the native runtime.

As nvidia-modelopt's "max" calibration: the largest magnitude over all tokens, taken in the dtype
that the model computes in. It sees real tokens alone: nothing is padded. An expert counts the
tokens that are routed to it, and all experts of a linear have one range, as they have one scale.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import layer_linears, layer_prefix, torch_dtype
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.convert.samples import Samples
from llmserve.errors import CheckpointError
from llmserve.runtime.torch.layerwise import LayerwiseModel, token_groups
from llmserve.runtime.torch.runner import resolve_device

RANGES_FILE = "activation_ranges.safetensors"

# Hidden states that are held at a time: 512 samples of 512 tokens of a model of 4096 in bfloat16.
_MAX_HIDDEN_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class ActivationRanges:
    """Largest magnitudes of activations.

    Attributes:
        inputs: By linear, e.g. 'transformer.layers.0.mlp.fc': float32 (in,), of each input channel.
        keys: float32 (layers,): of K, after the rotary embedding: what a KV cache holds.
        values: float32 (layers,): of V.
        qkv_outputs: float32 (layers, 3): of q, k and v as the linear gives them.
    """

    inputs: Mapping[str, torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor
    qkv_outputs: torch.Tensor

    def input_amax(self, linear: str) -> torch.Tensor:
        """float32 (in,) of a linear.

        Raises:
            CheckpointError: It was not calibrated.
        """
        if linear not in self.inputs:
            raise CheckpointError(f"there is no activation range of {linear}; calibrate again")
        return self.inputs[linear]

    def save(self, path: Path) -> None:
        """Write them as safetensors: ``{linear}.input_amax``, and the other three by name.

        The file appears whole: a conversion that is stopped goes on with what is there.

        Raises:
            OSError: The file system refuses.
        """
        tensors = {f"{linear}{_SUFFIX}": amax for linear, amax in self.inputs.items()}
        tensors |= {name: getattr(self, name) for name in _OF_LAYERS}
        draft = path.with_name(f".{path.name}.tmp")
        # fc and gate have one range between them, and safetensors refuses shared memory.
        content = save({name: tensor.clone() for name, tensor in tensors.items()})
        with draft.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    @classmethod
    def load(cls, path: Path, config: PretrainedConfig) -> ActivationRanges:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: The file cannot be read, is of another model than ``config``'s, or
                holds what is no magnitude.
        """
        specs = _specs(config)
        with RankReader(path) as reader:
            for name in sorted(specs.keys() | set(reader.names())):
                given = reader.spec(name) if name in reader.names() else None
                if given != specs.get(name):
                    raise CheckpointError(
                        f"{path} is not of this model: {name} is {given or 'missing'} there and "
                        f"must be {specs.get(name, 'missing')}"
                    )
            tensors = {name: reader.tensor(name).clone() for name in specs}
        for name, amax in tensors.items():
            if wrong := [value for value in amax.flatten().tolist() if not 0 <= value < math.inf]:
                raise CheckpointError(
                    f"{path} holds {wrong[0]} in {name}; magnitudes must be finite and at least 0"
                )
        of_layers = {name: tensors.pop(name) for name in _OF_LAYERS}
        inputs = {name.removesuffix(_SUFFIX): amax for name, amax in tensors.items()}
        return cls(inputs=inputs, **of_layers)


_SUFFIX = ".input_amax"
_OF_LAYERS = ("keys", "values", "qkv_outputs")


def calibrate(
    source: TensorSource,
    config: PretrainedConfig,
    samples: Samples,
    *,
    device: str = "auto",
    report: Report = no_report,
) -> ActivationRanges:
    """Run the unquantised model over samples and keep the largest magnitudes.

    Args:
        source: The plain tensors of the whole model (``PlainTensors``).
        config: Its config.json; quantisation and ranks in it do not matter.
        samples: What to run.
        device: As the runtime's: 'auto', 'cpu', 'cuda' or 'cuda:N'.
        report: Told after every layer, as stage 'calibrate'.

    Raises:
        ConfigError: A sequence is longer than the model's context, or there is no such device.
        CheckpointError: A tensor cannot be read, or the model computes NaN or infinity.
    """
    config = plain_config(config)
    model = LayerwiseModel(source, config, device=resolve_device(device))
    ranges = _Collector(config)
    token_bytes = config.hidden_size * torch_dtype(config.dtype).itemsize
    for group in token_groups(samples.sequences, _MAX_HIDDEN_BYTES // token_bytes):
        model.hidden_states(group, ranges, stage="calibrate", report=report)
    return ranges.result()


def plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config.json of the same model, of one rank and not quantised."""
    return replace(single_rank(config), quantization=QuantConfig())


def single_rank(config: PretrainedConfig) -> PretrainedConfig:
    """The config.json of the same model, of one rank."""
    return replace(config, mapping=type(config.mapping)(), use_parallel_embedding=False)


class _Collector:
    """An ``Observer`` that keeps largest magnitudes."""

    def __init__(self, config: PretrainedConfig) -> None:
        self._config = config
        layers = range(config.num_hidden_layers)
        self._inputs = {
            f"{layer_prefix(i)}.{name}": torch.zeros(linear.weight[-1])
            for i in layers
            for name, linear in layer_linears(config).items()
        }
        self._keys = torch.zeros(len(layers))
        self._values = torch.zeros(len(layers))
        self._qkv = torch.zeros(len(layers), 3)

    def saw_linear(self, layer: int, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        # 'mlp.fc.3' is an expert of 'mlp.fc'.
        linear = f"{layer_prefix(layer)}.{'.'.join(name.split('.')[:2])}"
        amax = self._inputs[linear]
        torch.maximum(amax, _amax(x, f"the inputs of {linear}"), out=amax)
        if name == "attention.qkv":
            kv = self._config.num_key_value_heads * self._config.head_size
            parts = y[:, : -2 * kv], y[:, -2 * kv : -kv], y[:, -kv:]
            for part, values in enumerate(parts):
                amax = _amax(values, f"the outputs of {linear}").amax()
                self._qkv[layer, part] = torch.maximum(self._qkv[layer, part], amax)

    def saw_key_value(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        for kept, seen, what in ((self._keys, key, "K"), (self._values, value, "V")):
            amax = _amax(seen, f"{what} of layer {layer}").amax()
            kept[layer] = torch.maximum(kept[layer], amax)

    def result(self) -> ActivationRanges:
        """What was seen; fc and gate, which run as one linear, have one range."""
        for name in self._inputs:
            if name.endswith(".mlp.gate"):
                self._inputs[name] = self._inputs[f"{name.removesuffix('gate')}fc"]
        return ActivationRanges(self._inputs, self._keys, self._values, self._qkv)


def _amax(values: torch.Tensor, what: str) -> torch.Tensor:
    """float32 (columns,) on the CPU.

    Raises:
        CheckpointError: There is NaN or infinity.
    """
    low, high = torch.aminmax(values, dim=0)
    amax = torch.maximum(-low, high).float().cpu()
    if not bool(torch.isfinite(amax).all()):
        raise CheckpointError(
            f"the model computes NaN or infinity in {what}; check the checkpoint, or "
            "convert with dtype bfloat16"
        )
    return amax


def _specs(config: PretrainedConfig) -> dict[str, TensorSpec]:
    layers = config.num_hidden_layers
    specs = {
        f"{layer_prefix(i)}.{name}{_SUFFIX}": TensorSpec(linear.weight[-1:], torch.float32)
        for i in range(layers)
        for name, linear in layer_linears(config).items()
    }
    specs |= {name: TensorSpec((layers,), torch.float32) for name in ("keys", "values")}
    specs["qkv_outputs"] = TensorSpec((layers, 3), torch.float32)
    return specs
