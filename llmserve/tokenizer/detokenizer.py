"""Token ids to text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmserve.tokenizer.tokenizer import Tokenizer

# A character has at most four bytes, so its beginning is at most three tokens back.
_MAX_BYTES_OF_CHARACTER = 4


class IncrementalDetokenizer:
    """Makes an answer's text from its tokens as they come.

    The pieces joined are the text of all tokens. A character is given out with its last byte and
    never as U+FFFD before, so at most three bytes wait; bytes that turn out to be no character
    become U+FFFD. The cost of a token does not depend on how many came before.

    With a prompt the text is what follows the prompt's text: a leading space of the answer stays,
    and a character that begins in the prompt's last token is completed.

    Args:
        tokenizer: Whose tokens these are.
        skip_special_tokens: Leave special tokens out.
        prompt_token_ids: The tokens before the first; empty for a text that starts from nothing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strip_char, self._num_strip = tokenizer.strip_left
        for token_id in prompt_token_ids[-_MAX_BYTES_OF_CHARACTER:]:
            self.feed(token_id)
        if any(token_id not in self._skip for token_id in prompt_token_ids):
            self._num_strip = 0  # the text has begun

    def feed(self, token_id: int) -> str:
        """Take the next token; return the characters that it completes, often one word."""
        if token_id in self._skip:
            return ""
        return self._strip(self._decoder.decode(self._tokenizer.token_to_bytes(token_id)))

    def flush(self) -> str:
        """The text ends here: U+FFFD for a character that never became whole, else nothing."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        while self._num_strip and text:
            if not text.startswith(self._strip_char):
                self._num_strip = 0
                break
            text = text[len(self._strip_char) :]
            self._num_strip -= 1
        return text
