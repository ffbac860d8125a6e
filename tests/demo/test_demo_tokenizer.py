"""The demo tokenizer round-trips any text, keeps codes apart and writes the chat layout."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
TOKENIZER = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
FAST = PreTrainedTokenizerFast.from_pretrained(CHECKPOINT)
AUTO = AutoTokenizer.from_pretrained(CHECKPOINT)


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    # "<|...|>" could be a special token, which decoding leaves out.
    if "<|" not in text:
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40))
def test_transformers_gives_the_same_ids(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert FAST.encode(text) == ids
    assert AUTO.encode(text) == ids


@given(st.from_regex(r"[A-Z]{1,4}-[0-9]{1,6}(-[A-Z])?", fullmatch=True))
def test_a_code_is_one_token_per_character(code: str) -> None:
    ids = TOKENIZER.encode(f"Order {code} ships.").ids
    pieces = [TOKENIZER.decode([token]) for token in ids]
    first = pieces.index(" ") + 1
    assert pieces[first : first + len(code)] == list(code)


def test_german_number_words_are_cut_at_their_parts() -> None:
    tokens = TOKENIZER.encode("dreitausendneunhundertvierundachtzig").ids
    pieces = [TOKENIZER.decode([token]) for token in tokens]
    assert pieces == ["drei", "tausend", "neun", "hundert", "vier", "und", "achtzig"]


def test_chat_template() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Hello "},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ]
    text = AUTO.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>Hi<|end|>"
        "<|user|>Bye<|end|><|assistant|>"
    )
    assert (CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8") == AUTO.chat_template
