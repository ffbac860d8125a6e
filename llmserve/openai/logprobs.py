"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from llmserve.llm import Logprob
from llmserve.openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from llmserve.tokenizer import IncrementalDetokenizer, Tokenizer

_LEAST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot say


class CompletionLogprobsBuilder:
    """Log-probabilities of one completion, piece by piece; it keeps count of the text's length.

    Args:
        tokenizer: Whose tokens these are.
        k: How many of the likeliest tokens to tell, besides the one that stands there.
        prompt_token_ids: What comes before.
        skip_special_tokens: Special tokens are no part of the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        k: int,
        *,
        prompt_token_ids: Sequence[int],
        skip_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._k = k
        self._prompt_token_ids = prompt_token_ids
        self._skip_special_tokens = skip_special_tokens
        self._offset = 0
        self._detokenizer = self._new_detokenizer(prompt_token_ids)

    def build(
        self,
        token_ids: Sequence[int],
        logprobs: Sequence[Mapping[int, Logprob]],
        *,
        behind: CompletionLogprobs | None = None,
    ) -> CompletionLogprobs:
        """The next tokens' log-probabilities, one mapping a token; ``behind`` others, if given."""
        built = behind or _no_logprobs()
        for token_id, alternatives in zip(token_ids, logprobs, strict=True):
            self._add(built, token_id, alternatives)
            self._offset += len(self._detokenizer.feed(token_id))
        return built

    def build_echo(
        self, logprobs: Sequence[Mapping[int, Logprob]], num_chars: int
    ) -> CompletionLogprobs:
        """Those of the prompt, with which the text begins. To be called before ``build``.

        Args:
            logprobs: One mapping per token but the first.
            num_chars: Length of the prompt in the text.
        """
        built = _no_logprobs()
        detokenizer = self._new_detokenizer(())
        known: list[Mapping[int, Logprob] | None] = [None, *logprobs]
        for token_id, alternatives in zip(self._prompt_token_ids, known, strict=True):
            self._add(built, token_id, alternatives)
            # A tokenizer that changes a text before it reads it can make it longer.
            self._offset = min(self._offset + len(detokenizer.feed(token_id)), num_chars)
        self._offset = num_chars
        return built

    def _add(
        self, built: CompletionLogprobs, token_id: int, alternatives: Mapping[int, Logprob] | None
    ) -> None:
        own_text = _legacy_text(self._tokenizer.token_to_bytes(token_id))
        built.tokens.append(own_text)
        built.text_offset.append(self._offset)
        if alternatives is None:
            built.token_logprobs.append(None)
            built.top_logprobs.append(None)
            return
        own = max(alternatives[token_id].logprob, _LEAST)
        top: dict[str, float] = {}
        for other_id, other in _likeliest(alternatives, self._k):
            text = _legacy_text(self._tokenizer.token_to_bytes(other_id))
            top.setdefault(text, max(other.logprob, _LEAST))
        top.setdefault(own_text, own)
        built.token_logprobs.append(own)
        built.top_logprobs.append(top)

    def _new_detokenizer(self, prompt_token_ids: Sequence[int]) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(
            self._tokenizer,
            skip_special_tokens=self._skip_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )


def _no_logprobs() -> CompletionLogprobs:
    return CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])


def build_chat_logprobs(
    tokenizer: Tokenizer,
    k: int,
    token_ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob]],
) -> ChatLogprobs:
    """The tokens' log-probabilities, each with the ``k`` likeliest at its position."""
    content = []
    for token_id, alternatives in zip(token_ids, logprobs, strict=True):
        drawn = _top_logprob(tokenizer, token_id, alternatives[token_id])
        content.append(
            ChatTokenLogprob(
                token=drawn.token,
                logprob=drawn.logprob,
                bytes=drawn.bytes,
                top_logprobs=[
                    _top_logprob(tokenizer, other_id, other)
                    for other_id, other in _likeliest(alternatives, k)
                ],
            )
        )
    return ChatLogprobs(content=content)


def build_prompt_logprobs(
    tokenizer: Tokenizer,
    k: int,
    token_ids: Sequence[int],
    logprobs: Sequence[Mapping[int, Logprob]],
) -> PromptLogprobs:
    """A prompt's log-probabilities, per token the ``k`` likeliest and its own.

    Args:
        tokenizer: Whose tokens these are.
        k: How many of the likeliest.
        token_ids: The prompt's.
        logprobs: One mapping per token but the first.
    """
    built: PromptLogprobs = [None]
    for token_id, alternatives in zip(token_ids[1:], logprobs, strict=True):
        told = dict(_likeliest(alternatives, k)) | {token_id: alternatives[token_id]}
        built.append(
            {
                str(told_id): PromptLogprob(
                    logprob=max(logprob.logprob, _LEAST),
                    rank=logprob.rank,
                    decoded_token=tokenizer.token_to_bytes(told_id).decode(errors="replace"),
                )
                for told_id, logprob in told.items()
            }
        )
    return built


def _likeliest(alternatives: Mapping[int, Logprob], k: int) -> list[tuple[int, Logprob]]:
    """The k likeliest. They stand first; behind them is the drawn token, if it is none of them."""
    return list(islice(alternatives.items(), k))


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: Logprob) -> TopLogprob:
    raw = tokenizer.token_to_bytes(token_id)
    return TopLogprob(
        token=raw.decode(errors="replace"),
        logprob=max(logprob.logprob, _LEAST),
        bytes=list(raw),
    )


def _legacy_text(raw: bytes) -> str:
    """A token's text; OpenAI's completions spell bytes that are no UTF-8 on their own."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
