"""Where the tensors of a quantised Hugging Face checkpoint stand: ModelOpt's layout.

A linear keeps its Hugging Face name and shape, its weight in 8 bits, with ``weight_scale``,
``input_scale`` and, of attention, ``k_proj.k_scale`` and ``v_proj.v_scale`` beside it; experts are
stored one by one. hf_quant_config.json says what it is, and config.json says it again under
``quantization_config``. Source: nvidia-modelopt 0.47, ``torch/export``; TensorRT-LLM 1.3, vLLM and
SGLang read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import plain_tensors
from llmserve.checkpoint.sharding import Range
from llmserve.convert.families.family import Family
from llmserve.convert.plan import names_by_target, source_rows

QUANT_CONFIG_FILE = "hf_quant_config.json"
# The stored tensors of our formats, by suffix, and ModelOpt's names for them.
SUFFIXES = {
    "weight": "weight",
    "per_channel_scale": "weight_scale",
    "weights_scaling_factor": "weight_scale",
    "activation_scaling_factor": "input_scale",
}
KEY_SCALE, VALUE_SCALE = "k_proj.k_scale", "v_proj.v_scale"
# What is described: the formats that readers of this layout have.
QUANT_ALGOS = ("W8A16", "FP8", "FP8_PER_CHANNEL_PER_TOKEN")
KV_CACHE_QUANT_ALGOS = (None, "FP8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A Hugging Face tensor that holds rows of a plain tensor.

    Attributes:
        name: Hugging Face's.
        rows: Half-open ranges of the plain tensor's rows, in the order in which they stand here.
        expert: Whose rows they are; 0 where there are none.
    """

    name: str
    rows: tuple[Range, ...]
    expert: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the tensor."""
        return sum(stop - start for start, stop in self.rows)

    @property
    def module(self) -> str:
        """The name of the module whose weight it is."""
        return self.name.removesuffix(".weight")


def attention_name(layer: int) -> str:
    """The name of a layer's attention, under which the scales of K and V are."""
    return f"model.layers.{layer}.self_attn"


def hf_parts(family: Family, config: PretrainedConfig) -> dict[str, list[Part]]:
    """The Hugging Face tensors of each plain tensor, in the order in which they make it up."""
    names = names_by_target(family.tensors, config)
    parts: dict[str, list[Part]] = {}
    for target, spec in plain_tensors(config).items():
        named = names[target]
        rows = source_rows(target, spec, len(named), config)
        whole = math.prod(spec.shape[:-1]) if len(spec.shape) > 1 else spec.shape[0]
        per_expert = whole // (spec.shape[0] if len(spec.shape) > 2 else 1)
        begin = 0
        parts[target] = []
        for (name, pattern), count in zip(named, rows, strict=True):
            ranges: tuple[Range, ...] = ((begin, begin + count),)
            if pattern in family.swapped_halves:
                middle = begin + count // 2
                ranges = ((middle, begin + count), (begin, middle))
            expert = begin // per_expert if len(spec.shape) > 2 else 0
            parts[target].append(Part(name=name, rows=ranges, expert=expert))
            begin += count
    return parts
