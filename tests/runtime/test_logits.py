"""The native runtime against transformers, on random tiny models of every family.

The yardstick is the same model in float64: our error in float32 may be at most four times that of
transformers in float32. That the comparison would notice a wrong model is tested too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.core.sampling_params import SamplingParams
from llmserve.runtime.torch.decoder import Decoder, DecoderLayer, Norm
from llmserve.runtime.torch.kernels.linear import Linear, PlainLinear
from llmserve.runtime.torch.kernels.rotary import (
    RotaryTables,
    inverse_frequencies,
    rotary_table,
)
from llmserve.runtime.torch.moe import MixtureOfExperts
from llmserve.runtime.torch.runner import TorchRunner
from tests.models import LINEAR_ROPE, LLAMA3_ROPE, VOCAB_SIZE, load_model
from tests.runtime.torch_engines import MAX_SEQ_LEN, Driver, make_engine, open_runner, prompt_logits

YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ODD = {"hidden_size": 60, "intermediate_size": 75, "head_dim": 10, "rms_norm_eps": 1e-3}
# By name: the family, and what differs from its model in tests.models.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "mqa": ("llama", {"num_key_value_heads": 1, "num_hidden_layers": 3}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "llama3_rope": ("llama", {"rope_scaling": LLAMA3_ROPE}),
    "linear_rope": ("llama", {"rope_scaling": LINEAR_ROPE}),
    "yarn_rope": ("qwen2", {"rope_scaling": YARN_ROPE}),
    "dynamic_rope": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "theta": ("llama", {"rope_theta": 500.0}),
    "attention_bias": ("llama", {"attention_bias": True}),
    "mlp_bias": ("llama", {"mlp_bias": True}),
    "head_dim": ("llama", {"head_dim": 32}),
    "odd_sizes": ("llama", ODD),
    "mistral": ("mistral", {}),
    "mistral_window_2": ("mistral", {"sliding_window": 2}),
    "mistral_wide_window": ("mistral", {"sliding_window": 150}),
    "mistral_no_window": ("mistral", {"sliding_window": None, **ODD}),
    "mixtral": ("mixtral", {}),
    "mixtral_one_expert": ("mixtral", {"num_experts_per_tok": 1, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False}),
    "qwen3": ("qwen3", {}),
    "qwen3_odd_sizes": ("qwen3", {"tie_word_embeddings": True, **ODD}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe_unnormalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "gemma": ("gemma", {}),
    "gemma_mqa": ("gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", {}),
    "gemma2_odd_sizes": ("gemma2", {**ODD, "sliding_window": 30}),
    "gemma3": ("gemma3_text", {}),
    "gemma3_wide_window": ("gemma3_text", {"sliding_window": 150}),
    "phi3_long": ("phi3", {}),
    "phi3_short": ("phi3", {"sliding_window": None}),
    "phi3_plain_rope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
}
PROMPT_TOKENS, ANSWER_TOKENS = 100, 64
# Whole, a long chunk behind a short one, one token at a time (as a decode), uneven: with the border
# of every window inside a chunk, at its end and in the decodes.
CHUNKS = [5, 3, 1, 1, 1, 2, 7, 30, *[1] * 20, 24, *[1] * 6]
# Positions beyond it use the long factors of a long rope.
SHORT_SEQ_LEN = 32


@dataclass(frozen=True)
class Oracle:
    """What transformers computes from a checkpoint."""

    prompt: list[int]
    logits64: torch.Tensor
    error32: float
    answer: list[int]

    @classmethod
    def of(cls, checkpoint: Path, max_seq_len: int = MAX_SEQ_LEN) -> Oracle:
        tokens = min(PROMPT_TOKENS, max_seq_len - 12)
        generator = torch.Generator().manual_seed(7)
        prompt = torch.randint(VOCAB_SIZE, (1, tokens), generator=generator)
        model = load_model(checkpoint)
        with torch.no_grad():
            logits32 = model(prompt).logits[0]
            answer = _greedy(model, prompt, min(ANSWER_TOKENS, max_seq_len - tokens))
            logits64 = load_model(checkpoint, torch.float64)(prompt).logits[0]
        error32 = float((logits32 - logits64).abs().max())
        return cls(prompt[0].tolist(), logits64, error32, answer)

    def check_logits(self, runner: TorchRunner, chunks: Sequence[int] | None = None) -> None:
        logits = prompt_logits(runner, self.prompt, chunks)
        error = float((logits - self.logits64).abs().max())
        assert error <= 4 * self.error32, f"{error:.2e}, transformers {self.error32:.2e}"

    def check_answer(self, runner: TorchRunner) -> None:
        params = SamplingParams(max_tokens=len(self.answer), seed=0)
        assert Driver(runner).generate([self.prompt], params) == [self.answer]


def _greedy(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    tokens, cache, step = [], None, prompt
    for _ in range(count):
        out = model(step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(step))
    return tokens


Models = Callable[[str], tuple[Path, Oracle]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A variant's engine and what transformers says, made when it is first asked for."""
    made: dict[str, tuple[Path, Oracle]] = {}

    def model(variant: str) -> tuple[Path, Oracle]:
        if variant not in made:
            path = tmp_path_factory.mktemp(variant)
            family, overrides = VARIANTS[variant]
            engine = make_engine(path, family=family, **overrides)
            made[variant] = engine, Oracle.of(path / "hf", _max_seq_len(variant))
        return made[variant]

    return model


