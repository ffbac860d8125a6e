"""Which tokens keep answers to their grammars: masks for the sampler, made while a step computes.

A ``Grammar`` follows one answer and is what the scheduler knows as a ``TokenConstraint``. It takes
tokens as the scheduler accepts them, and ``StructuredOutput.masks`` says what each may go on with.
llguidance does both, on the bytes of tokens, with a lexer's states made as they are met.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from llmserve.core.constraint import TokenConstraint
from llmserve.core.sampling_params import GuidedDecodingParams
from llmserve.engine.guided_decoding import compile_matcher, refusal
from llmserve.errors import InvalidRequestError
from llmserve.runtime.model_runner import TokenMasks

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLTokenizer

_MAX_CACHED_GRAMMARS = 128


class Grammar:
    """One answer on its way through what it must match. Made by ``StructuredOutput.compile``."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: tuple[int, ...]) -> None:
        self.matcher = matcher
        self.eos_token_ids = eos_token_ids
        self.is_stuck = False  # no token goes on with the answer, and none ends it

    def accept(self, token_id: int) -> bool:
        """Take the next token of the answer; an end-of-sequence token is none.

        Returns:
            Whether the answer is complete: nothing may follow.

        Raises:
            InvalidRequestError: The token is not allowed here, or no token was, or the grammar has
                become too complex to follow.
        """
        if self.is_stuck:
            raise refusal("the answer has come to where no token of the model goes on with it")
        self.matcher.consume_token(token_id)
        if self.matcher.is_error():
            raise refusal(self.matcher.get_error())
        return self.matcher.is_stopped()


class StructuredOutput:
    """Grammars of one model's tokenizer. ``compile`` may be called from any thread, ``masks`` from
    one at a time; both let other threads run.

    The tokenizer is read at first use. For 128,000 tokens that takes a second in which no other
    thread runs, so an engine does it with ``warm_up`` while it loads.
    """

    def __init__(self, tokenizer_file: Path, vocab_size: int, *, num_threads: int = 1) -> None:
        """Remember what to read.

        Args:
            tokenizer_file: The model's tokenizer.json.
            vocab_size: Of the model: how many tokens a mask covers.
            num_threads: That make masks. One is the caller's own, and right where the model
                computes on the same cores; more pay beside a GPU.
        """
        self._tokenizer_file = tokenizer_file
        self._vocab_size = vocab_size
        self._num_threads = num_threads
        self._compiled = lru_cache(_MAX_CACHED_GRAMMARS)(
            lambda params: compile_matcher(self._tokenizer, params)
        )

    def warm_up(self) -> None:
        """Read the tokenizer. What may be wrong with it is told to those who need it, by
        ``compile``.
        """
        with suppress(InvalidRequestError):
            _ = self._text_tokens

    def compile(self, params: GuidedDecodingParams, eos_token_ids: Collection[int]) -> Grammar:
        """Begin an answer.

        Args:
            params: What it must match. One that a client sent has passed
                ``check_guided_decoding``; it then takes at most about half a second, and some
                microseconds if it is among the last ones.
            eos_token_ids: What may end it where it matches. Without any it ends where nothing may
                follow.

        Raises:
            InvalidRequestError: It cannot be compiled, or not for this tokenizer.
        """
        return Grammar(self._compiled(params).deep_copy(), tuple(eos_token_ids))

    def masks(self, constraints: Mapping[str, TokenConstraint]) -> TokenMasks:
        """What each answer may go on with.

        Where only one text can follow, that text's own tokens are the only ones allowed, not other
        ways to cut it. A grammar that cannot be followed any further lets any text pass: its
        ``accept`` then says why, and fails that request alone.

        Args:
            constraints: By request id; all of them of this object's making.

        Returns:
            Masks by request id; see ``TokenMasks``.
        """
        if not constraints:
            return {}
        grammars = cast("Mapping[str, Grammar]", constraints)
        rows = self._rows([grammar.matcher for grammar in grammars.values()])
        end = self._tokenizer.eos_token
        may_end = rows[:, end // 32] >> end % 32 & 1
        rows &= self._text_tokens
        for row, grammar, ends in zip(rows, grammars.values(), may_end, strict=True):
            for token_id in grammar.eos_token_ids:
                _set_bit(row, token_id, bool(ends))
            grammar.is_stuck = not row.any()
            if grammar.is_stuck or grammar.matcher.is_error():
                row[:] = self._text_tokens
        rows = rows[:, : -(-self._vocab_size // 32)]
        return dict(zip(grammars, rows, strict=True))

    def _rows(self, matchers: list[LLMatcher]) -> npt.NDArray[np.int32]:
        """llguidance's own masks, one row each."""
        rows = np.empty((len(matchers), len(self._text_tokens)), dtype=np.int32)
        row_bytes = rows.shape[1] * rows.itemsize
        if self._num_threads > 1:
            indexed = [(matcher, i) for i, matcher in enumerate(matchers)]
            self._executor.unsafe_compute_mask_ptr(indexed, rows.ctypes.data, row_bytes, len(rows))
        else:
            for i, matcher in enumerate(matchers):
                matcher.unsafe_compute_mask_ptr(rows.ctypes.data + i * row_bytes, row_bytes)
        return rows

    @cached_property
    def _executor(self) -> LLExecutor:
        from llguidance import LLExecutor

        return LLExecutor(self._num_threads)

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        text = self._tokenizer_file.read_text(encoding="utf-8")
        content = json.loads(text)
        special = [token["id"] for token in content["added_tokens"] if token["special"]]
        if not special:
            raise refusal(f"{self._tokenizer_file} has no special token")
        num_tokens = max(self._vocab_size, _num_tokens(content))
        try:
            # To llguidance any one of them is the end: requests differ in what ends them.
            tokenizer = LLTokenizer(text, n_vocab=num_tokens, eos_token=special[0])
        except ValueError as error:
            raise refusal(
                f"{self._tokenizer_file} is of a kind that is not known: {error}"
            ) from error
        return tokenizer

    @cached_property
    def _text_tokens(self) -> npt.NDArray[np.int32]:
        """One bit per token that stands for bytes and is the model's, in a row for llguidance."""
        tokenizer = self._tokenizer
        bits = np.zeros(-(-tokenizer.vocab_size // 32) * 32, dtype=bool)
        bits[: self._vocab_size] = [
            not tokenizer.is_special_token(token_id) for token_id in range(self._vocab_size)
        ]
        return np.packbits(bits, bitorder="little").view(np.int32)


def _num_tokens(tokenizer: dict[str, Any]) -> int:
    vocab = tokenizer["model"]["vocab"]
    ids: list[int] = list(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))
    ids += [token["id"] for token in tokenizer["added_tokens"]]
    return 1 + max(ids)


def _set_bit(row: npt.NDArray[np.int32], token_id: int, value: bool) -> None:
    bit = np.int32(np.uint32(1 << token_id % 32).view(np.int32))
    row[token_id // 32] = row[token_id // 32] | bit if value else row[token_id // 32] & ~bit
