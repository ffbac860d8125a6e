"""config.json of a TensorRT-LLM checkpoint, and the same inside an engine's, as a dataclass.

The keys and defaults are TensorRT-LLM 1.2's ``PretrainedConfig`` and those of its families. Only
what llmserve understands is kept; a key that changes the model's arithmetic and is not understood
is refused, never dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.checkpoint.rotary_scaling import check_rotary_scaling, rope_type
from llmserve.checkpoint.typed_json import json_object, typed
from llmserve.errors import CheckpointError, UnsupportedCheckpointError

DTYPES = ("float16", "bfloat16", "float32")
ARCHITECTURES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    "Phi3ForCausalLM",
)
_QWEN_TYPES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_GEMMAS = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
_MOES = ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
_QK_LAYERNORMS = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Gemma3ForCausalLM")
_INTER_LAYERNORMS = ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
# Which architectures may have a key: elsewhere TensorRT-LLM does not read it, or has no such model.
_ARCHITECTURES_WITH: dict[str, tuple[str, ...]] = {
    "moe": _MOES,
    "moe_intermediate_size": _MOES,
    "qk_layernorm": _QK_LAYERNORMS,
    "inter_layernorms": _INTER_LAYERNORMS,
    "query_pre_attn_scalar": _INTER_LAYERNORMS,
    "final_logit_softcapping": _INTER_LAYERNORMS,
    "attn_logit_softcapping": ("Gemma2ForCausalLM",),
    "rope_local_base_freq": ("Gemma3ForCausalLM",),
    "original_max_position_embeddings": ("Phi3ForCausalLM",),
    "longrope_scaling_short_factors": ("Phi3ForCausalLM",),
    "longrope_scaling_long_factors": ("Phi3ForCausalLM",),
    "qwen_type": tuple(_QWEN_TYPES),
    "mlp_bias": ("LlamaForCausalLM", "MistralForCausalLM"),
    "attn_bias": ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"),
    "sliding_window": tuple(
        name for name in ARCHITECTURES if name not in ("LlamaForCausalLM", "GemmaForCausalLM")
    ),
}
# Keys without which the architecture would be another.
_ARCHITECTURES_NEED: dict[str, tuple[str, ...]] = {
    "moe": _MOES,
    "inter_layernorms": _INTER_LAYERNORMS,
    "query_pre_attn_scalar": _INTER_LAYERNORMS,
}

# Keys that other writers add and that say nothing about the arithmetic. TensorRT-LLM copies
# tie_word_embeddings from its source and never reads it: tied is what has no lm_head.
_DESCRIPTIVE_KEYS = frozenset(
    {"producer", "runtime_defaults", "disable_weight_only_quant_plugin", "bos_token_id"}
    | {"eos_token_id", "pad_token_id", "decoder", "tie_word_embeddings", "seq_length"}
    | {"num_labels"}
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
    "rank": (0,),
    "rmsnorm": (True,),
    "bias": (False,),
    "lm_head_bias": (False,),
    "use_logn_attn": (False,),
    "moe_shared_expert_intermediate_size": (None, 0),
    "mlp_only_layers": (None, []),
    "decoder_sparse_step": (1,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelMapping:
    """The ``mapping`` object: how many ranks. Tensor parallel only.

    Attributes:
        world_size: Ranks in all: tp_size, for there is no other parallelism.
        tp_size: Ranks that share every layer.
    """

    world_size: int = 1
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    gpus_per_node: int = 8

    @classmethod
    def tensor_parallel(cls, tp_size: int) -> ParallelMapping:
        """The mapping of ``tp_size`` tensor-parallel ranks."""
        return cls(world_size=tp_size, tp_size=tp_size)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParallelMapping:
        """Read the ``mapping`` object; without pipeline ranks its other keys have nothing to say.

        Raises:
            CheckpointError: A value of the wrong kind, or a world that is not tp_size ranks.
            UnsupportedCheckpointError: Pipeline or context parallel ranks.
        """
        known = {f.name for f in fields(cls)}
        kept = {key: value for key, value in data.items() if key in known}
        mapping = cls(**typed(cls, kept, "mapping."))
        for name in ("pp_size", "cp_size"):
            if (size := getattr(mapping, name)) != 1:
                raise UnsupportedCheckpointError(
                    f"mapping.{name} is {size}; only tensor parallel ranks are implemented: "
                    "convert again with pp_size 1 and cp_size 1"
                )
        if mapping.tp_size < 1 or mapping.world_size != mapping.tp_size:
            raise CheckpointError(
                f"mapping.world_size is {mapping.world_size}; it must be tp_size, {mapping.tp_size}"
            )
        return mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The ``moe`` object: a mixture of experts in place of every layer's MLP.

    Attributes:
        num_experts: Experts of a layer.
        top_k: Experts that a token goes through.
        normalization_mode: Of the chosen experts' weights, which are a softmax over all: 0, as
            they are; 1, divided by their sum.
    """

    num_experts: int
    top_k: int
    normalization_mode: int = 0

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MoeConfig | None:
        """Read the ``moe`` object; None where it has no experts, as TensorRT-LLM writes it.

        Raises:
            CheckpointError: A key is missing, of the wrong kind or out of range.
            UnsupportedCheckpointError: Shared experts, or another routing.
        """
        if not data.get("num_experts"):
            return None
        if shared := data.get("shared_expert_intermediate_size"):
            raise UnsupportedCheckpointError(
                f"moe.shared_expert_intermediate_size {shared} is not implemented; it must be 0"
            )
        values = typed(cls, data, "moe.")
        if "top_k" not in values:
            raise CheckpointError("config.json's moe lacks top_k")
        moe = cls(**values)
        if moe.normalization_mode not in (0, 1):
            raise UnsupportedCheckpointError(
                f"moe.normalization_mode {moe.normalization_mode} is not implemented; it must be "
                "0 (none) or 1 (renormalize)"
            )
        if not 1 <= moe.top_k <= moe.num_experts:
            raise CheckpointError(
                f"moe.top_k is {moe.top_k}; it must be from 1 to num_experts, {moe.num_experts}"
            )
        return moe


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainedConfig:
    """A decoder as TensorRT-LLM describes it. Sizes in elements, of the whole model, not a rank.

    Attributes:
        architecture: One of ``ARCHITECTURES``.
        dtype: 'float16', 'bfloat16' or 'float32': weights that are not quantised, activations, KV.
        head_size: Elements of one head; need not be hidden_size / num_attention_heads.
        hidden_act: 'silu', 'gelu_pytorch_tanh' for a Gemma; TensorRT-LLM says 'swiglu' where gate
            and up are one weight, fc: in Phi-3 and in experts.
        position_embedding_type: 'rope_gpt_neox' or 'long_rope'.
        rotary_base: rope theta.
        rotary_scaling: Hugging Face's rope_scaling verbatim, or None.
        rotary_pct: Share of a head that is rotated, its first elements.
        attn_bias: Biases on qkv, and where ``dense_bias`` says so on dense.
        mlp_bias: Biases on fc, gate and proj.
        qk_layernorm: Every head of q and k is normalised before it is rotated.
        share_embedding_table: lm_head is the embedding: the checkpoint has no lm_head.weight.
        use_parallel_embedding: The embedding's rows are split over the ranks.
        sliding_window: Tokens that a sliding layer sees, its own included; None: all layers see
            everything.
        sliding_window_pattern: Every so many-th layer is not sliding; None: all are.
        max_window_layers: The first so many layers are not sliding.
        rope_local_base_freq: theta of sliding layers, which are then not scaled either.
        inter_layernorms: Norms after attention and MLP as well (Gemma 2 and 3).
        query_pre_attn_scalar: Scores are divided by its root; None takes head_size.
        attn_logit_softcapping: Scores s become cap * tanh(s / cap).
        final_logit_softcapping: Likewise for the logits.
        original_max_position_embeddings: Of long_rope: the context before it was stretched.
        longrope_scaling_short_factors: Of long_rope, one per rotated pair: engines up to that.
        longrope_scaling_long_factors: Likewise: engines beyond it.
        qwen_type: Hugging Face's model_type of a Qwen; TensorRT-LLM wants it.
        moe: A mixture of experts, or None.
        moe_intermediate_size: Of one expert; None takes intermediate_size.
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
    rotary_pct: float = 1.0
    attn_bias: bool = False
    mlp_bias: bool = False
    qk_layernorm: bool = False
    use_parallel_embedding: bool = False
    embedding_sharding_dim: int = 0
    share_embedding_table: bool = False
    sliding_window: int | None = None
    sliding_window_pattern: int | None = None
    max_window_layers: int | None = None
    rope_local_base_freq: float | None = None
    inter_layernorms: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    original_max_position_embeddings: int | None = None
    longrope_scaling_short_factors: list[float] | None = None
    longrope_scaling_long_factors: list[float] | None = None
    qwen_type: str | None = None
    moe: MoeConfig | None = None
    moe_intermediate_size: int | None = None
    mapping: ParallelMapping = field(default_factory=ParallelMapping)
    quantization: QuantConfig = field(default_factory=QuantConfig)

    @property
    def tp_size(self) -> int:
        """Tensor-parallel ranks."""
        return self.mapping.tp_size

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated."""
        return int(self.head_size * self.rotary_pct)

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied with."""
        return float((self.query_pre_attn_scalar or self.head_size) ** -0.5)

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied with; rounded to ``dtype`` first, as Gemma's is."""
        return float(self.hidden_size**0.5) if self.architecture.startswith("Gemma") else 1.0

    @property
    def dense_bias(self) -> bool:
        """Whether attention.dense has a bias: Qwen's attn_bias means qkv alone."""
        return self.attn_bias and not self.architecture.startswith("Qwen")

    @property
    def fused_mlp(self) -> bool:
        """Whether mlp.fc is up and then gate in one weight, and there is no mlp.gate."""
        return self.moe is None and self.hidden_act == "swiglu"

    @property
    def expert_size(self) -> int:
        """Intermediate elements of one expert."""
        return self.moe_intermediate_size or self.intermediate_size

    def window(self, layer: int) -> int | None:
        """Tokens that a layer sees, its own included, or None for all."""
        if self.sliding_window is None or layer < (self.max_window_layers or 0):
            return None
        pattern = self.sliding_window_pattern
        return None if pattern and (layer + 1) % pattern == 0 else self.sliding_window

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of config.json: TensorRT-LLM's common keys, and what the family adds."""
        data = asdict(self)
        for name in _FAMILY_KEYS:
            if data[name] is None or data[name] is False:
                del data[name]
        if self.rotary_pct == 1.0:
            del data["rotary_pct"]
        if self.sliding_window_pattern is not None:
            data[_PATTERN_ON_DISK] = data.pop("sliding_window_pattern")
        return data

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
        if _PATTERN_ON_DISK in data:
            data["sliding_window_pattern"] = data.pop(_PATTERN_ON_DISK)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - known):
            raise UnsupportedCheckpointError(
                f"config.json has the key {unknown[0]!r} ({data[unknown[0]]!r}), which is not "
                "implemented"
            )
        missing = [name for name in _REQUIRED_KEYS if data.get(name) is None]
        if missing:
            raise CheckpointError(f"config.json lacks {', '.join(missing)}")
        parts: dict[str, Any] = {
            "quantization": QuantConfig.from_dict(
                json_object(data.pop("quantization", {}), "quantization")
            ),
            "mapping": ParallelMapping.from_dict(json_object(data.pop("mapping", {}), "mapping")),
            "moe": MoeConfig.from_dict(json_object(data.pop("moe", {}), "moe")),
        }
        if not data.get("moe_intermediate_size"):
            data.pop("moe_intermediate_size", None)  # TensorRT-LLM writes 0 for a dense model
        # TensorRT-LLM's defaults where they differ from this class's, which are Llama's.
        data.setdefault("hidden_act", "gelu")
        data.setdefault("position_embedding_type", "learned_absolute")
        values = typed(cls, data, "")
        if values["num_attention_heads"] <= 0:
            raise CheckpointError(
                f"num_attention_heads is {values['num_attention_heads']}; it must be positive"
            )
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values.setdefault("intermediate_size", 4 * values["hidden_size"])
        values.setdefault("head_size", values["hidden_size"] // values["num_attention_heads"])
        if values["architecture"] == "Qwen2ForCausalLM":
            values.setdefault("attn_bias", True)
        if values["architecture"] in _GEMMAS:
            values.setdefault("share_embedding_table", True)
        if values["architecture"] in _QK_LAYERNORMS:
            values["qk_layernorm"] = True  # TensorRT-LLM goes by the architecture alone
        config = cls(**parts, **values)
        config._check()
        if rotary_embedding_dim not in (None, config.rotary_dim):
            raise UnsupportedCheckpointError(
                f"rotary_embedding_dim {rotary_embedding_dim!r} is not implemented; it must be "
                f"head_size * rotary_pct, {config.rotary_dim}"
            )
        return config

    def _check(self) -> None:
        """Raise UnsupportedCheckpointError or CheckpointError for values that cannot be run."""
        implemented: dict[str, tuple[Any, ...]] = {
            "architecture": ARCHITECTURES,
            "dtype": DTYPES,
            "logits_dtype": DTYPES,
            "hidden_act": (self._activation(),),
            "position_embedding_type": ("rope_gpt_neox", "long_rope"),
            "embedding_sharding_dim": (0,),
        }
        for name, choices in implemented.items():
            if (value := getattr(self, name)) not in choices:
                raise UnsupportedCheckpointError(
                    f"{name} {value!r} is not implemented for {self.architecture}; it must be "
                    f"{' or '.join(map(str, choices))}"
                )
        self._check_architecture()
        for name in _POSITIVE_KEYS:
            if (value := getattr(self, name)) is not None and value <= 0:
                raise CheckpointError(f"{name} is {value}; it must be positive")
        if self.num_hidden_layers > _MAX_LAYERS:
            raise CheckpointError(
                f"num_hidden_layers is {self.num_hidden_layers}; it must be at most {_MAX_LAYERS}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads is {self.num_attention_heads}; it must be a multiple of "
                f"num_key_value_heads, {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or not 0 < self.rotary_pct <= 1:
            raise CheckpointError(
                f"head_size is {self.head_size} and rotary_pct {self.rotary_pct}: "
                f"{self.rotary_dim} elements of a head would be rotated, and that must be an even "
                "number from 2 to head_size"
            )
        check_rotary_scaling(self.rotary_scaling, self.max_position_embeddings)
        if rope_type(self.rotary_scaling) == "yarn" and self.rotary_base <= 1:
            raise CheckpointError(
                f"rotary_base is {self.rotary_base}; with rotary scaling 'yarn' it must be above 1"
            )
        self._check_long_rope()

    def _activation(self) -> str:
        if self.architecture in _GEMMAS:
            return "gelu_pytorch_tanh"
        return "swiglu" if self.architecture in (*_MOES, "Phi3ForCausalLM") else "silu"

    def _check_architecture(self) -> None:
        """Raise for a key that the architecture has not, or cannot be without."""
        for name, architectures in _ARCHITECTURES_WITH.items():
            value = getattr(self, name)
            if value not in (None, False) and self.architecture not in architectures:
                raise UnsupportedCheckpointError(
                    f"{name} {value!r} is not implemented for {self.architecture}; it is for "
                    f"{', '.join(architectures)}"
                )
        for name, architectures in _ARCHITECTURES_NEED.items():
            if self.architecture in architectures and getattr(self, name) in (None, False):
                raise CheckpointError(f"config.json lacks {name}; {self.architecture} needs it")
        qwen_type = _QWEN_TYPES.get(self.architecture)
        if self.qwen_type not in (None, qwen_type):
            raise CheckpointError(
                f"qwen_type is {self.qwen_type!r}; of {self.architecture} it must be {qwen_type!r}"
            )
        if self.rotary_pct != 1.0 and self.architecture != "Phi3ForCausalLM":
            raise UnsupportedCheckpointError(
                f"rotary_pct {self.rotary_pct} is not implemented for {self.architecture}"
            )

    def _check_long_rope(self) -> None:
        original = self.original_max_position_embeddings
        if self.position_embedding_type != "long_rope":
            if original is not None or self.longrope_scaling_long_factors is not None:
                raise CheckpointError(
                    f"position_embedding_type is {self.position_embedding_type!r}; with "
                    "longrope_scaling_long_factors it must be 'long_rope'"
                )
            return
        if original is None or original < 2:
            raise CheckpointError(
                f"original_max_position_embeddings is {original}; for long_rope it must be at "
                "least 2"
            )
        if self.rotary_scaling is not None:
            raise UnsupportedCheckpointError("rotary_scaling is not implemented with long_rope")
        for name in ("longrope_scaling_short_factors", "longrope_scaling_long_factors"):
            factors = getattr(self, name)
            if factors is None or len(factors) != self.rotary_dim // 2 or min(factors) <= 0:
                raise CheckpointError(
                    f"{name} is {factors}; it must be {self.rotary_dim // 2} positive numbers, one "
                    "for each rotated pair"
                )


_REQUIRED_KEYS = (
    *("architecture", "dtype", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("vocab_size", "max_position_embeddings"),
)
_POSITIVE_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "intermediate_size", "head_size", "max_position_embeddings"),
    *("norm_epsilon", "rotary_base", "sliding_window", "sliding_window_pattern"),
    *("rope_local_base_freq", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "original_max_position_embeddings", "moe_intermediate_size"),
)
# Written only where they say something: what a family does not have, its config.json does not say.
_FAMILY_KEYS = (
    *("sliding_window", "sliding_window_pattern", "max_window_layers", "rope_local_base_freq"),
    *("inter_layernorms", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "original_max_position_embeddings", "qwen_type", "moe"),
    *("longrope_scaling_short_factors", "longrope_scaling_long_factors", "moe_intermediate_size"),
)
# TensorRT-LLM 1.2's name of it.
_PATTERN_ON_DISK = "_sliding_window_pattern"
# Every layer's tensors are listed by name: a damaged number must not fill the memory with names.
_MAX_LAYERS = 10_000


def _drop_neutral_keys(data: dict[str, Any]) -> None:
    """Take out keys that say nothing here; refuse those that ask for what is not implemented."""
    for key in _DESCRIPTIVE_KEYS:
        data.pop(key, None)
    for key, values in _NEUTRAL_VALUES.items():
        if key in data and (value := data.pop(key)) not in values:
            raise UnsupportedCheckpointError(f"{key} {value!r} is not implemented")
