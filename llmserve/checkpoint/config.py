"""config.json of a TensorRT-LLM checkpoint, and the same inside an engine's, as a dataclass.

The keys and defaults are TensorRT-LLM 1.2's ``PretrainedConfig``. Only what llmserve understands is
kept; a key that changes the model's arithmetic and is not understood is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any

from llmserve.checkpoint.rotary_scaling import check_rotary_scaling
from llmserve.config import QUANT_ALGOS
from llmserve.errors import CheckpointError, UnsupportedCheckpointError

DTYPES = ("float16", "bfloat16", "float32")
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

# Keys that other writers add and that say nothing about the arithmetic. TensorRT-LLM copies
# tie_word_embeddings from its source and never reads it: tied is what has no lm_head.
_DESCRIPTIVE_KEYS = frozenset(
    {"producer", "runtime_defaults", "disable_weight_only_quant_plugin", "bos_token_id"}
    | {"eos_token_id", "pad_token_id", "decoder", "tie_word_embeddings"}
)
# Keys of features that are not implemented, with the values under which they do nothing: those of
# TensorRT-LLM's Llama, which writes them all, and of modelopt's own description of a decoder.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "residual_mlp": (False,),
    "remove_duplicated_kv_heads": (False,),
    "fc_after_embed": (False,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "layer_idx_offset": (0,),
    "embedding_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "output_multiplier_scale": (None, 1, 1.0),
    "has_partial_lora_mask": (False,),
    "use_prompt_tuning": (False,),
    "rotary_pct": (1, 1.0),
    "rank": (0,),
    "rmsnorm": (True,),
    "bias": (False,),
    "lm_head_bias": (False,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """The ``quantization`` object. TensorRT-LLM raises on an unknown key here, and so do we.

    Attributes:
        quant_algo: None, 'W8A16' or 'FP8_PER_CHANNEL_PER_TOKEN'.
        kv_cache_quant_algo: None: K and V in the model's dtype.
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

        ``exclude_modules`` are fnmatchcase patterns. W8A16 matches them against the linear's name
        and its weight's; FP8 rowwise converts modules whole, so there they are matched against
        the attention or MLP that the linear is in.

        Args:
            linear: e.g. 'transformer.layers.0.attention.qkv'.
        """
        if self.quant_algo is None:
            return False
        patterns: Sequence[str] = DEFAULT_EXCLUDE_MODULES
        names = [linear, f"{linear}.weight"]
        if self.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN":
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
        if unknown := sorted(set(data) - known):
            raise CheckpointError(
                f"quantization has the unknown key {unknown[0]!r}; known are {', '.join(known)}"
            )
        config = cls(**_typed(cls, data, "quantization."))
        if config.quant_algo not in (None, *filter(None, QUANT_ALGOS.values())):
            known_algos = ", ".join(str(algo) for algo in QUANT_ALGOS.values())
            raise UnsupportedCheckpointError(
                f"quantization.quant_algo {config.quant_algo!r} is not implemented; these are: "
                f"{known_algos}"
            )
        for name, neutral in _UNIMPLEMENTED_QUANTIZATION.items():
            if (value := getattr(config, name)) != neutral:
                raise UnsupportedCheckpointError(
                    f"quantization.{name} {value!r} is not implemented"
                )
        return config


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelMapping:
    """The ``mapping`` object: how many ranks. Only one rank for now."""

    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    gpus_per_node: int = 8

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParallelMapping:
        """Read the ``mapping`` object; with one rank, its other keys have nothing to say.

        Raises:
            CheckpointError: A value of the wrong kind.
            UnsupportedCheckpointError: More than one rank.
        """
        known = {f.name for f in fields(cls)}
        kept = {key: value for key, value in data.items() if key in known}
        mapping = cls(**_typed(cls, kept, "mapping."))
        for name in ("world_size", "tp_size", "pp_size", "cp_size"):
            if (size := getattr(mapping, name)) != 1:
                raise UnsupportedCheckpointError(
                    f"mapping.{name} is {size}; only checkpoints of one rank are implemented: "
                    "convert again with tp_size 1 and pp_size 1"
                )
        return mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedConfig:
    """A decoder as TensorRT-LLM describes it. Sizes in elements.

    Attributes:
        architecture: e.g. 'LlamaForCausalLM'.
        dtype: 'float16', 'bfloat16' or 'float32': weights that are not quantised, activations, KV.
        head_size: Elements of one head; need not be hidden_size / num_attention_heads.
        rotary_base: rope theta.
        rotary_scaling: Hugging Face's rope_scaling verbatim, or None.
        attn_bias: Biases on qkv (and, in Llama, on dense).
        mlp_bias: Biases on fc, gate and proj.
        share_embedding_table: lm_head is the embedding: the checkpoint has no lm_head.weight.
    """

    architecture: str
    dtype: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int
    intermediate_size: int
    head_size: int
    max_position_embeddings: int
    hidden_act: str = "silu"
    norm_epsilon: float = 1e-5
    logits_dtype: str = "float32"
    position_embedding_type: str = "rope_gpt_neox"
    rotary_base: float = 10000.0
    rotary_scaling: dict[str, Any] | None = None
    attn_bias: bool = False
    mlp_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    share_embedding_table: bool = False
    mapping: ParallelMapping = field(default_factory=ParallelMapping)
    quantization: QuantConfig = field(default_factory=QuantConfig)

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PretrainedConfig:
        """Read config.json's object (an engine's ``pretrained_config`` is the same).

        Raises:
            CheckpointError: A required key is missing, or has a value of the wrong kind.
            UnsupportedCheckpointError: A key or value that is not implemented.
        """
        data = dict(data)
        _drop_neutral_keys(data)
        rotary_embedding_dim = data.pop("rotary_embedding_dim", None)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UnsupportedCheckpointError(
                f"config.json has the key {unknown[0]!r} ({data[unknown[0]]!r}), which is not "
                "implemented"
            )
        missing = [name for name in _REQUIRED_KEYS if data.get(name) is None]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}")
        quantization = QuantConfig.from_dict(_object(data.pop("quantization", {}), "quantization"))
        mapping = ParallelMapping.from_dict(_object(data.pop("mapping", {}), "mapping"))
        # TensorRT-LLM's defaults where they differ from this class's, which are Llama's.
        data.setdefault("hidden_act", "gelu")
        data.setdefault("position_embedding_type", "learned_absolute")
        values = _typed(cls, data, "")
        if values["num_attention_heads"] <= 0:
            raise CheckpointError(
                f"num_attention_heads is {values['num_attention_heads']}; it must be positive"
            )
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
        values.setdefault("head_size", values["hidden_size"] // values["num_attention_heads"])
        config = cls(quantization=quantization, mapping=mapping, **values)
        config._check()
        if rotary_embedding_dim not in (None, config.head_size):
            raise UnsupportedCheckpointError(
                f"rotary_embedding_dim {rotary_embedding_dim!r} is not implemented; it must be "
                f"head_size, {config.head_size}"
            )
        return config

    def _check(self) -> None:
        """Raise UnsupportedCheckpointError or CheckpointError for values that cannot be run."""
        implemented: dict[str, tuple[Any, ...]] = {
            "architecture": ("LlamaForCausalLM",),
            "dtype": DTYPES,
            "logits_dtype": DTYPES,
            "hidden_act": ("silu",),
            "position_embedding_type": ("rope_gpt_neox",),
            "qk_layernorm": (False,),
        }
        for name, choices in implemented.items():
            if (value := getattr(self, name)) not in choices:
                raise UnsupportedCheckpointError(
                    f"{name} {value!r} is not implemented; it must be one of "
                    f"{', '.join(map(str, choices))}"
                )
        for name in _POSITIVE_KEYS:
            if getattr(self, name) <= 0:
                raise CheckpointError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.num_hidden_layers > _MAX_LAYERS:
            raise CheckpointError(
                f"num_hidden_layers is {self.num_hidden_layers}; it must be at most {_MAX_LAYERS}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.head_size % 2:
            raise CheckpointError(f"head_size is {self.head_size}; rotary embeddings need it even")
        check_rotary_scaling(self.rotary_scaling, self.max_position_embeddings)


_REQUIRED_KEYS = (
    *("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "max_position_embeddings"),
)
_POSITIVE_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "intermediate_size", "head_size", "max_position_embeddings"),
    *("norm_epsilon", "rotary_base"),
)
_UNIMPLEMENTED_QUANTIZATION: dict[str, Any] = {
    "kv_cache_quant_algo": None,
    "use_meta_recipe": False,
    "has_zero_point": False,
    "pre_quant_scale": False,
}
# Every layer's tensors are listed by name: a damaged number must not fill the memory with names.
_MAX_LAYERS = 10_000
# By a field's annotation: the kinds of JSON value it takes, and the word for them.
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "bool": ((bool,), "true or false"),
    "str": ((str,), "a string"),
    "str | None": ((str,), "a string or null"),
    "dict[str, Any] | None": ((dict,), "an object or null"),
    "list[str] | None": ((list,), "a list of strings or null"),
    "list[float] | None": ((list,), "a list or null"),
}


def _typed(cls: type, data: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``data`` with every value checked against the annotation of the field of its name.

    A null where the field takes none counts as not given: TensorRT-LLM writes it for a default.
    """
    values: dict[str, Any] = {}
    for spec in fields(cls):
        value: Any = data.get(spec.name)
        if value is None:
            continue
        kinds, wanted = _KINDS[str(spec.type)]
        fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        if spec.type == "list[str] | None":
            fits = fits and all(isinstance(item, str) for item in value)
        if not fits:
            raise CheckpointError(f"{prefix}{spec.name} is {value!r}; it must be {wanted}")
        values[spec.name] = float(value) if spec.type == "float" else value
    return values


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{name} is {value!r}; it must be an object")
    return value


def _drop_neutral_keys(data: dict[str, Any]) -> None:
    """Take out keys that say nothing here; refuse those that ask for what is not implemented."""
    for key in _DESCRIPTIVE_KEYS:
        data.pop(key, None)
    for key, values in _NEUTRAL_VALUES.items():
        if key in data and (value := data.pop(key)) not in values:
            raise UnsupportedCheckpointError(f"{key} {value!r} is not implemented")
    moe = data.pop("moe", None)
    if isinstance(moe, Mapping) and moe.get("num_experts"):
        raise UnsupportedCheckpointError("moe: mixtures of experts are not implemented")
