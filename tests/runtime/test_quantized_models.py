"""Quantised engines against transformers with the weights that their tensors stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmserve.core.sampling_params import SamplingParams
from llmserve.quantization import weight_format
from llmserve.runtime.torch.kernels.int8_linear import int8_products_pay
from tests.models import VOCAB_SIZE, load_llama
from tests.runtime.torch_engines import Driver, make_engine, open_runner, prompt_logits

QUANT_ALGOS = {"w8a16": "W8A16", "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN"}
PROMPT = torch.randint(VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(5))


def _dequantised(path: Path, quant: str, dtype: torch.dtype) -> Any:
    """transformers' model with the engine's weights in place of its own."""
    model, tensors = load_llama(path / "hf", dtype), load_file(path / "engine/rank0.safetensors")
    dequantize = weight_format(QUANT_ALGOS[quant]).dequantize
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            projections = {
                "attention.qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
                "attention.dense": [attention.o_proj],
                "mlp.fc": [mlp.gate_proj],
                "mlp.gate": [mlp.up_proj],
                "mlp.proj": [mlp.down_proj],
            }
            for name, parts in projections.items():
                prefix = f"transformer.layers.{index}.{name}."
                stored = {k.removeprefix(prefix): v for k, v in tensors.items() if prefix in k}
                weights = dequantize(stored).to(dtype).split([len(p.weight) for p in parts])
                for part, weight in zip(parts, weights, strict=True):
                    part.weight.copy_(weight)
    return model


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits[0].double()


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("quant", list(QUANT_ALGOS))
def test_unpacked_weights_are_as_exact_as_floats(
    tmp_path: Path, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.kernels.linear.int8_products_pay", lambda: False)
    engine = make_engine(tmp_path, quant=quant, attention_bias=True, mlp_bias=True)
    runner = open_runner(engine)
    exact, theirs = (_logits(_dequantised(tmp_path, quant, d)) for d in (torch.double, torch.float))
    ours = prompt_logits(runner, PROMPT[0].tolist())
    assert (ours - exact).abs().max() <= 4 * (theirs - exact).abs().max()
    # The quantisation itself is no small change: the comparison is with the right weights.
    plain = _logits(load_llama(tmp_path / "hf"))
    assert _relative_error(plain, exact) > 100 * _relative_error(ours, exact)


@pytest.mark.skipif(not int8_products_pay(), reason="no fast int8 products here")
def test_int8_activations_cost_little(tmp_path: Path) -> None:
    runner = open_runner(make_engine(tmp_path, quant="w8a16"))
    exact = _logits(_dequantised(tmp_path, "w8a16", torch.double))
    ours = prompt_logits(runner, PROMPT[0].tolist())
    # About 0.5 % of noise in each of 8 products, amplified by random weights.
    assert 1e-4 < _relative_error(ours, exact) < 0.04


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("quant", list(QUANT_ALGOS))
def test_on_cuda(tmp_path: Path, quant: str) -> None:
    runner = open_runner(make_engine(tmp_path, quant=quant), device="cuda")
    exact = _logits(_dequantised(tmp_path, quant, torch.double))
    assert _relative_error(prompt_logits(runner, PROMPT[0].tolist()), exact) < 0.1


@pytest.mark.parametrize("quant", list(QUANT_ALGOS))
def test_batched_and_chunked_answers_are_those_alone(tmp_path: Path, quant: str) -> None:
    engine = make_engine(tmp_path, quant=quant)
    prompts = [PROMPT[0, :n].tolist() for n in (3, 20, 47)]
    params = SamplingParams(max_tokens=16, seed=0)
    alone = [Driver(open_runner(engine)).generate([prompt], params)[0] for prompt in prompts]
    runner = open_runner(engine)
    assert Driver(runner, max_num_tokens=16).generate(prompts, params) == alone
