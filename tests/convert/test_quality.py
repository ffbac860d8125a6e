"""Perplexity, KL and top-1 against figures computed here, in float64, from transformers' logits."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.build.native import build
from llmserve.checkpoint.quality_file import Measurement, read_quality, write_measurement
from llmserve.config import BuildConfig
from llmserve.convert import quality as quality_module
from llmserve.convert.artifact import open_artifact
from llmserve.convert.converter import convert
from llmserve.convert.quality import Totals, check_limits, measure
from llmserve.convert.samples import Samples
from llmserve.errors import CheckpointError, QualityError, UnsupportedCheckpointError
from llmserve.quantization import weight_format
from llmserve.runtime.torch.kernels import linear as linear_kernels
from tests.models import VOCAB_SIZE, load_llama, make_llama, make_model
from tests.sharded import shard_checkpoint

LENGTHS = (20, 7, 1, 33)


def _samples(seed: int = 11) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]
    return Samples("random", tuple(map(tuple, rows)))


def _measure(reference: Path, candidate: Path, samples: Samples | None = None) -> Measurement:
    with open_artifact(reference) as first, open_artifact(candidate) as second:
        return measure(first, second, samples or _samples(), device="cpu")


def _figures(measured: Measurement) -> dict[str, float]:
    return {name: v for name, v in asdict(measured).items() if not isinstance(v, str)}


def _nudged(source: Path, path: Path, scale: float) -> Path:
    """The same checkpoint with a little noise in one weight."""
    path.mkdir()
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(1))
    weights[name] += scale * noise
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


def _expected(reference: torch.nn.Module, candidate: torch.nn.Module) -> dict[str, float]:
    """The definitions, a token at a time in Python's floats."""
    losses: dict[str, list[float]] = {"reference": [], "candidate": []}
    kls, same = [], []
    for ids in _samples().sequences:
        with torch.no_grad():
            logits = [m(torch.tensor([ids])).logits[0].double() for m in (reference, candidate)]
        for i, following in enumerate(ids[1:]):
            p, q = (row[i].softmax(0).tolist() for row in logits)
            losses["reference"].append(-math.log(p[following]))
            losses["candidate"].append(-math.log(q[following]))
            kls.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            same.append(p.index(max(p)) == q.index(max(q)))
    count = len(kls)
    return {
        "num_tokens": count,
        "reference_perplexity": math.exp(math.fsum(losses["reference"]) / count),
        "perplexity": math.exp(math.fsum(losses["candidate"]) / count),
        "mean_kl": math.fsum(kls) / count,
        "max_kl": max(kls),
        "top1_agreement": sum(same) / count,
    }


def test_figures_are_those_of_transformers_logits(tmp_path: Path) -> None:
    reference = make_llama(tmp_path / "a", tokenizer=False)
    candidate = _nudged(reference, tmp_path / "b", 0.02)
    measured = _measure(reference, candidate)
    expected = _expected(load_llama(reference), load_llama(candidate))
    assert 0.5 < expected["top1_agreement"] < 1
    assert {name: getattr(measured, name) for name in expected} == pytest.approx(expected, rel=1e-4)
    assert (measured.num_tokens, measured.num_samples) == (sum(LENGTHS) - 4, 3)
    assert (measured.reference, measured.candidate) == ("float32", "float32")
    assert (measured.text, measured.tokens_sha256) == ("random", _samples().sha256)


def test_kl_is_taken_from_the_reference(tmp_path: Path) -> None:
    first = make_llama(tmp_path / "a", tokenizer=False)
    second = make_llama(tmp_path / "b", tokenizer=False, seed=1)
    there, back = _measure(first, second), _measure(second, first)
    assert there.mean_kl != pytest.approx(back.mean_kl, rel=1e-2)
    assert there.perplexity == pytest.approx(back.reference_perplexity, rel=1e-12)
    expected = _expected(load_llama(first), load_llama(second))
    assert there.mean_kl == pytest.approx(expected["mean_kl"], rel=1e-4)