def _max_seq_len(variant: str) -> int:
    return SHORT_SEQ_LEN if variant == "phi3_short" else MAX_SEQ_LEN


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_logits_and_greedy_tokens(models: Models, variant: str, device: str) -> None:
    engine, oracle = models(variant)
    runner = open_runner(engine, device=device, max_seq_len=_max_seq_len(variant))
    oracle.check_logits(runner)
    if len(oracle.prompt) == sum(CHUNKS):
        oracle.check_logits(runner, CHUNKS)
    oracle.check_answer(runner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["llama", "qwen3_moe", "gemma2", "gemma3", "phi3_long"])
def test_half_precision_is_as_close_as_transformers(
    tmp_path: Path, variant: str, dtype: torch.dtype, device: str
) -> None:
    family, overrides = VARIANTS[variant]
    engine = make_engine(tmp_path, family=family, dtype=dtype, **overrides)
    prompt = torch.randint(VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = load_model(tmp_path / "hf", torch.float64)(prompt).logits[0]
        theirs = load_model(tmp_path / "hf", dtype)(prompt).logits[0].double()
    ours = prompt_logits(open_runner(engine, device=device), prompt[0].tolist())
    assert (ours - exact).square().mean() <= 1.5 * (theirs - exact).square().mean()


# --- what the comparison must notice: mistakes in what config.json says ------------------------

# By name: the variant, and config.json's keys with wrong values.
WRONG_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{variant}_{mistake}": (variant, {"sliding_window": window})
    for variant in ("mistral", "mixtral", "qwen2", "gemma2", "gemma3", "phi3_long")
    for mistake, window in (
        ("window_ignored", None),
        ("window_one_too_long", 17 if variant == "phi3_long" else 9),
    )
} | {
    "qwen2_every_layer_slides": ("qwen2", {"max_window_layers": None}),
    "gemma2_every_layer_slides": ("gemma2", {"_sliding_window_pattern": None}),
    "gemma3_every_layer_slides": ("gemma3", {"_sliding_window_pattern": None}),
    "gemma3_pattern_shifted": ("gemma3", {"_sliding_window_pattern": 2}),
    "yarn_ignored": ("yarn_rope", {"rotary_scaling": None}),
    "rope_scaling_ignored": ("llama3_rope", {"rotary_scaling": None}),
    "mixtral_router_unnormalized": (
        "mixtral",
        {"moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 0}},
    ),
    "qwen3_moe_router_unnormalized": (
        "qwen3_moe",
        {"moe": {"num_experts": 8, "top_k": 3, "normalization_mode": 0}},
    ),
    "qwen3_moe_router_normalized": (
        "qwen3_moe_unnormalized",
        {"moe": {"num_experts": 8, "top_k": 3, "normalization_mode": 1}},
    ),
    "mixtral_one_expert_less": (
        "mixtral",
        {"moe": {"num_experts": 4, "top_k": 1, "normalization_mode": 1}},
    ),
    "attention_softcap_dropped": ("gemma2", {"attn_logit_softcapping": None}),
    "final_softcap_dropped": ("gemma2", {"final_logit_softcapping": None}),
    "scale_of_the_head_size": ("gemma2", {"query_pre_attn_scalar": 32.0}),
    "local_theta_dropped": ("gemma3", {"rope_local_base_freq": None}),
    "global_scaling_dropped": ("gemma3", {"rotary_scaling": None}),
    "partial_rotary_ignored": ("phi3_plain_rope", {"rotary_pct": 1.0}),
    "long_rope_magnitude_dropped": ("phi3_long", {"max_position_embeddings": 32}),
}


def _with_config(engine: Path, path: Path, changes: dict[str, Any]) -> Path:
    """The same weights under another config.json."""
    path.mkdir()
    (path / "rank0.safetensors").symlink_to(engine / "rank0.safetensors")
    config = json.loads((engine / "config.json").read_text())
    for key, value in changes.items():
        assert config["pretrained_config"].get(key) != value, key
    config["pretrained_config"] |= changes
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", list(WRONG_CONFIGS))
def test_a_wrong_config_fails_the_comparison(models: Models, tmp_path: Path, name: str) -> None:
    variant, changes = WRONG_CONFIGS[name]
    engine, oracle = models(variant)
    runner = open_runner(_with_config(engine, tmp_path / "wrong", changes))
    for chunks in (None, CHUNKS):
        with pytest.raises(AssertionError, match="transformers"):
            oracle.check_logits(runner, chunks)


def test_swapped_long_rope_factors_fail_the_comparison(models: Models, tmp_path: Path) -> None:
    for variant in ("phi3_long", "phi3_short"):
        engine, oracle = models(variant)
        config = json.loads((engine / "config.json").read_text())["pretrained_config"]
        short, long = "longrope_scaling_short_factors", "longrope_scaling_long_factors"
        swapped = {short: config[long], long: config[short]}
        wrong = _with_config(engine, tmp_path / variant, swapped)
        with pytest.raises(AssertionError, match="transformers"):
            oracle.check_logits(open_runner(wrong, max_seq_len=_max_seq_len(variant)))


# --- and mistakes in what is computed -----------------------------------------------------------


def _each_layer(change: Callable[[DecoderLayer], DecoderLayer]) -> Callable[[Decoder], Decoder]:
    return lambda decoder: replace(decoder, layers=[change(layer) for layer in decoder.layers])


def _with_theta(theta: float) -> Callable[[Decoder], Decoder]:
    def mutate(decoder: Decoder) -> Decoder:
        inverse = inverse_frequencies(decoder.layers[0].attention.rotary_dim, theta, None)
        table = rotary_table(inverse, MAX_SEQ_LEN, torch.float32)
        return replace(decoder, rotary=RotaryTables(full=table))

    return mutate


def _without_rope(decoder: Decoder) -> Decoder:
    table = torch.zeros_like(decoder.rotary.full)
    table[:, 0] = 1.0
    return replace(decoder, rotary=RotaryTables(full=table))


def _swap_up_and_gate(name: str, linear: Linear) -> Any:
    if not name.startswith("mlp.fc"):
        return linear
    return lambda x: torch.cat(linear(x).chunk(2, -1)[::-1], -1)


def _drop_bias(name: str, linear: Linear) -> Any:
    if name != "attention.qkv":
        return linear
    return lambda x: linear(x) - linear(torch.zeros_like(x))


def _ones(norm: Norm) -> Norm:
    return replace(norm, weight=torch.ones_like(norm.weight))


def _only_first_layer(decoder: Decoder) -> Decoder:
    first = decoder.layers[0]
    changed = replace(first, mlp_norm=_ones(first.mlp_norm))
    return replace(decoder, layers=[changed, *decoder.layers[1:]])


def _wrong_epsilon(decoder: Decoder) -> Decoder:
    head = replace(decoder.head, norm=replace(decoder.head.norm, epsilon=1e-3))
    return replace(decoder, head=head)


def _embedding_as_lm_head(decoder: Decoder) -> Decoder:
    linear = PlainLinear(decoder.embedding.weight, None)
    return replace(decoder, head=replace(decoder.head, linear=linear))


def _silu(layer: DecoderLayer) -> DecoderLayer:
    return replace(layer, mlp=replace(layer.mlp, activation="silu"))  # type: ignore[type-var]


def _without_qk_norms(layer: DecoderLayer) -> DecoderLayer:
    return replace(layer, attention=replace(layer.attention, q_norm=None, k_norm=None))


def _swap_qk_norms(layer: DecoderLayer) -> DecoderLayer:
    q_norm, k_norm = layer.attention.k_norm, layer.attention.q_norm
    return replace(layer, attention=replace(layer.attention, q_norm=q_norm, k_norm=k_norm))


def _next_expert(layer: DecoderLayer) -> DecoderLayer:
    mixture = layer.mlp
    assert isinstance(mixture, MixtureOfExperts)
    return replace(layer, mlp=replace(mixture, proj=[*mixture.proj[1:], mixture.proj[0]]))


def _without_embedding_scale(decoder: Decoder) -> Decoder:
    return replace(decoder, embedding=replace(decoder.embedding, scale=1.0))


WITHOUT_EMBEDDING_SCALE = {
    f"{variant}_embedding_scale_dropped": (variant, _without_embedding_scale)
    for variant in ("gemma", "gemma2", "gemma3")
}
WITHOUT_QK_NORMS = {
    f"{variant}_qk_norms_dropped": (variant, _each_layer(_without_qk_norms))
    for variant in ("qwen3", "qwen3_moe", "gemma3")
}
SWAPPED_UP_AND_GATE = {
    f"{variant}_swapped_up_and_gate": (
        variant,
        _each_layer(lambda layer: layer.map_linears(_swap_up_and_gate)),
    )
    for variant in ("llama", "mixtral", "qwen3_moe", "gemma", "phi3_long")
}
MUTATIONS: dict[str, tuple[str, Callable[[Decoder], Decoder]]] = {
    "no_rope": ("llama", _without_rope),
    "wrong_theta": ("llama", _with_theta(20000.0)),
    "input_norm_weight_ignored": (
        "llama",
        _each_layer(lambda layer: replace(layer, input_norm=_ones(layer.input_norm))),
    ),
    "one_post_norm_weight_ignored": ("llama", _only_first_layer),
    "final_norm_weight_ignored": (
        "llama",
        lambda decoder: replace(decoder, head=replace(decoder.head, norm=_ones(decoder.head.norm))),
    ),
    "wrong_epsilon": ("llama", _wrong_epsilon),
    "embedding_as_lm_head": ("llama", _embedding_as_lm_head),
    "qkv_bias_dropped": ("qwen2", _each_layer(lambda layer: layer.map_linears(_drop_bias))),
    "qk_norms_swapped": ("qwen3", _each_layer(_swap_qk_norms)),
    "wrong_activation": ("gemma", _each_layer(_silu)),
    "norm_of_the_attention_dropped": (
        "gemma2",
        _each_layer(lambda layer: replace(layer, attention_norm=None)),
    ),
    "norm_of_the_mlp_dropped": (
        "gemma2",
        _each_layer(lambda layer: replace(layer, output_norm=None)),
    ),
    "another_expert_s_proj": ("mixtral", _each_layer(_next_expert)),
    **WITHOUT_EMBEDDING_SCALE,
    **WITHOUT_QK_NORMS,
    **SWAPPED_UP_AND_GATE,
}


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_a_wrong_model_fails_the_comparison(models: Models, name: str) -> None:
    variant, mutate = MUTATIONS[name]
    engine, oracle = models(variant)
    runner = open_runner(engine)
    runner._decoder = mutate(runner._decoder)
    with pytest.raises(AssertionError, match="transformers"):
        oracle.check_logits(runner)
    # The answers of tied models hang on the embedding alone, and an epsilon is a small mistake.
    if variant == "llama" and name != "wrong_epsilon":
        with pytest.raises(AssertionError):
            oracle.check_answer(runner)
