"""A layer at a time gives what the whole decoder gives, which is held against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmserve.build.native import build
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.checkpoint.reader import RankReader
from llmserve.config import BuildConfig
from llmserve.convert.converter import convert
from llmserve.errors import ConfigError
from llmserve.runtime.torch import layerwise
from llmserve.runtime.torch.layerwise import LayerwiseModel, row_chunks, token_groups
from tests.models import FAMILIES, VOCAB_SIZE, load_model, make_model
from tests.runtime.torch_engines import MAX_SEQ_LEN, make_engine, open_runner, prompt_logits

# Lengths on both sides of the small windows, and one that fills a batch by itself.
LENGTHS = (5, 40, 1, 23, 64, 12)
CPU = torch.device("cpu")


def _sequences(seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


@contextmanager
def _opened(engine: Path) -> Iterator[LayerwiseModel]:
    config, _ = read_engine(engine)
    with RankReader(engine / "rank0.safetensors") as reader:
        yield LayerwiseModel(reader, config, device=CPU)


def _logits(engine: Path, sequence: list[int]) -> torch.Tensor:
    with _opened(engine) as model, torch.inference_mode():
        return model.head()(model.hidden_states([sequence]))


def _runner_logits(engine: Path, sequence: list[int]) -> torch.Tensor:
    return prompt_logits(open_runner(engine), sequence)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    make_model(path / "hf", request.param, tokenizer=False)
    convert(path / "hf", path / "checkpoint")
    return build(path / "checkpoint", path / "engine", BuildConfig(max_seq_len=MAX_SEQ_LEN))


def test_one_sequence_gives_the_decoders_logits_bit_for_bit(engine: Path) -> None:
    # Longer than a long rope's original context, as the runner's limit is: the same factors.
    sequence = _sequences()[1]
    assert torch.equal(_logits(engine, sequence), _runner_logits(engine, sequence))


def test_a_long_ropes_factors_follow_the_longest_sequence(tmp_path: Path) -> None:
    make_model(tmp_path / "hf", "phi3", tokenizer=False)
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    engine = build(tmp_path / "checkpoint", tmp_path / "engine")
    original = read_engine(engine)[0].original_max_position_embeddings
    assert original is not None
    sequence = _sequences()[4]
    assert len(sequence) > original
    with torch.no_grad():
        theirs = load_model(tmp_path / "hf")(torch.tensor([sequence[:original]])).logits[0]
    short = _logits(engine, sequence[:original])
    torch.testing.assert_close(short, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(short, _logits(engine, sequence)[:original], atol=1e-2)


def test_many_sequences_give_what_each_gives_alone(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = read_engine(engine)
    sequences = _sequences()
    if config.original_max_position_embeddings is not None:
        sequences = [ids[: config.original_max_position_embeddings] for ids in sequences]
    monkeypatch.setattr(layerwise, "_BATCH_TOKENS", 64)
    with _opened(engine) as model:
        together = model.hidden_states(sequences).split([len(ids) for ids in sequences])
        for ids, states in zip(sequences, together, strict=True):
            torch.testing.assert_close(states, model.hidden_states([ids]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant", ["w8a16", "fp8_rowwise"])
def test_a_quantised_engine_gives_its_runners_logits(tmp_path: Path, quant: str) -> None:
    engine = make_engine(tmp_path, quant=quant)
    sequence = _sequences()[1]
    assert torch.equal(_logits(engine, sequence), _runner_logits(engine, sequence))


class _Counter:
    """Rows that each linear and each layer's cache has shown."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, str], int] = {}

    def saw_linear(self, layer: int, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        assert len(x) == len(y)
        self.rows[layer, name] = self.rows.get((layer, name), 0) + len(x)

    def saw_key_value(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        assert key.shape == value.shape
        self.rows[layer, "kv"] = self.rows.get((layer, "kv"), 0) + len(key)


def test_an_observer_sees_every_token_once(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_BATCH_TOKENS", 64)
    config, _ = read_engine(engine)
    counter = _Counter()
    with _opened(engine) as model:
        observed = model.hidden_states(_sequences(), counter)
        assert torch.equal(observed, model.hidden_states(_sequences()))
    # Each token goes through top_k experts.
    of_experts = {"mlp.fc": 0, "mlp.proj": 0}
    for (layer, name), rows in counter.rows.items():
        if config.moe is not None and name.startswith("mlp."):
            of_experts[name.rpartition(".")[0]] += rows if layer == 0 else 0
        else:
            assert rows == sum(LENGTHS), name
    if config.moe is not None:
        assert set(of_experts.values()) == {config.moe.top_k * sum(LENGTHS)}
    assert {layer for layer, _ in counter.rows} == set(range(config.num_hidden_layers))


def test_a_sequence_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, max_position_embeddings=256)
    with (
        _opened(engine) as model,
        pytest.raises(ConfigError, match=r"257 tokens.*at most 256"),
    ):
        model.hidden_states([[0] * 257])


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_token_groups_keep_order_and_bound(lengths: list[int], max_tokens: int) -> None:
    sequences = [[i] * n for i, n in enumerate(lengths)]
    groups = token_groups(sequences, max_tokens)
    assert [ids for group in groups for ids in group] == sequences
    for group in groups:
        assert group
        assert len(group) == 1 or sum(map(len, group)) <= max_tokens
    for one, other in pairwise(groups):
        assert sum(map(len, one)) + len(other[0]) > max_tokens


@given(st.integers(0, 500), st.integers(1, 100), st.integers(1, 400))
def test_row_chunks_cover_all_rows_and_keep_the_bound(rows: int, vocab: int, most: int) -> None:
    chunks = list(row_chunks(rows, vocab, most))
    assert [row for chunk in chunks for row in range(chunk.start, chunk.stop)] == list(range(rows))
    for chunk in chunks:
        assert chunk.stop - chunk.start == 1 or (chunk.stop - chunk.start) * vocab <= most
