"""The generated answers agree with num2words and Babel, and the held-out split holds."""

from __future__ import annotations

import datetime as dt
import random
import re

import demo_data
import pytest
from babel.dates import format_date
from num2words import num2words


def examples(split: demo_data.Split, count: int, seed: int = 5) -> list[demo_data.Example]:
    rng = random.Random(seed)
    names = demo_data.CATEGORIES
    return [demo_data.make_example(rng, split, names[i % len(names)]) for i in range(count)]


@pytest.mark.parametrize("language", demo_data.LANGUAGES)
def test_number_answers_are_what_num2words_writes(language: str) -> None:
    asked = [e for e in examples("held_out", 1_000) if e.category in ("number", "digits")]
    for example in (e for e in asked if e.target == language):
        number = int(example.values[0].removeprefix("number:"))
        assert example.answer == num2words(number, lang=language)
        if example.source == "digits":
            assert example.prompt.endswith(f": {number}")
        else:
            assert example.prompt.endswith(": " + num2words(number, lang=example.source))


@pytest.mark.parametrize("language", demo_data.LANGUAGES)
def test_date_answers_are_what_babel_writes(language: str) -> None:
    asked = [e for e in examples("held_out", 2_000) if e.category == "date"]
    for example in (e for e in asked if e.target == language):
        date = dt.date.fromisoformat(example.values[0].removeprefix("date:"))
        locale = demo_data.LOCALES[language]
        plain = {format_date(date, style, locale=locale) for style in ("long", "full")}
        if language == "fr" and date.day == 1:
            plain = {re.sub(r"\b1 ", "1er ", text, count=1) for text in plain}
        assert example.answer in plain


@pytest.mark.parametrize(
    ("time", "texts"),
    [
        (dt.time(0, 5), ["12:05 AM", "0 h 05", "00:05 Uhr", "0:05"]),
        (dt.time(12, 0), ["12:00 PM", "12 h 00", "12:00 Uhr", "12:00"]),
        (dt.time(15, 5), ["3:05 PM", "15 h 05", "15:05 Uhr", "15:05"]),
    ],
)
def test_times_of_day(time: dt.time, texts: list[str]) -> None:
    assert [demo_data.time_text(time, language) for language in demo_data.LANGUAGES] == texts


def test_spanish_article_of_one_o_clock() -> None:
    assert demo_data.time_with_article(dt.time(1, 20), "es") == "la 1:20"
    assert demo_data.time_with_article(dt.time(13, 20), "es") == "las 13:20"


def test_amounts_use_the_decimal_sign_of_the_language() -> None:
    texts = {language: demo_data.amount_text(25_050, language) for language in demo_data.LANGUAGES}
    assert texts == {"en": "250.50", "fr": "250,50", "de": "250,50", "es": "250,50"}


@pytest.mark.parametrize("language", demo_data.LANGUAGES)
def test_lexicon_words_are_babels_or_in_the_item_table(language: str) -> None:
    locale = demo_data.LOCALES[language]
    days = [dt.date(2024, month, 1) for month in range(1, 13)]
    days += [dt.date(2024, 1, day) for day in range(1, 8)]
    known = {format_date(day, style, locale=locale) for day in days for style in ("LLLL", "cccc")}
    known |= {item[language] for item in demo_data.ITEMS}
    rng = random.Random(3)
    drawn = [demo_data.make_example(rng, "train", demo_data.LEXICON) for _ in range(500)]
    for example in (e for e in drawn if e.target == language):
        words = set(re.findall(r"[^\W\d_]{3,}", example.answer))
        assert words <= known
        assert example.values == ()


def test_a_notice_keeps_its_name_and_code_in_every_language() -> None:
    for example in examples("train", 1_000):
        if example.category == "notice":
            copied = [v.split(":", 1)[1] for v in example.values if v[:5] in ("name:", "code:")]
            assert len(copied) == 2
            assert all(text in example.prompt and text in example.answer for text in copied)


def test_no_held_out_value_occurs_in_training() -> None:
    trained = {value for e in examples("train", 20_000) for value in e.values}
    held_out = {value for e in demo_data.held_out_examples(2_400) for value in e.values}
    assert not trained & held_out
    assert {demo_data.split_of(value) for value in held_out} == {"held_out"}


def test_about_one_value_in_twelve_is_held_out() -> None:
    held_out = [
        n for n in range(demo_data.MAX_NUMBER + 1) if demo_data.split_of(f"number:{n}") != "train"
    ]
    assert 0.06 < len(held_out) / demo_data.MAX_NUMBER < 0.10
    assert min(held_out) > 100


def test_the_held_out_set_is_deterministic_and_without_repeats() -> None:
    first, second = demo_data.held_out_examples(500), demo_data.held_out_examples(500)
    assert first == second
    assert len({example.prompt for example in first}) == 500
    assert {example.category for example in first} == set(demo_data.CATEGORIES)


def test_a_prompt_has_one_right_answer() -> None:
    answers: dict[str, str] = {}
    for example in examples("train", 20_000):
        assert answers.setdefault(example.prompt, example.answer) == example.answer
