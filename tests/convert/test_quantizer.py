"""From ranges to scales, and whole conversions that calibrate and judge themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.quality_file import read_quality
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.config import (
    KV_CACHE_QUANT_ALGOS,
    QUANT_ALGOS,
    CalibrationConfig,
    ConvertConfig,
    QualityConfig,
)
from llmserve.convert.artifact import open_artifact
from llmserve.convert.calibrate import RANGES_FILE, ActivationRanges, calibrate
from llmserve.convert.converter import convert
from llmserve.convert.quantizer import Quantizer, needs_calibration
from llmserve.convert.samples import load_samples
from llmserve.errors import CheckpointError, ConfigError, QualityError
from tests.models import load_llama, make_llama

SETTINGS = CalibrationConfig(samples=5, seq_len=24)
QUALITY = QualityConfig(measure=True, samples=3, seq_len=24)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "tiny", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def ranges(source: Path) -> ActivationRanges:
    with open_artifact(source) as artifact:
        samples = load_samples(
            None,
            source,
            default="calibration",
            samples=SETTINGS.samples,
            seq_len=SETTINGS.seq_len,
            seed=SETTINGS.seed,
            vocab_size=artifact.config.vocab_size,
        )
        return calibrate(artifact.source, artifact.config, samples, device="cpu")


def _quantized(config: PretrainedConfig, **settings: Any) -> PretrainedConfig:
    return replace(config, quantization=QuantConfig(**settings))


def test_which_formats_need_calibration(source: Path) -> None:
    with open_artifact(source) as artifact:
        config = artifact.config
    without = {
        (algo, cache)
        for algo in (None, "W8A16", "FP8_PER_CHANNEL_PER_TOKEN", "FP8", "W8A8_SQ_PER_CHANNEL")
        for cache in (None, "INT8", "FP8")
        if not needs_calibration(_quantized(config, quant_algo=algo, kv_cache_quant_algo=cache))
    }
    assert without == {(None, None), ("W8A16", None), ("FP8_PER_CHANNEL_PER_TOKEN", None)}
    # The settings say the same without looking at a model.
    assert without == {
        (QUANT_ALGOS[quant], KV_CACHE_QUANT_ALGOS[cache])
        for quant in QUANT_ALGOS
        for cache in KV_CACHE_QUANT_ALGOS
        if not ConvertConfig(quant=quant, kv_cache_dtype=cache).calibrated
    }


def test_scales_of_the_kv_cache(source: Path, ranges: ActivationRanges) -> None:
    def scales(algo: str | None) -> dict[str, torch.Tensor]:
        with open_artifact(source) as artifact:
            config = _quantized(artifact.config, kv_cache_quant_algo=algo)
            return Quantizer(artifact.source, config, ranges).kv_cache_scales()

    of_int8 = scales("INT8")
    for layer in range(len(ranges.keys)):
        prefix = f"transformer.layers.{layer}.attention"
        key, value = float(ranges.keys[layer]) / 127, float(ranges.values[layer]) / 127
        assert float(of_int8[f"{prefix}.k_cache_scaling_factor"]) == pytest.approx(key)
        assert float(of_int8[f"{prefix}.v_cache_scaling_factor"]) == pytest.approx(value)
        assert float(of_int8[f"{prefix}.kv_cache_scaling_factor"]) == pytest.approx(max(key, value))
    of_fp8 = scales("FP8")
    assert of_fp8.keys() == of_int8.keys()
    assert {float(scale) for scale in of_fp8.values()} == {1.0}
    assert scales(None) == {}


def test_a_conversion_calibrates_keeps_the_ranges_and_judges_itself(
    source: Path, ranges: ActivationRanges, tmp_path: Path
) -> None:
    settings = ConvertConfig(quant="fp8", kv_cache_dtype="int8")
    out = convert(
        source, tmp_path / "out", settings=settings, calibration=SETTINGS, quality=QUALITY
    )
    with open_artifact(source) as artifact:
        kept = ActivationRanges.load(out / RANGES_FILE, artifact.config)
    assert all(torch.equal(kept.inputs[name], ranges.inputs[name]) for name in ranges.inputs)

    tensors = load_file(out / "rank0.safetensors")
    layer = load_llama(source).model.layers[1].mlp
    weights = [layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight]
    amax = [float(weight.detach().abs().max()) for weight in weights]
    # fc and gate are one product with one scale.
    expected = {"fc": max(amax[:2]), "gate": max(amax[:2]), "proj": amax[2]}
    for name, largest in expected.items():
        linear = f"transformer.layers.1.mlp.{name}"
        assert float(tensors[f"{linear}.weights_scaling_factor"]) == pytest.approx(largest / 448)
        input_amax = float(ranges.input_amax(linear).max())
        scale = float(tensors[f"{linear}.activation_scaling_factor"])
        assert scale == pytest.approx(input_amax / 448)

    quality = read_quality(out)
    assert quality is not None
    assert quality.measurement is not None
    assert (quality.measurement.reference, quality.measurement.candidate) == (
        "bfloat16",
        "FP8 + INT8 KV",
    )
    assert 0 < quality.measurement.mean_kl < 0.05
    assert quality.source
    assert len(quality.quantization_error) == 2 * 5

    # Another conversion may start from what was kept, and gives the same bytes.
    again = convert(
        source,
        tmp_path / "again",
        settings=settings,
        calibration=CalibrationConfig(path=out / RANGES_FILE),
    )
    file = "rank0.safetensors"
    assert (again / file).read_bytes() == (out / file).read_bytes()
    with pytest.raises(ConfigError, match=r"given with .*activation_ranges.* leave them out"):
        convert(
            source,
            tmp_path / "third",
            settings=settings,
            calibration=CalibrationConfig(path=out / RANGES_FILE, samples=3),
        )


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_ranges_that_are_no_magnitudes(
    source: Path, ranges: ActivationRanges, tmp_path: Path, value: float
) -> None:
    file = tmp_path / "ranges.safetensors"
    ranges.save(file)
    tensors = load_file(file)
    tensors["transformer.layers.1.mlp.fc.input_amax"][5] = value
    save_file(tensors, file)
    settings = ConvertConfig(quant="int8_sq")
    with pytest.raises(CheckpointError, match=rf"{file} holds {value} in .*layers.1.mlp.fc"):
        convert(
            source, tmp_path / "out", settings=settings, calibration=CalibrationConfig(path=file)
        )


@pytest.mark.parametrize("limit", [{"max_kl": 1e-9}, {"min_top1": 1.0}])
def test_a_conversion_that_misses_a_limit_leaves_nothing(
    source: Path, tmp_path: Path, limit: dict[str, float]
) -> None:
    # In bfloat16 a handful of positions may agree: enough are asked for that some do not.
    quality = QualityConfig(samples=38, seq_len=40, **limit)
    with pytest.raises(QualityError, match=r"\(--(max-kl|min-top1)\)"):
        convert(
            source,
            tmp_path / "out",
            settings=ConvertConfig(quant="fp8"),
            calibration=SETTINGS,
            quality=quality,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_was_measured_does_not_pass_its_figures_on(
    source: Path, tmp_path: Path
) -> None:
    told = source / "quality.json"
    told.write_text(json.dumps({"digest_algorithm": "of the source", "measurement": {}}))
    try:
        out = convert(source, tmp_path / "out", settings=ConvertConfig(quant="fp8_rowwise"))
    finally:
        told.unlink()
    quality = read_quality(out)
    assert quality is not None
    assert quality.measurement is None
    assert quality.digest_algorithm == "blake3"
