"""Quantised engines against transformers with the weights that their tensors stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama import modeling_llama

from llmserve.build.native import build
from llmserve.config import KV_CACHE_QUANT_ALGOS, BuildConfig, CalibrationConfig
from llmserve.config import QUANT_ALGOS as ALL_QUANT_ALGOS
from llmserve.convert.converter import convert
from llmserve.core.sampling_params import SamplingParams
from llmserve.quantization import kv_cache, weight_format
from llmserve.runtime.torch import load_runner
from llmserve.runtime.torch.kernels.int8_linear import int8_products_pay
from llmserve.runtime.torch.runner import TorchRunner
from tests.models import VOCAB_SIZE, load_llama, make_llama
from tests.runtime.torch_engines import (
    MAX_SEQ_LEN,
    Driver,
    make_engine,
    open_runner,
    prompt_logits,
)

QUANT_ALGOS = {"w8a16": "W8A16", "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN"}
# Weights, KV cache, and how far logits may be (norm of the difference / norm) from a float model
# with the dequantised weights: what 8 bits of activations cost, amplified by random weights.
CALIBRATED = [
    ("fp8", "auto", 0.1),
    ("int8_sq", "auto", 0.1),
    ("none", "int8", 0.02),
    ("none", "fp8", 0.05),
    ("fp8", "fp8", 0.12),
    ("int8_sq", "int8", 0.1),
]
PROMPT = torch.randint(VOCAB_SIZE, (1, 64), generator=torch.Generator().manual_seed(5))


def _dequantised(path: Path, quant: str, dtype: torch.dtype) -> Any:
    """transformers' model with the engine's weights in place of its own."""
    model, tensors = load_llama(path / "hf", dtype), load_file(path / "engine/rank0.safetensors")
    dequantize = weight_format(ALL_QUANT_ALGOS[quant]).dequantize
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


@pytest.fixture(scope="module", params=CALIBRATED, ids=lambda case: f"{case[0]}-{case[1]}")
def calibrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str, float]:
    quant, cache, bound = request.param
    path = tmp_path_factory.mktemp(f"{quant}_{cache}")
    make_llama(path / "hf", attention_bias=True)
    convert(
        path / "hf",
        path / "checkpoint",
        quant=quant,
        kv_cache_dtype=cache,
        calibration=CalibrationConfig(samples=8, seq_len=64),
    )
    build(path / "checkpoint", path / "engine", BuildConfig(max_seq_len=MAX_SEQ_LEN))
    return path, quant, cache, bound


def _open(engine: Path) -> TorchRunner:
    """A loaded runner whose KV cache is full of NaN, or of 127: NaN in e4m3, the end of int8."""
    runner = load_runner(
        engine,
        max_batch_size=16,
        max_num_tokens=512,
        max_seq_len=MAX_SEQ_LEN,
        tokens_per_block=8,
        device="cpu",
    )
    runner.allocate_kv_cache((64,))
    for cache in runner._kv_cache:
        cache.fill_(float("nan") if cache.is_floating_point() else 127)
    return runner


def _quantise_activations(
    monkeypatch: pytest.MonkeyPatch, path: Path, model: Any, quant: str, cache: str
) -> None:
    """Let transformers' model round inputs and KV as the format says, in its own arithmetic."""
    tensors = load_file(path / "engine/rank0.safetensors")
    names = {"q_proj": "attention.qkv", "k_proj": "attention.qkv", "v_proj": "attention.qkv"}
    names |= {"o_proj": "attention.dense", "gate_proj": "mlp.fc", "up_proj": "mlp.gate"}
    names |= {"down_proj": "mlp.proj"}
    caches = []
    for index, layer in enumerate(model.model.layers):
        prefix = f"transformer.layers.{index}"
        for module in (layer.self_attn, layer.mlp):
            for name, linear in module.named_children():
                if name not in names or quant == "none":
                    continue
                stored = f"{prefix}.{names[name]}"
                scale = tensors[f"{stored}.activation_scaling_factor"].double()
                factor = 1 / scale
                if quant == "int8_sq":
                    factor = tensors[f"{stored}.prequant_scaling_factor"].double() / scale

                def rounded(_: Any, args: Any, factor: torch.Tensor = factor) -> Any:
                    steps = args[0].double() * factor
                    if quant == "fp8":
                        steps = steps.clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
                    else:
                        steps = steps.round().clamp(-128, 127)
                    return ((steps / factor).to(args[0].dtype),)

                linear.register_forward_pre_hook(rounded)
        if cache != "auto":
            caches.append(tensors[f"{prefix}.attention.kv_cache_scaling_factor"])
            scale = caches[-1]

            def stored_value(_: Any, args: Any, y: Any, scale: torch.Tensor = scale) -> Any:
                return _through_cache(y, cache, scale)

            layer.self_attn.v_proj.register_forward_hook(stored_value)
    if cache == "auto":
        return
    rotate, layers = modeling_llama.apply_rotary_pos_emb, iter(caches * 8)

    def rotate_and_store(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
        q, k = rotate(q, k, *args, **kwargs)
        return q, _through_cache(k, cache, next(layers))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate_and_store)


def _through_cache(x: torch.Tensor, cache: str, scale: torch.Tensor) -> torch.Tensor:
    algo = KV_CACHE_QUANT_ALGOS[cache]
    assert algo is not None
    return kv_cache.dequantize(kv_cache.quantize(x, algo, scale), scale).to(x.dtype)


def test_calibrated_forms_against_dequantised_weights(
    calibrated: tuple[Path, str, str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, quant, cache, bound = calibrated
    ours = prompt_logits(_open(path / "engine"), PROMPT[0].tolist())
    exact = _dequantised(path, quant, torch.double)
    error = _relative_error(ours, _logits(exact))
    assert 1e-4 < error < bound
    # With the same rounding of activations only roundings that fall on a boundary are left.
    _quantise_activations(monkeypatch, path, exact, quant, cache)
    left = _relative_error(ours, _logits(exact))
    assert left < error / 20


def test_calibrated_forms_in_chunks_and_batches(calibrated: tuple[Path, str, str, float]) -> None:
    engine = calibrated[0] / "engine"
    prompts = [PROMPT[0, :n].tolist() for n in (3, 20, 47)]
    params = SamplingParams(max_tokens=16, seed=0)
    alone = [Driver(_open(engine)).generate([p], params)[0] for p in prompts]
    runner = _open(engine)
    assert Driver(runner, max_num_tokens=16).generate(prompts, params) == alone
