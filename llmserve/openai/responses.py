"""What clients get: answers, stream chunks, errors and the model list, in OpenAI's shapes.

Pydantic checks what comes in; what goes out is made here and needs no checking, so it is msgspec
structs, which encode several times faster: at many streams that is most of the API process's work.
A field that is UNSET is left out of the JSON, one that is None is ``null``.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

FinishReason: TypeAlias = Literal["stop", "length"]

_encoder = msgspec.json.Encoder()


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    """Part of the usage.

    Attributes:
        cached_tokens: Prompt tokens whose KV blocks were reused.
    """

    cached_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    """Token counts over all prompts and answers of a request; a prompt counts once for its n."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities of a completion: four lists of one entry per token.

    Attributes:
        tokens: The tokens' texts; ``bytes:\\xe2\\x82`` for one that is no whole UTF-8.
        token_logprobs: Of the tokens; None for the first one of a prompt, which nothing precedes.
        top_logprobs: The likeliest tokens and the one that stands there, by text; None likewise.
        text_offset: Where a token begins in the choice's text, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(msgspec.Struct, kw_only=True):
    """One of the likeliest tokens at a position; ``bytes`` joins to UTF-8 over several tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, kw_only=True):
    """The token drawn at a position, and the likeliest ones there."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities of a chat answer."""

    content: list[ChatTokenLogprob]


class PromptLogprob(msgspec.Struct, kw_only=True):
    """Of one of the likeliest tokens at a position of a prompt, or of the one that stands there."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs: TypeAlias = list[dict[str, PromptLogprob] | None]
"""Per token of a prompt by token id, in vLLM's shape: None for the first."""


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One answer, or in a stream one piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/completions``, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class AssistantMessage(msgspec.Struct, kw_only=True):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Delta(msgspec.Struct, kw_only=True):
    """What a chunk adds to the message: the role in an answer's first, then text."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """One piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class QualityMeasurement(msgspec.Struct, kw_only=True):
    """The model against the one it was made from, on held-out text.

    Attributes:
        weights: What the weights are, e.g. 'FP8', 'W8A16 + INT8 KV'.
        reference: What they were before.
        perplexity: Of the text.
        reference_perplexity: Of the same text, before.
        kl_divergence: Mean over its tokens of KL(before || now), in nats.
        top1_agreement: Share of its tokens for which both have the same likeliest one.
        num_tokens: Tokens of the text.
        tokens_sha256: Digest of these.
    """

    weights: str
    reference: str
    perplexity: float
    reference_perplexity: float
    kl_divergence: float
    top1_agreement: float
    num_tokens: int
    tokens_sha256: str


class ModelQuality(msgspec.Struct, kw_only=True):
    """What is known of the model's quantisation, from its conversion.

    Attributes:
        quant_algo: Of the weights, in TensorRT-LLM's words; None: they are not quantised.
        measurement: None where the models were not run.
        max_quantization_error: The largest relative error of a weight, ``|w - w'| / |w|``; None
            where none is known.
        digest_algorithm: Of the digests, e.g. 'blake3'; None without any.
        source: Digests of the files that were converted, by name.
        result: Digests of the files that came of it, by name.
    """

    quant_algo: str | None
    measurement: QualityMeasurement | None
    max_quantization_error: float | None
    digest_algorithm: str | None
    source: dict[str, str]
    result: dict[str, str]


class Model(msgspec.Struct, kw_only=True):
    """An entry of ``/v1/models``, and the answer of ``/v1/models/{id}``.

    Attributes:
        max_model_len: Longest prompt plus answer in tokens: not OpenAI's, but what clients that
            fill the context look for.
        quality: Not in the list. None where nothing is known.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "llmserve"
    max_model_len: int
    quality: ModelQuality | UnsetType | None = UNSET


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(msgspec.Struct, kw_only=True):
    """What went wrong: a sentence, its kind, the field at fault and a code, in OpenAI's words."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct, kw_only=True):
    """The body of every answer that is not a success, and the event that ends a broken stream."""

    error: ErrorDetail


Response: TypeAlias = Completion | ChatCompletion
Chunk: TypeAlias = Completion | ChatCompletionChunk


def encode(message: msgspec.Struct) -> bytes:
    """The JSON of anything in this module, as UTF-8."""
    return _encoder.encode(message)
