"""The native runtime against transformers, on random tiny Llama models.

The yardstick is the same model in float64: our error in float32 may be at most four times that of
transformers in float32. That the comparison would notice a wrong model is tested too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.core.sampling_params import SamplingParams
from llmserve.runtime.torch.decoder import Decoder, DecoderLayer
from llmserve.runtime.torch.kernels.linear import Linear, PlainLinear
from llmserve.runtime.torch.kernels.rotary import inverse_frequencies, rotary_table
from llmserve.runtime.torch.runner import TorchRunner
from tests.models import LINEAR_ROPE, LLAMA3_ROPE, VOCAB_SIZE, load_llama
from tests.runtime.torch_engines import MAX_SEQ_LEN, Driver, make_engine, open_runner, prompt_logits

VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1, "num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True},
    "llama3_rope": {"rope_scaling": LLAMA3_ROPE},
    "linear_rope": {"rope_scaling": LINEAR_ROPE},
    "dynamic_rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "theta": {"rope_theta": 500.0},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "head_dim": {"head_dim": 32},
    "odd_sizes": {"hidden_size": 60, "intermediate_size": 75, "head_dim": 10, "rms_norm_eps": 1e-3},
}
PROMPT_TOKENS, ANSWER_TOKENS = 100, 64


@dataclass(frozen=True)
class Oracle:
    """What transformers computes from a checkpoint."""

    prompt: list[int]
    logits64: torch.Tensor
    error32: float
    answer: list[int]

    @classmethod
    def of(cls, checkpoint: Path) -> Oracle:
        generator = torch.Generator().manual_seed(7)
        prompt = torch.randint(VOCAB_SIZE, (1, PROMPT_TOKENS), generator=generator)
        model = load_llama(checkpoint)
        with torch.no_grad():
            logits32 = model(prompt).logits[0]
            answer = _greedy(model, prompt)
            logits64 = load_llama(checkpoint, torch.float64)(prompt).logits[0]
        error32 = float((logits32 - logits64).abs().max())
        return cls(prompt[0].tolist(), logits64, error32, answer)

    def check_logits(self, runner: TorchRunner) -> None:
        error = float((prompt_logits(runner, self.prompt) - self.logits64).abs().max())
        assert error <= 4 * self.error32, f"{error:.2e}, transformers {self.error32:.2e}"

    def check_answer(self, runner: TorchRunner) -> None:
        params = SamplingParams(max_tokens=ANSWER_TOKENS, seed=0)
        assert Driver(runner).generate([self.prompt], params) == [self.answer]


def _greedy(model: Any, prompt: torch.Tensor) -> list[int]:
    tokens, cache, step = [], None, prompt
    for _ in range(ANSWER_TOKENS):
        out = model(step, past_key_values=cache, use_cache=True)
        cache, step = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(step))
    return tokens


@pytest.fixture(scope="module", params=list(VARIANTS))
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Oracle]:
    path = tmp_path_factory.mktemp(request.param)
    engine = make_engine(path, **VARIANTS[request.param])
    return engine, Oracle.of(path / "hf")


def test_logits_and_greedy_tokens(model: tuple[Path, Oracle], device: str) -> None:
    engine, oracle = model
    runner = open_runner(engine, device=device)
    oracle.check_logits(runner)
    oracle.check_answer(runner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_close_as_transformers(
    tmp_path: Path, dtype: torch.dtype, device: str
) -> None:
    engine = make_engine(tmp_path, dtype=dtype)
    prompt = torch.randint(VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = load_llama(tmp_path / "hf", torch.float64)(prompt).logits[0]
        theirs = load_llama(tmp_path / "hf", dtype)(prompt).logits[0].double()
    ours = prompt_logits(open_runner(engine, device=device), prompt[0].tolist())
    assert (ours - exact).square().mean() <= 1.5 * (theirs - exact).square().mean()


# --- what the comparison must notice ---------------------------------------------------------


def _each_layer(change: Callable[[DecoderLayer], DecoderLayer]) -> Callable[[Decoder], Decoder]:
    return lambda decoder: replace(decoder, layers=[change(layer) for layer in decoder.layers])


def _with_theta(theta: float) -> Callable[[Decoder], Decoder]:
    def mutate(decoder: Decoder) -> Decoder:
        inverse = inverse_frequencies(decoder.head_size, theta, None)
        return replace(decoder, rotary=rotary_table(inverse, MAX_SEQ_LEN, torch.float32))

    return mutate


def _without_rope(decoder: Decoder) -> Decoder:
    table = torch.zeros_like(decoder.rotary)
    table[:, 0] = 1.0
    return replace(decoder, rotary=table)


def _swapped(linear: Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.cat(linear(x).chunk(2, -1)[::-1], -1)


def _only_first_layer(decoder: Decoder) -> Decoder:
    first = decoder.layers[0]
    ones = replace(first, post_norm=torch.ones_like(first.post_norm))
    return replace(decoder, layers=[ones, *decoder.layers[1:]])


MUTATIONS: dict[str, Callable[[Decoder], Decoder]] = {
    "no_rope": _without_rope,
    "wrong_theta": _with_theta(20000.0),
    "swapped_gate_and_up": _each_layer(
        lambda layer: replace(layer, fc_gate=_swapped(layer.fc_gate))
    ),
    "input_norm_weight_ignored": _each_layer(
        lambda layer: replace(layer, input_norm=torch.ones_like(layer.input_norm))
    ),
    "one_post_norm_weight_ignored": _only_first_layer,
    "final_norm_weight_ignored": lambda decoder: replace(
        decoder, final_norm=torch.ones_like(decoder.final_norm)
    ),
    "wrong_epsilon": lambda decoder: replace(decoder, norm_epsilon=1e-3),
    "embedding_as_lm_head": lambda decoder: replace(
        decoder, lm_head=PlainLinear(decoder.embedding, None)
    ),
}


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    path = tmp_path_factory.mktemp("mutated")
    return make_engine(path), Oracle.of(path / "hf")


@pytest.mark.parametrize("name", list(MUTATIONS))
def test_a_wrong_model_fails_the_comparison(plain_model: tuple[Path, Oracle], name: str) -> None:
    engine, oracle = plain_model
    runner = open_runner(engine)
    runner._decoder = MUTATIONS[name](runner._decoder)
    with pytest.raises(AssertionError, match="transformers"):
        oracle.check_logits(runner)
    if name != "wrong_epsilon":  # too small a mistake to turn an answer in every case
        with pytest.raises(AssertionError):
            oracle.check_answer(runner)


def test_an_ignored_rope_scaling_fails_the_comparison(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, rope_scaling=LLAMA3_ROPE)
    oracle, runner = Oracle.of(tmp_path / "hf"), open_runner(engine)
    runner._decoder = _with_theta(10000.0)(runner._decoder)
    with pytest.raises(AssertionError, match="transformers"):
        oracle.check_logits(runner)
    with pytest.raises(AssertionError):
        oracle.check_answer(runner)
