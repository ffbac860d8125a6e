"""Finds stop strings in text that arrives in pieces; holds back what may begin one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


class StopStringMatcher:
    """Cuts a text at its first stop string, however the text is split on the way here.

    The stop string that is complete first wins; of several complete at the same character, the
    longest. Only text that may still become a stop string is held back, so never as much as the
    longest of them. Each character costs O(1) per stop string (Knuth, Morris and Pratt 1977).

    Attributes:
        matched: The stop string that was found, or None. Nothing comes out after it.
    """

    def __init__(self, stop: Sequence[str], *, include_stop_str_in_output: bool = False) -> None:
        self.matched: str | None = None
        self._include = include_stop_str_in_output
        self._patterns = [_Pattern(text) for text in sorted(set(stop), key=len, reverse=True)]
        self._held = ""

    def feed(self, text: str, *, may_end: bool = True) -> str:
        """Take the next piece of text and return what is certain to belong to the answer.

        Args:
            text: What follows.
            may_end: False passes over a stop string that is complete within this piece, as if it
                were none; what it ends with may still begin another.
        """
        if self.matched is not None:
            return ""
        if not self._patterns:
            return text
        buffer = self._held + text
        for end in range(len(self._held) + 1, len(buffer) + 1):
            char = buffer[end - 1]
            # All patterns take the character, even after one has matched: the list is short.
            complete = [pattern for pattern in self._patterns if pattern.advance(char)]
            if complete and not may_end:
                for pattern in complete:
                    pattern.pass_over()
            elif complete:
                self.matched = complete[0].text
                self._held = ""
                return buffer[: end if self._include else end - len(self.matched)]
        num_held = max(pattern.state for pattern in self._patterns)
        released = len(buffer) - num_held
        self._held = buffer[released:]
        return buffer[:released]

    def flush(self) -> str:
        """The text ends here: return what was held back."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """One stop string and how many of its characters the text ends with (``state``)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.state = 0
        self._fallback = _fallback(text)

    def advance(self, char: str) -> bool:
        """Take one character; whether the text now ends with the whole stop string."""
        while self.state and self.text[self.state] != char:
            self.state = self._fallback[self.state]
        self.state += self.text[self.state] == char
        return self.state == len(self.text)

    def pass_over(self) -> None:
        """Go on behind the whole stop string, of which the end may be the beginning of the next."""
        self.state = self._fallback[self.state]


@lru_cache(maxsize=256)  # the n answers to a prompt have the same stop strings
def _fallback(text: str) -> tuple[int, ...]:
    """At i: the length of the longest proper prefix of ``text`` that also ends ``text[:i]``."""
    fallback = [0] * (len(text) + 1)
    length = 0
    for i in range(1, len(text)):
        while length and text[i] != text[length]:
            length = fallback[length]
        length += text[i] == text[length]
        fallback[i + 1] = length
    return tuple(fallback)
