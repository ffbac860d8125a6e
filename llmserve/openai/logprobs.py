"""Log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from itertools import islice

from llmserve.llm import Logprob
from llmserve.openai.responses import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    TopLogprob,
)
from llmserve.tokenizer import Tokenizer

_LEAST = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot say


class CompletionLogprobsBuilder:
    """Log-probabilities of one completion, piece by piece; it keeps count of the text's length."""

    def __init__(self, tokenizer: Tokenizer, k: int) -> None:
        self._tokenizer = tokenizer
        self._k = k
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def build(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]]
    ) -> CompletionLogprobs:
        """The next tokens' log-probabilities, one mapping a token."""
        built = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, alternatives in zip(token_ids, logprobs, strict=True):
            drawn = self._tokenizer.token_to_bytes(token_id)
            built.tokens.append(_legacy_text(drawn))
            built.token_logprobs.append(max(alternatives[token_id].logprob, _LEAST))
            top: dict[str, float] = {}
            for other_id, other in _likeliest(alternatives, self._k):
                text = _legacy_text(self._tokenizer.token_to_bytes(other_id))
                top.setdefault(text, max(other.logprob, _LEAST))
            top.setdefault(built.tokens[-1], built.token_logprobs[-1])
            built.top_logprobs.append(top)
            built.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(drawn))
        return built


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
