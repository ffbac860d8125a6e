"""Activation ranges against hooks on transformers' own modules, on the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel

from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.convert import calibrate as calibrate_module
from llmserve.convert.artifact import open_artifact
from llmserve.convert.calibrate import ActivationRanges, calibrate
from llmserve.convert.samples import Samples
from llmserve.errors import CheckpointError
from tests.models import FAMILIES, VOCAB_SIZE, load_model, make_llama, make_model

# Within a long rope's original context: transformers chooses its factors by each sequence.
LENGTHS = (9, 30, 2, 17)


def _samples(count: int = len(LENGTHS), seed: int = 5) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]
    return Samples("random", tuple(map(tuple, rows[:count])))


def _calibrate(path: Path, samples: Samples) -> ActivationRanges:
    with open_artifact(path) as artifact:
        return calibrate(artifact.source, artifact.config, samples, device="cpu")


class Oracle:
    """Largest magnitudes that hooks on transformers' modules see, float32, a sequence at a time."""

    def __init__(self, model: PreTrainedModel, samples: Samples) -> None:
        self.seen: dict[str, torch.Tensor] = {}
        for index, layer in enumerate(model.model.layers):
            prefix = f"transformer.layers.{index}"
            attention, mlp = layer.self_attn, layer.mlp
            qkv = getattr(attention, "qkv_proj", None) or attention.q_proj
            self._hook(qkv, f"{prefix}.attention.qkv")
            self._hook(attention.o_proj, f"{prefix}.attention.dense")
            for part in "qkv":
                if (linear := getattr(attention, f"{part}_proj", None)) is not None:
                    self._hook_output(linear, f"{prefix}.{part}")
            if hasattr(mlp, "experts"):
                mlp.experts.register_forward_pre_hook(self._experts(f"{prefix}.mlp"))
            else:
                self._hook(mlp, f"{prefix}.mlp.fc")
                self._hook(mlp, f"{prefix}.mlp.gate")
                self._hook(mlp.down_proj, f"{prefix}.mlp.proj")
        with torch.no_grad():
            for ids in samples.sequences:
                # Made without a config, it keeps every token of layers with a window too.
                cache = DynamicCache()
                model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
                for index, layer in enumerate(cache.layers):
                    self._see(f"transformer.layers.{index}.keys", layer.keys.reshape(-1, 1))
                    self._see(f"transformer.layers.{index}.values", layer.values.reshape(-1, 1))

    def _see(self, name: str, values: torch.Tensor) -> None:
        amax = values.float().reshape(-1, values.shape[-1]).abs().amax(0)
        self.seen[name] = torch.maximum(self.seen.get(name, torch.zeros_like(amax)), amax)

    def _hook(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, args: self._see(name, args[0]))

    def _hook_output(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, args, out: self._see(name, out.reshape(-1, 1)))

    def _experts(self, prefix: str) -> Any:
        def see(experts: Any, args: tuple[torch.Tensor, ...]) -> None:
            states, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
            self._see(f"{prefix}.fc", states)
            for expert in chosen.unique().tolist():
                x = states[(chosen == expert).any(-1)]
                gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
                self._see(f"{prefix}.proj", experts.act_fn(gate) * up)

        return see


def _assert_agree(ranges: ActivationRanges, seen: dict[str, torch.Tensor]) -> None:
    # The same sums in another order: float32 rounding, which large norms scale.
    tolerance = {"rtol": 2e-5, "atol": 2e-5}
    for linear, amax in ranges.inputs.items():
        assert amax.dtype == torch.float32
        torch.testing.assert_close(amax, seen[linear], msg=linear, **tolerance)
    for index in range(len(ranges.keys)):
        prefix = f"transformer.layers.{index}"
        for name, kept in (("keys", ranges.keys), ("values", ranges.values)):
            torch.testing.assert_close(kept[index], seen[f"{prefix}.{name}"][0], **tolerance)
        if f"{prefix}.q" in seen:
            theirs = torch.cat([seen[f"{prefix}.{part}"] for part in "qkv"])
            torch.testing.assert_close(ranges.qkv_outputs[index], theirs, **tolerance)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_ranges_are_those_that_transformers_modules_see(tmp_path: Path, family: str) -> None:
    path = make_model(tmp_path / "hf", family, tokenizer=False)
    ranges = _calibrate(path, _samples())
    oracle = Oracle(load_model(path), _samples())
    linears = {name for name in oracle.seen if name.count(".") == 4}
    if family == "phi3":  # gate and up are one weight
        linears = {name for name in linears if not name.endswith(".gate")}
    assert set(ranges.inputs) == linears
    _assert_agree(ranges, oracle.seen)


