"""Mixtures of experts against their plain reference, whatever the batch and the weights' format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import quantized_linear
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.quantization import weight_format
from llmserve.runtime.torch.kernels.elementwise import Activation
from llmserve.runtime.torch.kernels.linear import PlainLinear
from llmserve.runtime.torch.loading import DecoderLoader
from llmserve.runtime.torch.moe import MixtureOfExperts, mixture_reference
from tests.runtime.torch_engines import make_engine

EXPERTS, HIDDEN, FFN = 6, 20, 12
CPU = torch.device("cpu")


def _mixture(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    top_k: int = 2,
    renormalize: bool = True,
    activation: Activation = "silu",
) -> MixtureOfExperts:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.5

    def linears(out_features: int, in_features: int) -> list[PlainLinear]:
        weights = random(EXPERTS, out_features, in_features).to(dtype).to(device)
        return [PlainLinear(weight, None) for weight in weights]

    return MixtureOfExperts(
        router=PlainLinear(random(EXPERTS, HIDDEN).to(device), None),
        fc=linears(2 * FFN, HIDDEN),
        proj=linears(HIDDEN, FFN),
        top_k=top_k,
        renormalize=renormalize,
        activation=activation,
    )


def _x(tokens: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.cpu().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_is_its_reference(tokens: int, top_k: int, renormalize: bool, device: str) -> None:
    settings = {"top_k": top_k, "renormalize": renormalize}
    x = _x(tokens)
    expected = mixture_reference(_mixture(**settings), x)
    assert _relative_error(_mixture(device=device, **settings)(x.to(device)), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, device: str) -> None:
    x = _x(33, dtype)
    actual = _mixture(dtype, device)(x.to(device))
    assert actual.dtype == dtype
    assert _relative_error(actual, mixture_reference(_mixture(dtype), x)) < 0.01


def test_activation() -> None:
    x = _x(5)
    gelu = _mixture(activation="gelu_pytorch_tanh")
    assert _relative_error(gelu(x), mixture_reference(gelu, x)) < 1e-6
    assert _relative_error(gelu(x), mixture_reference(_mixture(), x)) > 1e-2


def test_neighbours_change_nothing_but_the_rounding() -> None:
    mixture, x = _mixture(), _x(40)
    together = mixture(x)
    alone = torch.cat([mixture(row) for row in x.split(1)])
    assert _relative_error(together, alone.double()) < 1e-6
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert _relative_error(mixture(x[order]), together[order].double()) < 1e-6


def test_experts_nobody_goes_to_are_not_run() -> None:
    mixture = _mixture(top_k=1)
    chosen = set(mixture.route(_x(3))[1].flatten().tolist())
    assert len(chosen) < EXPERTS

    def only_chosen(name: str, linear: object) -> object:
        return linear if int(name.rpartition(".")[2]) in chosen else None

    changed = mixture.map_linears(only_chosen)  # type: ignore[arg-type]
    assert torch.equal(changed(_x(3)), mixture(_x(3)))


class QuantisedTensors:
    """A ``TensorSource`` of a plain engine's tensors, those of linears quantised."""

    def __init__(self, engine: Path, config: PretrainedConfig, input_amax: float) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        quantize = weight_format(config.quantization.quant_algo).quantize
        for name, tensor in load_file(engine / "rank0.safetensors").items():
            linear = quantized_linear(config, name)
            if linear is None:
                self.tensors[name] = tensor
                continue
            stored = quantize(tensor, torch.full(tensor.shape[-1:], input_amax))
            self.tensors |= {f"{linear}.{suffix}": part for suffix, part in stored.items()}

    def names(self) -> list[str]:
        return sorted(self.tensors)

    def spec(self, name: str) -> TensorSpec:
        return TensorSpec(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def dequantised(self, algo: str, linear: str) -> list[PlainLinear]:
        prefix = f"{linear}."
        parts = self.tensors.items()
        stored = {k.removeprefix(prefix): v for k, v in parts if k.startswith(prefix)}
        assert stored["weight"].dtype in (torch.int8, torch.float8_e4m3fn)
        return [PlainLinear(weight, None) for weight in weight_format(algo).dequantize(stored)]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    # What the arithmetic allows: 8-bit activations, per token or under one scale.
    ("algo", "tolerance"),
    [("W8A16", 0.02), ("FP8_PER_CHANNEL_PER_TOKEN", 0.05), ("FP8", 0.06)],
)
def test_quantised_experts(tmp_path: Path, family: str, algo: str, tolerance: float) -> None:
    engine = make_engine(tmp_path, family=family)
    config, _ = read_engine(engine)
    config = replace(config, quantization=QuantConfig(quant_algo=algo))
    source = QuantisedTensors(engine, config, input_amax=6.0)
    mixture = DecoderLoader(source, config, device=CPU).layer(1).mlp
    assert isinstance(mixture, MixtureOfExperts)
    prefix = "transformer.layers.1.mlp"
    plain = replace(
        mixture,
        fc=source.dequantised(algo, f"{prefix}.fc"),
        proj=source.dequantised(algo, f"{prefix}.proj"),
    )
    x = torch.randn(21, config.hidden_size, generator=torch.Generator().manual_seed(1))
    assert _relative_error(mixture(x), mixture_reference(plain, x)) < tolerance


def test_weights_of_experts_are_mapped_and_not_copied(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, family="mixtral")
    config, _ = read_engine(engine)
    with RankReader(engine / "rank0.safetensors") as reader:
        layer = DecoderLoader(reader, config, device=CPU).layer(0)
        fc = reader.tensor("transformer.layers.0.mlp.fc.weight")
    linears = layer.linears()
    starts = [linears[f"mlp.fc.{e}"]._weight.untyped_storage().data_ptr() for e in range(4)]  # type: ignore[attr-defined]
    assert len(set(starts)) == 1
    assert torch.equal(linears["mlp.fc.3"]._weight, fc[3])  # type: ignore[attr-defined]
