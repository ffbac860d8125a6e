"""Incremental detokenisation against decoding everything at once, by the tokenizers library."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from llmserve.errors import CheckpointError, UnsupportedCheckpointError
from llmserve.tokenizer import IncrementalDetokenizer, Tokenizer
from llmserve.tokenizer.token_bytes import TokenBytes
from tests.tokenizer_files import EOS_ID, write_metaspace_tokenizer, write_tokenizer

BAD = "\ufffd"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte_level": write_tokenizer(root / "byte_level"),
        "metaspace": write_metaspace_tokenizer(root / "metaspace"),
    }


@pytest.fixture(scope="module")
def ours(directories):
    return {name: Tokenizer.from_directory(path) for name, path in directories.items()}


@pytest.fixture(scope="module")
def reference(directories):
    return {
        name: tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        for name, path in directories.items()
    }


def pieces_of(tokenizer, token_ids, **kwargs):
    detokenizer = IncrementalDetokenizer(tokenizer, **kwargs)
    return [*map(detokenizer.feed, token_ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", ["byte_level", "metaspace"])
@given(text=TEXTS)
def test_pieces_of_a_text_join_to_it_and_never_cut_a_character(kind, text, ours, reference):
    text = text.replace(BAD, "?")
    ids = reference[kind].encode(text).ids
    pieces = pieces_of(ours[kind], ids)
    assert "".join(pieces) == reference[kind].decode(ids)
    assert BAD not in "".join(pieces)
    assert pieces[-1] == ""
    assert ours[kind].decode(ids) == "".join(pieces)


@given(ids=st.lists(st.integers(0, 330), max_size=60), skip=st.booleans())
def test_random_tokens_join_to_what_decoding_all_gives(ids, skip, ours, reference):
    pieces = pieces_of(ours["byte_level"], ids, skip_special_tokens=skip)
    assert "".join(pieces) == reference["byte_level"].decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.sampled_from([0, 1, 2, *range(259, 293)]), max_size=40), skip=st.booleans())
def test_random_metaspace_tokens_join_to_what_decoding_all_gives(ids, skip, ours, reference):
    pieces = pieces_of(ours["metaspace"], ids, skip_special_tokens=skip)
    assert "".join(pieces) == reference["metaspace"].decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(4, 319), max_size=60))
@example(ids=[173, 98])  # bytes ED A0, the beginning of a surrogate: never valid, and yet they wait
def test_at_most_the_bytes_of_one_character_wait(ids, ours):
    """Whatever comes, garbage too: all but the last three bytes' worth of text is out."""
    tokenizer = ours["byte_level"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    raw, out = b"", ""
    for token_id in ids:
        raw += tokenizer.token_to_bytes(token_id)
        out += detokenizer.feed(token_id)
        whole = raw.decode("utf-8", "replace")
        assert whole.startswith(out)
        assert whole[len(out) :] in ("", BAD, BAD * 2)


def test_a_long_run_of_bytes_that_are_no_text_is_not_held_back(ours):
    tokenizer = ours["byte_level"]
    continuation = next(i for i in range(320) if tokenizer.token_to_bytes(i) == b"\x80")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.feed(continuation) for _ in range(1000)] == [BAD] * 1000


@given(text=TEXTS, data=st.data())
def test_an_answer_continues_its_prompt_even_within_a_character(text, data, ours):
    tokenizer = ours["byte_level"]
    ids = tokenizer.encode(text)
    split = data.draw(st.integers(0, len(ids)))
    pieces = pieces_of(tokenizer, ids[split:], prompt_token_ids=ids[:split])
    before = b"".join(map(tokenizer.token_to_bytes, ids[:split])).decode(errors="ignore")
    assert before + "".join(pieces) == text


def test_the_leading_space_of_a_continuation_stays(ours):
    tokenizer = ours["metaspace"]
    prompt, answer = tokenizer.encode("the"), tokenizer.encode("the")
    assert "".join(pieces_of(tokenizer, answer)) == "the"
    assert "".join(pieces_of(tokenizer, answer, prompt_token_ids=prompt)) == " the"
    bos, eos = 1, 2
    assert "".join(pieces_of(tokenizer, answer, prompt_token_ids=[bos])) == "the"
    far = [bos, *prompt, *[eos] * 8]
    assert "".join(pieces_of(tokenizer, answer, prompt_token_ids=far)) == " the"


def test_byte_fallback_joins_bytes_to_a_character(ours):
    tokenizer = ours["metaspace"]
    ids = tokenizer.encode("日")
    assert pieces_of(tokenizer, ids)[-4:] == ["", "", "日", ""]


def test_a_cut_character_shows_at_the_end(ours):
    tokenizer = ours["byte_level"]
    ids = tokenizer.encode("a日")
    assert pieces_of(tokenizer, ids[:-1]) == ["a", "", "", BAD]


def test_special_tokens_are_left_out_or_shown(ours):
    tokenizer = ours["byte_level"]
    ids = [*tokenizer.encode("a"), EOS_ID, *tokenizer.encode("b")]
    assert "".join(pieces_of(tokenizer, ids)) == "ab"
    assert "".join(pieces_of(tokenizer, ids, skip_special_tokens=False)) == "a<|endoftext|>b"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "ByteLevel"}, {"type": "CTC"}]},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 1},
    ],
)
def test_a_decoder_that_does_more_than_join_bytes_is_refused(decoder):
    with pytest.raises(UnsupportedCheckpointError, match="decoder") as info:
        TokenBytes.from_decoder(decoder)
    assert isinstance(info.value, CheckpointError)


def test_the_metaspace_decoder_strips_one_space(reference):
    to_bytes = TokenBytes.from_decoder(
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    )
    assert (to_bytes("▁he"), to_bytes.strip_left) == (b" he", (" ", 1))
    never = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}
    assert TokenBytes.from_decoder(never).strip_left == ("", 0)
