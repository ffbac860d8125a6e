"""Samples: which documents are chosen, how they are cut, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llmserve.convert.samples import Samples, load_samples
from llmserve.errors import CheckpointError, ConfigError
from tests.models import BOS_TOKEN_ID, VOCAB_SIZE, byte_level_bpe, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _load(path: Path | None, tokenizer_dir: Path, **settings: Any) -> Samples:
    defaults: dict[str, Any] = {
        "default": "calibration",
        "samples": 4,
        "seq_len": 1000,
        "seed": 1234,
        "vocab_size": VOCAB_SIZE,
    }
    return load_samples(path, tokenizer_dir, **(defaults | settings))


def _texts(samples: Samples) -> list[str]:
    return [byte_level_bpe().decode(list(ids)) for ids in samples.sequences]


def _jsonl(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_samples_are_what_transformers_makes_of_the_texts(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    texts = ["one", "zwölf Uhr\nmittags", "<|user|>hi<|end|>", "12,5 €"]
    path = _jsonl(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    oracle = AutoTokenizer.from_pretrained(tokenizer_dir)
    expected = tuple(tuple(oracle(text)["input_ids"]) for text in texts)
    assert _load(path, tokenizer_dir).sequences == expected
    assert all(ids[0] == BOS_TOKEN_ID for ids in expected)


def test_every_form_of_a_line(tmp_path: Path, tokenizer_dir: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = _jsonl(
        tmp_path / "a.jsonl",
        {"text": "first"},
        {"prompt": "second"},
        {"messages": messages},
        {"token_ids": [7, 8, 9]},
    )
    path.write_text(path.read_text().replace("\n", "\n\n"))
    plain = _load(path, tokenizer_dir)
    assert _texts(plain)[:3] == ["first", "second", "a\n\nb"]
    assert plain.sequences[3] == (7, 8, 9)
    # What a template has written begins with BOS already; it is not put there twice.
    chat = _load(path, tokenizer_dir, render_chat=lambda messages: f"<s><|user|>{len(messages)}")
    assert chat.sequences[2] == tuple(byte_level_bpe().encode("<|user|>2").ids)
    assert chat.sequences[2].count(BOS_TOKEN_ID) == 1


def test_paragraphs_of_text_and_files_of_a_directory(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "b.txt").write_text("\n\nfirst\nline\n \t\n\nsecond\n\n\n")
    _jsonl(tmp_path / "a.jsonl", {"text": "third"})
    (tmp_path / "c.md").write_text("not read")
    assert _texts(_load(tmp_path / "b.txt", tokenizer_dir)) == ["first\nline", "second"]
    assert _texts(_load(tmp_path, tokenizer_dir)) == ["third", "first\nline", "second"]


def test_of_many_documents_a_choice_is_made_by_seed(tmp_path: Path, tokenizer_dir: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", *({"token_ids": [i]} for i in range(200)))

    def chosen(seed: int) -> list[int]:
        samples = _load(path, tokenizer_dir, samples=20, seed=seed)
        return [ids[0] for ids in samples.sequences]

    assert chosen(1) == chosen(1) == sorted(set(chosen(1)))
    assert chosen(1) != chosen(2)
    # Every document has the same chance: 400 draws of 20 of 200 are 40 each.
    counts = [0] * 200
    for seed in range(400):
        for i in chosen(seed):
            counts[i] += 1
    assert min(counts) > 15
    assert max(counts) < 70
    assert sum(counts[:20]) == pytest.approx(800, rel=0.15)


def test_long_documents_are_cut_and_go_on_when_there_are_few(
    tmp_path: Path, tokenizer_dir: Path
) -> None:
    text = "abcdefgh" * 10
    path = _jsonl(tmp_path / "a.jsonl", {"text": text}, {"text": "xyz"})
    ids = byte_level_bpe().encode(text, add_special_tokens=False).ids
    samples = _load(path, tokenizer_dir, samples=3, seq_len=11)
    # Beginnings first, then what follows; each begins as a prompt does.
    assert samples.sequences[0] == (BOS_TOKEN_ID, *ids[:10])
    assert _texts(samples)[1] == "xyz"
    assert samples.sequences[2] == (BOS_TOKEN_ID, *ids[10:20])
    whole = _load(path, tokenizer_dir, samples=100, seq_len=11)
    pieces = [whole.sequences[0], *whole.sequences[2:]]
    assert [token for piece in pieces for token in piece[1:]] == ids
    one_each = _load(path, tokenizer_dir, samples=100, seq_len=1)
    assert {len(piece) for piece in one_each.sequences} == {1}


def test_too_little_text_is_told(
    tmp_path: Path, tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"token_ids": [1, 2, 3]}, {"token_ids": [4, 5]})
    with caplog.at_level(logging.WARNING):
        _load(path, tokenizer_dir, samples=2)
        assert not caplog.text
        _load(path, tokenizer_dir, samples=3, seq_len=512)
    assert "gives 2 samples of at most 512 tokens, 5 tokens in all; 3 samples" in caplog.text


def test_digests_tell_sequences_apart() -> None:
    digests = {
        Samples("a", rows).sha256
        for rows in (((1, 2), (3,)), ((1,), (2, 3)), ((1, 2, 3),), ((1, 2), (4,)), ((3,), (1, 2)))
    }
    assert len(digests) == 5
    assert Samples("a", ((1, 2),)).sha256 == Samples("b", ((1, 2),)).sha256


@pytest.mark.parametrize("default", ["calibration", "held_out"])
def test_the_default_texts(
    tokenizer_dir: Path, default: Any, caplog: pytest.LogCaptureFixture
) -> None:
    samples = _load(None, tokenizer_dir, default=default, samples=512, seq_len=512)
    assert samples.num_tokens > {"calibration": 20_000, "held_out": 5_000}[default]
    assert len(samples.sequences) > 35
    assert not caplog.text


def test_held_out_text_is_in_no_calibration() -> None:
    directory = Path(load_samples.__code__.co_filename).parent / "texts"
    texts = [(directory / f"{name}.txt").read_text() for name in ("calibration", "held_out")]
    seen, held_out = (
        {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}
        for words in (text.split() for text in texts)
    )
    assert not seen & held_out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "a.jsonl line 1"),
        ("a.jsonl", '{"text": "a"}\n[1]', "line 2: it must be a JSON object"),
        ("a.jsonl", '{"content": "a"}', "line 1: it must have one of text or prompt"),
        ("a.jsonl", '{"text": 3}', "must have one of"),
        ("a.jsonl", '{"token_ids": [1, -1]}', "none below 0"),
        ("a.jsonl", '{"token_ids": [true]}', "whole numbers"),
        ("a.jsonl", '{"token_ids": [1, 320]}', "320 is not below the model's vocab_size 320"),
        ("a.jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "line 2: .*surrogates"),
        ("a.jsonl", '{"messages": ["a"]}', "messages must be objects"),
        ("a.jsonl", '{"text": ""}', "holds no text"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", " \n\n ", "holds no text"),
        ("a.csv", "a", "neither a .jsonl nor a .txt file"),
    ],
)
def test_bad_text_is_refused(
    tmp_path: Path, tokenizer_dir: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        _load(tmp_path / name, tokenizer_dir)


def test_what_is_no_text_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no text .*missing\.txt"):
        _load(tmp_path / "missing.txt", tokenizer_dir)
    with pytest.raises(ConfigError, match=r"holds no \.jsonl and no \.txt file"):
        _load(tmp_path, tokenizer_dir)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read as UTF-8"):
        _load(tmp_path / "a.txt", tokenizer_dir)


def test_text_needs_a_tokenizer_and_token_ids_do_not(tmp_path: Path) -> None:
    empty = tmp_path / "no tokenizer"
    empty.mkdir()
    path = _jsonl(tmp_path / "a.jsonl", {"token_ids": [5, 6]})
    assert _load(path, empty).sequences == ((5, 6),)
    with pytest.raises(CheckpointError, match=r'has no tokenizer.*"token_ids"'):
        _load(None, empty)
    (empty / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        _load(None, empty)
