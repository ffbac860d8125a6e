"""Stop strings against a reference that sees the whole text at once."""

from __future__ import annotations

import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmserve.tokenizer import StopStringMatcher

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def cut(text: str, stop: list[str], include: bool, least: int = 1) -> tuple[str, str | None]:
    """The text up to the first stop string that ends at ``least`` or later, and which it was."""
    for end in range(least, len(text) + 1):
        complete = [s for s in stop if text[:end].endswith(s)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def longest_possible_beginning(text: str, stop: list[str]) -> int:
    """How many last characters of a text may still become a stop string that is not there yet."""
    return max(
        (k for s in stop for k in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:k])),
        default=0,
    )


@given(pieces=st.lists(st.text("ab", max_size=6), max_size=12), stop=STOPS, include=st.booleans())
@example(pieces=["aaaa", "b"], stop=["aaab"], include=False)
@example(pieces=["ab", "cd"], stop=["abcd", "bc"], include=False)
def test_any_split_gives_what_the_whole_text_gives(pieces, stop, include):
    matcher = StopStringMatcher(stop, include_stop_str_in_output=include)
    came_out, went_in = "", ""
    for piece in pieces:
        came_out += matcher.feed(piece)
        went_in += piece
        text, found = cut(went_in, stop, include)
        assert matcher.matched == found
        if found is None:
            # What is certain is out, and what is not is held back: no more, no less.
            held = longest_possible_beginning(went_in, stop)
            assert came_out == went_in[: len(went_in) - held]
        else:
            assert came_out == text
    came_out += matcher.flush()
    assert (came_out, matcher.matched) == cut(went_in, stop, include)


@given(
    early=st.lists(st.text("ab", max_size=6), max_size=6),
    late=st.lists(st.text("ab", max_size=6), max_size=6),
    stop=STOPS,
    include=st.booleans(),
)
@example(early=["aa"], late=["a"], stop=["aa"], include=False)
@example(early=["ab", "ab"], late=["", "a"], stop=["ab", "ba"], include=False)
@example(early=["abab"], late=["a"], stop=["ababa", "bab"], include=True)
def test_what_is_complete_too_early_is_passed_over(early, late, stop, include):
    matcher = StopStringMatcher(stop, include_stop_str_in_output=include)
    came_out, went_in = "", ""
    for piece in early:
        came_out += matcher.feed(piece, may_end=False)
        went_in += piece
        held = longest_possible_beginning(went_in, stop)
        assert (matcher.matched, came_out) == (None, went_in[: len(went_in) - held])
    num_early = len(went_in)
    for piece in late:
        came_out += matcher.feed(piece)
        went_in += piece
    came_out += matcher.flush()
    text, found = cut(went_in, stop, include, least=num_early + 1)
    assert matcher.matched == found
    # What came out already, because a whole stop string in it was passed over, stays.
    assert came_out == text


def test_what_is_held_back_comes_out_at_the_end():
    matcher = StopStringMatcher(["<end>"])
    assert matcher.feed("so <en") == "so "
    assert matcher.flush() == "<en"
    assert matcher.matched is None


def test_the_one_complete_first_wins_and_then_the_longest():
    matcher = StopStringMatcher(["nd", "and", "andes"])
    assert matcher.feed("salt and pepper") == "salt "
    assert matcher.matched == "and"
    assert matcher.feed("more") == ""
    assert matcher.flush() == ""


def test_text_is_handed_through_without_stop_strings():
    matcher = StopStringMatcher([])
    assert matcher.feed("abc") == "abc"
    assert matcher.flush() == ""


@pytest.mark.parametrize("stop", ["a" * 20_000 + "b", "ab" * 10_000 + "c"])
def test_a_long_stop_string_costs_no_more_than_a_short_one(stop):
    matcher = StopStringMatcher([stop])
    text = stop[:2] * 20_000
    begun = time.perf_counter()
    pieces = [matcher.feed(text[i : i + 4]) for i in range(0, len(text), 4)]
    # Linear takes hundredths of a second here, quadratic takes minutes.
    assert time.perf_counter() - begun < 5
    assert "".join(pieces) + matcher.flush() == text


def test_the_answers_to_one_prompt_share_the_work_on_their_stop_strings() -> None:
    begin_s = time.process_time()
    for _ in range(1000):
        StopStringMatcher(["ab" * 20_000])
    assert time.process_time() - begin_s < 1  # each by itself takes some 10 ms