def test_the_comparison_notices_a_missing_sample_and_a_padded_one(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    oracle = Oracle(load_model(path), _samples())
    with pytest.raises(AssertionError):
        _assert_agree(_calibrate(path, _samples(count=3)), oracle.seen)
    rows = _samples().sequences
    padded = Samples("padded", tuple((0,) * (30 - len(ids)) + ids for ids in rows))
    with pytest.raises(AssertionError):
        _assert_agree(_calibrate(path, padded), oracle.seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ranges_are_taken_in_the_models_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make_llama(tmp_path / "hf", dtype=dtype, tokenizer=False)
    ranges = _calibrate(path, _samples())
    seen = Oracle(load_model(path, dtype), _samples()).seen
    for linear, amax in ranges.inputs.items():
        assert torch.equal(amax, amax.to(dtype).float())
        # A rounding step of the dtype here or there, carried through two layers.
        torch.testing.assert_close(amax, seen[linear], rtol=0.05, atol=0.05)


def test_groups_of_samples_give_the_same_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    whole = _calibrate(path, _samples())
    # 64 elements of float32 a token: groups of at most 20 tokens.
    monkeypatch.setattr(calibrate_module, "_MAX_HIDDEN_BYTES", 20 * 64 * 4)
    parts = _calibrate(path, _samples())
    for linear, amax in whole.inputs.items():
        torch.testing.assert_close(parts.inputs[linear], amax, rtol=1e-5, atol=1e-5)
    for name in ("keys", "values", "qkv_outputs"):
        ours, theirs = getattr(parts, name), getattr(whole, name)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_quantisation_asked_for_does_not_matter(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    plain = _calibrate(path, _samples())
    with open_artifact(path) as artifact:
        quantization = QuantConfig(quant_algo="FP8", kv_cache_quant_algo="INT8")
        config = type(artifact.config).from_dict(
            artifact.config.to_dict()
            | {
                "quantization": {
                    "quant_algo": quantization.quant_algo,
                    "kv_cache_quant_algo": quantization.kv_cache_quant_algo,
                },
                "mapping": {"world_size": 2, "tp_size": 2},
                "use_parallel_embedding": True,
            }
        )
        other = calibrate(artifact.source, config, _samples(), device="cpu")
    assert all(torch.equal(plain.inputs[name], other.inputs[name]) for name in plain.inputs)


def test_nan_in_a_model_is_refused(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False, dtype=torch.float16)
    weights = load_file(path / "model.safetensors")
    # Finite, and too large for what follows.
    weights["model.layers.1.post_attention_layernorm.weight"].fill_(60000.0)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"NaN or infinity in .*layers\.1\.mlp"):
        _calibrate(path, _samples())


def test_ranges_on_a_full_disk_are_an_error_of_the_system(tmp_path: Path) -> None:
    """Which staging turns into a sentence; the safetensors library has an error of its own."""
    (tmp_path / ".ranges.safetensors.tmp").symlink_to("/dev/full")
    one = torch.ones(1)
    ranges = ActivationRanges({}, one, one, torch.ones(1, 3))
    with pytest.raises(OSError, match="No space left"):
        ranges.save(tmp_path / "ranges.safetensors")
    assert not (tmp_path / "ranges.safetensors").exists()


def test_saved_ranges_are_read_again(tmp_path: Path) -> None:
    path = make_llama(tmp_path / "hf", tokenizer=False)
    ranges = _calibrate(path, _samples())
    (tmp_path / "kept").mkdir()
    for _ in range(2):  # in place of an earlier one
        ranges.save(tmp_path / "kept" / "ranges.safetensors")
    assert [file.name for file in (tmp_path / "kept").iterdir()] == ["ranges.safetensors"]
    with open_artifact(path) as artifact:
        again = ActivationRanges.load(tmp_path / "kept" / "ranges.safetensors", artifact.config)
    assert again.inputs.keys() == ranges.inputs.keys()
    assert all(torch.equal(again.inputs[name], ranges.inputs[name]) for name in ranges.inputs)
    for name in ("keys", "values", "qkv_outputs"):
        assert torch.equal(getattr(again, name), getattr(ranges, name))
    with pytest.raises(CheckpointError, match="no activation range of lm_head"):
        again.input_amax("lm_head")

    other = make_llama(tmp_path / "other", tokenizer=False, intermediate_size=100)
    with open_artifact(other) as artifact, pytest.raises(CheckpointError, match="not of this mod"):
        ActivationRanges.load(tmp_path / "kept" / "ranges.safetensors", artifact.config)
