"""The ``quantization`` object of a TensorRT-LLM config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from llmserve.checkpoint.typed_json import typed
from llmserve.config import KV_CACHE_QUANT_ALGOS, QUANT_ALGOS
from llmserve.errors import CheckpointError, UnsupportedCheckpointError

# What TensorRT-LLM leaves alone where a config.json gives no exclude_modules of its own.
DEFAULT_EXCLUDE_MODULES = (
    "*lm_head",
    "*router",
    "*vocab_embedding",
    "*position_embedding",
    "*block_embedding",
    "*shared_expert_gate",
)
# FP8 rowwise turns whole attention, MLP and norm modules into FP8 ones; the last norm must not be.
FP8_ROWWISE_EXCLUDE_MODULES = ("*ln_f", "*ln_embed", "*lm_head")

# The newest TensorRT-LLM writes it as null; older ones raise on it, so it is never written here.
_OF_OTHER_MODELS = frozenset({"mamba_ssm_cache_dtype"})
_UNIMPLEMENTED_QUANTIZATION: dict[str, Any] = {
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """The ``quantization`` object. TensorRT-LLM raises on an unknown key here, and so do we.

    Attributes:
        quant_algo: One of ``config.QUANT_ALGOS``, None: not quantised.
        kv_cache_quant_algo: 'INT8', 'FP8' or None: K and V in the model's dtype.
        smoothquant_val: SmoothQuant's alpha: how much of the activations' range moves into the
            weights. Used by W8A8_SQ_PER_CHANNEL alone.
        exclude_modules: Leave None for W8A16: a list replaces TensorRT-LLM's defaults.
        clamp_val: [-1200.0, 1200.0] in FP8 rowwise checkpoints, as convert_checkpoint writes it.
    """

    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int = 128
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    use_meta_recipe: bool = False
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list[str] | None = None

    def quantizes(self, linear: str) -> bool:
        """Whether the weight of a decoder layer's linear is quantised, by TensorRT-LLM's rules.

        ``exclude_modules`` are fnmatchcase patterns on the linear's name. W8A16 matches them
        against its weight's name as well; FP8 rowwise converts modules whole, so there they are
        matched against the attention or MLP that the linear is in.

        Args:
            linear: e.g. 'transformer.layers.0.attention.qkv'.
        """
        if self.quant_algo is None:
            return False
        patterns: Sequence[str] = DEFAULT_EXCLUDE_MODULES
        names = [linear]
        if self.quant_algo == "W8A16":
            names.append(f"{linear}.weight")
        elif self.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN":
            patterns, names = FP8_ROWWISE_EXCLUDE_MODULES, [linear.rpartition(".")[0]]
        if self.exclude_modules is not None:
            patterns = self.exclude_modules
        return not any(fnmatchcase(name, pattern) for name in names for pattern in patterns)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> QuantConfig:
        """Read the ``quantization`` object.

        Raises:
            CheckpointError: An unknown key, or a value of the wrong kind.
            UnsupportedCheckpointError: A quantisation that is not implemented.
        """
        known = {f.name for f in fields(cls)}
        for name in _OF_OTHER_MODELS & data.keys():
            if (value := data[name]) is not None:
                raise UnsupportedCheckpointError(
                    f"quantization.{name} {value!r} is not implemented"
                )
        if unknown := sorted(set(data) - known - _OF_OTHER_MODELS):
            raise CheckpointError(
                f"quantization has the unknown key {unknown[0]!r}; known are {', '.join(known)}"
            )
        config = cls(**typed(cls, data, "quantization."))
        if config.quant_algo not in (None, *filter(None, QUANT_ALGOS.values())):
            known_algos = ", ".join(str(algo) for algo in QUANT_ALGOS.values())
            raise UnsupportedCheckpointError(
                f"quantization.quant_algo {config.quant_algo!r} is not implemented; these are: "
                f"{known_algos}"
            )
        if config.kv_cache_quant_algo not in KV_CACHE_QUANT_ALGOS.values():
            known_algos = ", ".join(str(algo) for algo in KV_CACHE_QUANT_ALGOS.values())
            raise UnsupportedCheckpointError(
                f"quantization.kv_cache_quant_algo {config.kv_cache_quant_algo!r} is not "
                f"implemented; these are: {known_algos}"
            )
        for name, neutral in _UNIMPLEMENTED_QUANTIZATION.items():
            if (value := getattr(config, name)) != neutral:
                raise UnsupportedCheckpointError(
                    f"quantization.{name} {value!r} is not implemented"
                )
        return config