@pytest.mark.parametrize("quant", ["w8a16", "fp8_rowwise"])
def test_a_quantised_checkpoint_and_its_engine(
    tmp_path: Path, quant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that weights alone are rounded, whatever products this machine has.
    monkeypatch.setattr(linear_kernels, "int8_products_pay", lambda: False)
    source = make_llama(tmp_path / "hf", tokenizer=False)
    checkpoint = convert(source, tmp_path / "c", quant=quant)
    engine = build(checkpoint, tmp_path / "e", BuildConfig(max_seq_len=64))
    measured = _measure(source, checkpoint)
    algo = {"w8a16": "W8A16", "fp8_rowwise": "FP8_PER_CHANNEL_PER_TOKEN"}[quant]
    assert (measured.reference, measured.candidate) == ("float32", algo)
    # What the checkpoint holds plain is quantised when it is run: the engine gives the same.
    assert asdict(_measure(source, engine)) == asdict(measured)

    # transformers, with every linear rounded to the format's grid and back.
    rounded = load_llama(source)
    with torch.no_grad():
        for layer in rounded.model.layers:
            for linear in layer.modules():
                if isinstance(linear, torch.nn.Linear):
                    algorithm = weight_format(algo)
                    stored = algorithm.quantize(linear.weight)
                    linear.weight.copy_(algorithm.dequantize(stored))
    expected = _expected(load_llama(source), rounded)
    assert measured.perplexity == pytest.approx(expected["perplexity"], rel=1e-4)
    assert measured.mean_kl == pytest.approx(expected["mean_kl"], rel=1e-2)
    assert 0 < measured.mean_kl < 0.05


def test_a_model_against_itself_loses_nothing(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", tokenizer=False, dtype=torch.bfloat16)
    checkpoint = convert(source, tmp_path / "c")
    measured = _measure(source, checkpoint)
    assert (measured.mean_kl, measured.max_kl, measured.top1_agreement) == (0.0, 0.0, 1.0)
    assert measured.perplexity == measured.reference_perplexity
    two = shard_checkpoint(checkpoint, tmp_path / "tp2", 2)
    assert asdict(_measure(checkpoint, two)) == asdict(measured)


@pytest.mark.parametrize("family", ["mixtral", "gemma3_text"])
def test_other_families_and_tied_embeddings(tmp_path: Path, family: str) -> None:
    source = make_model(tmp_path / "hf", family, tokenizer=False)
    measured = _measure(source, convert(source, tmp_path / "c"))
    assert (measured.mean_kl, measured.top1_agreement) == (0.0, 1.0)


def test_groups_and_chunks_give_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = make_llama(tmp_path / "a", tokenizer=False)
    candidate = _nudged(reference, tmp_path / "b", 0.02)
    whole = _measure(reference, candidate)
    rows: list[int] = []
    add = Totals.add

    def counted(self: Totals, p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor) -> None:
        rows.append(len(p))
        add(self, p, q, ids)

    monkeypatch.setattr(Totals, "add", counted)
    monkeypatch.setattr(quality_module, "_MAX_HIDDEN_BYTES", 30 * 2 * 64 * 4)
    monkeypatch.setattr(quality_module, "_MAX_LOGITS", 8 * VOCAB_SIZE)
    parts = _measure(reference, candidate)
    # Groups of 20 + 7 and of 33 tokens; never more than 8 rows of logits at a time.
    assert rows == [8, 8, 8, 1, 8, 8, 8, 8]
    assert _figures(parts) == pytest.approx(_figures(whole), rel=1e-4)


def test_nan_names_the_model_at_fault(tmp_path: Path) -> None:
    good = make_llama(tmp_path / "a", tokenizer=False, dtype=torch.float16)
    bad = make_llama(tmp_path / "b", tokenizer=False, dtype=torch.float16)
    weights = load_file(bad / "model.safetensors")
    weights["model.norm.weight"].fill_(60000.0)
    weights["lm_head.weight"].fill_(60000.0)
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(QualityError, match="the candidate computes NaN or infinity"):
        _measure(good, bad)
    with pytest.raises(QualityError, match="the reference computes NaN or infinity"):
        _measure(bad, good)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "a", tokenizer=False)
    other = make_llama(tmp_path / "b", tokenizer=False, vocab_size=400)
    with pytest.raises(CheckpointError, match="vocab_size of 320 and the candidate one of 400"):
        _measure(source, other)
    with pytest.raises(QualityError, match="no sequence of two tokens"):
        _measure(source, source, Samples("short", ((1,), (2,))))
    engine = tmp_path / "engine"
    engine.mkdir()
    (engine / "config.json").write_text('{"pretrained_config": {}, "build_config": {}}')
    with pytest.raises(UnsupportedCheckpointError, match="name the checkpoint"):
        _measure(source, engine)


MEASUREMENT = Measurement(
    reference="bfloat16",
    candidate="FP8",
    text="a text",
    tokens_sha256="00ff",
    num_samples=2,
    num_tokens=64,
    reference_perplexity=8.25,
    perplexity=8.5,
    mean_kl=0.0125,
    max_kl=0.5,
    top1_agreement=0.96875,
)


def test_limits() -> None:
    check_limits(MEASUREMENT, None, None)
    check_limits(MEASUREMENT, 0.0125, 0.96875)
    with pytest.raises(QualityError) as raised:
        check_limits(MEASUREMENT, 0.01, None)
    assert str(raised.value) == (
        "FP8: the mean KL divergence is 0.0125 nats a token, above the limit of 0.01 (--max-kl)"
    )
    with pytest.raises(QualityError, match=r"0\.96875, below the limit of 0\.97 \(--min-top1\)"):
        check_limits(MEASUREMENT, None, 0.97)
    with pytest.raises(QualityError, match=r"--max-kl.*--min-top1"):
        check_limits(MEASUREMENT, 0.0, 1.0)


def test_a_measurement_goes_beside_what_the_conversion_wrote(tmp_path: Path) -> None:
    assert read_quality(tmp_path) is None
    record = {
        "digest_algorithm": "blake3",
        "source": {"model.safetensors": {"digest": "aa", "tensors": {"w": "bb"}}},
        "result": {"rank0.safetensors": {"digest": "cc", "tensors": {}}},
        "quantization_error": {"w": 0.25},
        "of a later version": [1],
    }
    (tmp_path / "quality.json").write_text(json.dumps(record))
    write_measurement(tmp_path, MEASUREMENT)
    written = json.loads((tmp_path / "quality.json").read_text())
    assert written == record | {"measurement": asdict(MEASUREMENT)}
    better = replace(MEASUREMENT, mean_kl=0.01)
    write_measurement(tmp_path, better)
    quality = read_quality(tmp_path)
    assert quality is not None
    assert quality.measurement == better
    assert (quality.source, quality.result) == (
        {"model.safetensors": "aa"},
        {"rank0.safetensors": "cc"},
    )
    assert quality.quantization_error == {"w": 0.25}
    assert [path.name for path in tmp_path.iterdir()] == ["quality.json"]

    (tmp_path / "quality.json").write_text('{"measurement": {"perplexity": 1}}')
    with pytest.raises(CheckpointError, match=r"quality\.json is damaged: measurement lacks ref"):
        read_quality(tmp_path)
    (tmp_path / "quality.json").write_text("[]")
    with pytest.raises(CheckpointError, match="no JSON object"):
        write_measurement(tmp_path, MEASUREMENT)


def test_an_engine_has_the_quality_of_its_checkpoint(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", tokenizer=False)
    checkpoint = convert(source, tmp_path / "c", quant="w8a16")
    write_measurement(checkpoint, MEASUREMENT)
    engine = build(checkpoint, tmp_path / "e", BuildConfig(max_seq_len=64))
    assert read_quality(engine) == read_quality(checkpoint)
