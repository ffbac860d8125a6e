"""Reads a quantised Hugging Face checkpoint (ModelOpt's layout) as TensorRT-LLM's tensors.

Nothing is rounded twice where it need not be: 8-bit weights and their scales are put together as
they are. Only where linears that TensorRT-LLM has as one FP8 weight come under different scales, as
modelopt writes q, k and v, they are brought to the largest, as TensorRT-LLM and vLLM do when they
load them: a value x moves by at most the larger of |x| / 16 and that scale / 1024, half a step of
e4m3.
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.config_file import CONFIG_FILE, read_json_object
from llmserve.checkpoint.decoder_tensors import FINAL_NORM, layer_prefix, quantized_linear
from llmserve.checkpoint.huggingface import HuggingFaceCheckpoint
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.checkpoint.typed_json import json_object
from llmserve.config import KV_CACHE_QUANT_ALGOS as KV_CACHE_NAMES
from llmserve.config import QUANT_ALGOS as QUANT_NAMES
from llmserve.config import ConvertConfig
from llmserve.convert.families.family import Family
from llmserve.convert.hf_layout import (
    KEY_SCALE,
    KV_CACHE_QUANT_ALGOS,
    QUANT_ALGOS,
    QUANT_CONFIG_FILE,
    VALUE_SCALE,
    Part,
    attention_name,
    hf_parts,
)
from llmserve.errors import CheckpointError, ConfigError, UnsupportedCheckpointError
from llmserve.quantization import weight_format
from llmserve.quantization.kv_cache import KEY_SCALE as KEY_SUFFIX
from llmserve.quantization.kv_cache import SCALE, SCALES
from llmserve.quantization.kv_cache import VALUE_SCALE as VALUE_SUFFIX
from llmserve.quantization.layout import engine_tensors, follows, same_scale


def quantization_of(path: Path) -> dict[str, Any] | None:
    """The ``quantization`` object of a Hugging Face checkpoint in ModelOpt's layout, else None.

    Raises:
        CheckpointError: It says what is no object.
        UnsupportedCheckpointError: It is quantised in another way.
    """
    if (path / QUANT_CONFIG_FILE).is_file():
        said = read_json_object(path / QUANT_CONFIG_FILE)
        return dict(json_object(said.get("quantization"), f"{QUANT_CONFIG_FILE}'s quantization"))
    said = dict(
        json_object(
            read_json_object(path / CONFIG_FILE).get("quantization_config"), "quantization_config"
        )
    )
    if not said:
        return None
    if said.get("quant_method") != "modelopt":
        raise UnsupportedCheckpointError(
            f"config.json has a quantization_config of {said.get('quant_method')!r}: the weights "
            "are quantised already, in a way that is not implemented; convert the checkpoint that "
            "they were made from"
        )
    scheme = said.get("kv_cache_scheme")
    return {
        "quant_algo": said.get("quant_algo"),
        "kv_cache_quant_algo": "FP8" if scheme else None,
        "exclude_modules": said.get("ignore"),
    }


def imported_settings(quantization: dict[str, Any], asked: ConvertConfig) -> ConvertConfig:
    """The settings under which a quantised checkpoint becomes a TensorRT-LLM one: its own.

    Raises:
        ConfigError: Others are asked for.
        UnsupportedCheckpointError: A quantisation that is not implemented.
    """
    algo, kv = quantization.get("quant_algo"), quantization.get("kv_cache_quant_algo")
    if algo not in (None, *QUANT_ALGOS) or kv not in KV_CACHE_QUANT_ALGOS:
        raise UnsupportedCheckpointError(
            f"{QUANT_CONFIG_FILE} has quant_algo {algo!r} and kv_cache_quant_algo {kv!r}; "
            f"implemented are {', '.join(QUANT_ALGOS)}, and FP8 for the KV cache"
        )
    for name, value, neutral in (
        ("quant", asked.quant, "none"),
        ("kv_cache_dtype", asked.kv_cache_dtype, "auto"),
        ("checkpoint_format", asked.checkpoint_format, "tensorrt-llm"),
    ):
        if value != neutral:
            raise ConfigError(
                f"{name} is {value!r}, but the source is quantised already ({algo or kv}); leave "
                "it out, or start from the checkpoint that it was made from"
            )
    return dataclasses.replace(
        asked,
        quant=next(name for name, known in QUANT_NAMES.items() if known == algo),
        kv_cache_dtype=next(name for name, known in KV_CACHE_NAMES.items() if known == kv),
    )


class ImportedTensors:
    """A ``TensorSource`` of engine tensors over a quantised Hugging Face checkpoint.

    Args:
        checkpoint: The source; must stay open.
        family: Its family.
        config: Of the result.
        quantization: Of ``quantization_of``.

    Raises:
        CheckpointError: A tensor is missing, left over, or of the wrong shape or dtype.
        UnsupportedCheckpointError: Single linears are left unquantised.
    """

    def __init__(
        self,
        checkpoint: HuggingFaceCheckpoint,
        family: Family,
        config: PretrainedConfig,
        quantization: dict[str, Any],
    ) -> None:
        self._checkpoint, self._family, self._config = checkpoint, family, config
        self._parts = hf_parts(family, config)
        self._specs = engine_tensors(config)
        self._format = weight_format(config.quantization.quant_algo)
        self._check_excluded(quantization.get("exclude_modules") or [])
        self._check_names()

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._specs)

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self._specs:
            raise CheckpointError(f"{self._checkpoint.path} has no tensor for {name}")
        return self._specs[name]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, put together now.

        Raises:
            CheckpointError: There is no such tensor, it cannot be read, or holds NaN or infinity.
        """
        spec = self.spec(name)
        module, _, suffix = name.rpartition(".")
        if suffix in SCALES:
            return self._kv_scale(module.removesuffix(".attention"), suffix)
        owner, how = follows(self._config, name)
        if quantized_linear(self._config, owner) is None:
            tensor = self._rows(owner, spec)
            if self._family.norm_offset and ("norm" in owner or owner == FINAL_NORM):
                tensor = (tensor.float() + self._family.norm_offset).to(spec.dtype)
        elif suffix == "activation_scaling_factor":
            parts = [part for together in self._together(owner) for part in self._parts[together]]
            tensor = torch.stack([self._scale(f"{part.module}.input_scale") for part in parts])
            tensor = tensor.amax().reshape(spec.shape)
        elif how == "rows":
            tensor = self._rows(owner, spec, of="weight_scale")
        elif how == "nothing":
            tensor = self._largest_scales(owner).reshape(spec.shape)
        elif self._format.ROWWISE:
            tensor = self._rows(owner, spec)
        else:
            tensor = self._under_one_scale(owner, spec)
        if spec.dtype != torch.int8 and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{name} of {self._checkpoint.path} holds NaN or infinity")
        return tensor

    def _under_one_scale(self, owner: str, spec: TensorSpec) -> torch.Tensor:
        """An FP8 weight: what came under a smaller scale than the largest is brought to it."""
        largest, weights = self._largest_scales(owner), []
        for part in self._parts[owner]:
            weight, own = self._part(part, spec), self._scale(f"{part.module}.weight_scale")
            if not torch.equal(own, largest[part.expert]):
                weight = (weight.float() * (own / largest[part.expert])).to(spec.dtype)
            weights.append(weight)
        return torch.cat(weights).reshape(spec.shape)

    def _largest_scales(self, owner: str) -> torch.Tensor:
        """The largest weight_scale of each expert's parts, float32 (experts,) or (1,)."""
        scales: dict[int, torch.Tensor] = {}
        for part in (part for name in self._together(owner) for part in self._parts[name]):
            own = self._scale(f"{part.module}.weight_scale")
            scales[part.expert] = torch.maximum(own, scales.get(part.expert, own))
        return torch.stack([scales[expert] for expert in sorted(scales)])

    def _together(self, owner: str) -> tuple[str, ...]:
        """The weights that have one scale: fc and gate, which are one product."""
        return same_scale(self._config, owner)

    def _scale(self, name: str) -> torch.Tensor:
        """A scale of one value, float32 ()."""
        values = self._checkpoint.tensor(name).float().reshape(-1)
        if len(values) != 1:
            raise self._wrong_shape(name, "be of one value")
        return self._checked_scales(name, values)[0]

    def _checked_scales(self, name: str, scales: torch.Tensor) -> torch.Tensor:
        wrong = ~(torch.isfinite(scales) & (scales > 0))
        if bool(wrong.any()):
            raise CheckpointError(
                f"{name} in {self._checkpoint.file_of(name)} holds {float(scales[wrong][0])}; "
                "scales must be finite and above 0"
            )
        return scales

    def _rows(self, owner: str, spec: TensorSpec, of: str = "") -> torch.Tensor:
        """All parts of a plain tensor, or of the scales of its rows."""
        found = [self._part(part, spec, of) for part in self._parts[owner]]
        return (found[0] if len(found) == 1 else torch.cat(found)).reshape(spec.shape)

    def _part(self, part: Part, spec: TensorSpec, of: str = "") -> torch.Tensor:
        """A part's rows in the plain tensor's order, in the dtype of the result."""
        name = f"{part.module}.{of}" if of else part.name
        given, tensor = self._checkpoint.spec(name), self._checkpoint.tensor(name)
        if given.dtype != spec.dtype and not (
            given.dtype.is_floating_point and min(given.dtype.itemsize, spec.dtype.itemsize) > 1
        ):
            raise CheckpointError(
                f"{name} in {self._checkpoint.file_of(name)} is {given}; by {QUANT_CONFIG_FILE} "
                f"its dtype must be {str(spec.dtype).removeprefix('torch.')}"
            )
        if of:
            # (rows, 1) means the same to every reader.
            tensor = self._checked_scales(name, tensor.float().reshape(-1))
        columns = () if of else spec.shape[1:][-1:]
        if tensor.shape != (part.num_rows, *columns):
            raise self._wrong_shape(name, f"be {[part.num_rows, *columns]}")
        if len(part.rows) > 1:
            sizes = [stop - start for start, stop in part.rows]
            blocks = zip(part.rows, torch.split(tensor, sizes), strict=True)
            tensor = torch.cat([rows for _, rows in sorted(blocks, key=lambda block: block[0])])
        return tensor.to(spec.dtype)

    def _wrong_shape(self, name: str, wanted: str) -> CheckpointError:
        shape = list(self._checkpoint.spec(name).shape)
        return CheckpointError(
            f"{name} in {self._checkpoint.file_of(name)} has shape {shape}; it must {wanted}"
        )

    def _kv_scale(self, prefix: str, suffix: str) -> torch.Tensor:
        """A scale of K and V, at least 1 as in TensorRT-LLM's checkpoints (``kv_cache.scales``)."""
        layer = int(prefix.removeprefix(layer_prefix(0)[:-1]))
        key, value = (
            self._scale(f"{attention_name(layer)}.{name}").clamp(min=1.0)
            for name in (KEY_SCALE, VALUE_SCALE)
        )
        chosen = {KEY_SUFFIX: key, VALUE_SUFFIX: value, SCALE: torch.maximum(key, value)}
        return chosen[suffix].reshape(1)

    def _check_excluded(self, patterns: list[str]) -> None:
        modules = [
            part.module
            for target, parts in self._parts.items()
            if quantized_linear(self._config, target)
            for part in parts
        ]
        for module in modules:
            if hit := next((p for p in patterns if fnmatchcase(module, p)), None):
                raise UnsupportedCheckpointError(
                    f"{QUANT_CONFIG_FILE} excludes {module} ({hit!r}); single linears that are not "
                    "quantised are not implemented"
                )

    def _check_names(self) -> None:
        expected = {part.name for parts in self._parts.values() for part in parts}
        suffixes = {"FP8": ("weight_scale", "input_scale"), None: ()}.get(
            self._config.quantization.quant_algo, ("weight_scale",)
        )
        for target, parts in self._parts.items():
            if quantized_linear(self._config, target):
                expected |= {f"{part.module}.{suffix}" for part in parts for suffix in suffixes}
        if self._config.quantization.kv_cache_quant_algo is not None:
            for layer in range(self._config.num_hidden_layers):
                attention = attention_name(layer)
                expected |= {f"{attention}.{KEY_SCALE}", f"{attention}.{VALUE_SCALE}"}
        found = set(self._checkpoint.names())
        if missing := sorted(expected - found):
            raise CheckpointError(f"{self._checkpoint.path} lacks the tensor {missing[0]}")
        tied = {"lm_head.weight"} if self._config.share_embedding_table else set()
        if extra := sorted(found - expected - tied):
            raise CheckpointError(
                f"{self._checkpoint.path} has the tensor {extra[0]} left over: "
                f"{QUANT_CONFIG_FILE} and config.json have no place for it"
            )
