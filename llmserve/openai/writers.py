"""Writers: what the engine brought, in the shapes of one endpoint. One writer serves one request.

A writer turns the news of a step into chunks, and the final outputs into a whole answer. It knows
the protocol and the tokenizer, not where outputs come from nor where chunks go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Generic, Literal, Protocol, TypeVar, cast

from msgspec import UNSET, UnsetType

from llmserve.llm import CompletionOutput, Logprob, RequestOutput
from llmserve.openai.logprobs import (
    CompletionLogprobsBuilder,
    build_chat_logprobs,
    build_prompt_logprobs,
)
from llmserve.openai.protocol import ChatCompletionRequest, CompletionRequest
from llmserve.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    Delta,
    FinishReason,
    PromptLogprobs,
    Usage,
)
from llmserve.tokenizer import Tokenizer

ResponseT_co = TypeVar("ResponseT_co", covariant=True)
ChunkT_co = TypeVar("ChunkT_co", covariant=True)


class Writer(Protocol, Generic[ResponseT_co, ChunkT_co]):
    """One endpoint's shapes."""

    def chunks(self, prompt_index: int, output: RequestOutput) -> Sequence[ChunkT_co]:
        """The chunks for a step's news; none if there is nothing to see yet."""
        ...

    def usage_chunk(self, usage: Usage) -> ChunkT_co:
        """The last chunk under ``include_usage``."""
        ...

    def response(self, outputs: Sequence[RequestOutput], usage: Usage) -> ResponseT_co:
        """The whole answer; one finished output per prompt."""
        ...


class CompletionWriter:
    """Writes completions. Choice ``i * n + j`` is answer j to prompt i."""

    def __init__(
        self, request: CompletionRequest, tokenizer: Tokenizer, *, id: str, created: int, model: str
    ) -> None:
        self._tokenizer = tokenizer
        self._id, self._created, self._model = id, created, model
        self._n = request.n or 1
        self._logprobs = request.logprobs
        self._echo = bool(request.echo)
        self._prompt_logprobs = request.prompt_logprobs
        self._skip_special_tokens = request.skip_special_tokens is not False
        self._truncated = request.truncate_prompt_tokens is not None
        self._token_ids = bool(request.return_token_ids)
        self._usage: UnsetType | None = None if request.include_usage else UNSET
        self._begun: set[int] = set()
        self._ended: set[int] = set()
        self._builders: dict[int, CompletionLogprobsBuilder] = {}

    def chunks(self, prompt_index: int, output: RequestOutput) -> list[Completion]:
        """See ``Writer``."""
        chunks = []
        for answer in output.outputs:
            index = prompt_index * self._n + answer.index
            if index in self._ended or not _has_news(
                answer, tokens_matter=self._logprobs is not None or self._token_ids
            ):
                continue
            if answer.finish_reason is not None:
                self._ended.add(index)
            choice = self._choice(index, output, answer, whole=False)
            chunks.append(self._completion([choice], self._usage))
        return chunks

    def usage_chunk(self, usage: Usage) -> Completion:
        """See ``Writer``."""
        return self._completion([], usage)

    def response(self, outputs: Sequence[RequestOutput], usage: Usage) -> Completion:
        """See ``Writer``."""
        choices = [
            self._choice(prompt_index * self._n + answer.index, output, answer, whole=True)
            for prompt_index, output in enumerate(outputs)
            for answer in output.outputs
        ]
        return self._completion(choices, usage)

    def _choice(
        self, index: int, output: RequestOutput, answer: CompletionOutput, *, whole: bool
    ) -> CompletionChoice:
        """A whole answer, or what a step brought; the first piece begins like a whole one."""
        first = whole or index not in self._begun
        self._begun.add(index)
        if whole:
            text, token_ids, logprobs = answer.text, answer.token_ids, answer.logprobs
        else:
            text, token_ids = answer.text_diff, answer.token_ids_diff
            logprobs = answer.logprobs_diff
        echo = self._echoed(output) if first and self._echo else ""
        choice = CompletionChoice(
            index=index,
            text=echo + text,
            logprobs=None,
            finish_reason=_finish_reason(answer),
            stop_reason=_stop_reason(answer),
            token_ids=list(token_ids) if self._token_ids else UNSET,
            prompt_token_ids=self._prompt(output) if first else UNSET,
        )
        if answer.index == 0:  # the n answers to a prompt have it in common
            choice.prompt_logprobs = _prompt_logprobs(
                self._tokenizer, self._prompt_logprobs, output
            )
        if self._logprobs is not None:
            builder = self._builder(index, output, self._logprobs)
            echoed = None
            if first and self._echo:
                echoed = builder.build_echo(answer.prompt_logprobs or (), len(echo))
            choice.logprobs = builder.build(token_ids, logprobs or (), behind=echoed)
        return choice

    def _echoed(self, output: RequestOutput) -> str:
        """The prompt as text: as it was sent, if it was text and all of it was read."""
        if output.prompt is not None and not self._truncated:
            return output.prompt
        return self._tokenizer.decode(
            output.prompt_token_ids, skip_special_tokens=self._skip_special_tokens
        )

    def _builder(self, index: int, output: RequestOutput, k: int) -> CompletionLogprobsBuilder:
        if index not in self._builders:
            self._builders[index] = CompletionLogprobsBuilder(
                self._tokenizer,
                k,
                prompt_token_ids=output.prompt_token_ids,
                skip_special_tokens=self._skip_special_tokens,
            )
        return self._builders[index]

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _prompt(self, output: RequestOutput) -> list[int] | UnsetType:
        return list(output.prompt_token_ids) if self._token_ids else UNSET


class ChatWriter:
    """Writes chat completions: one prompt, n choices."""

    def __init__(
        self,
        request: ChatCompletionRequest,
        tokenizer: Tokenizer,
        *,
        id: str,
        created: int,
        model: str,
    ) -> None:
        self._tokenizer = tokenizer
        self._id, self._created, self._model = id, created, model
        self._prompt_logprobs = request.prompt_logprobs
        self._top_logprobs = (request.top_logprobs or 0) if request.logprobs else None
        self._token_ids = bool(request.return_token_ids)
        self._usage: UnsetType | None = None if request.include_usage else UNSET
        self._begun = False
        self._ended: set[int] = set()

    def chunks(self, prompt_index: int, output: RequestOutput) -> list[ChatCompletionChunk]:
        """See ``Writer``. Each choice begins with a chunk that has the role alone."""
        chunks = [] if self._begun else self._first_chunks(output)
        self._begun = True
        for answer in output.outputs:
            if answer.index in self._ended or not _has_news(
                answer, tokens_matter=self._top_logprobs is not None or self._token_ids
            ):
                continue
            if answer.finish_reason is not None:
                self._ended.add(answer.index)
            choice = ChatChunkChoice(
                index=answer.index,
                delta=Delta(content=answer.text_diff) if answer.text_diff else Delta(),
                logprobs=self._write_logprobs(answer.token_ids_diff, answer.logprobs_diff),
                finish_reason=_finish_reason(answer),
                stop_reason=_stop_reason(answer),
                token_ids=list(answer.token_ids_diff) if self._token_ids else UNSET,
            )
            chunks.append(self._chunk([choice], self._usage))
        return chunks

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        """See ``Writer``."""
        return self._chunk([], usage)

    def response(self, outputs: Sequence[RequestOutput], usage: Usage) -> ChatCompletion:
        """See ``Writer``."""
        (output,) = outputs
        choices = [
            ChatChoice(
                index=answer.index,
                message=AssistantMessage(content=answer.text),
                logprobs=self._write_logprobs(answer.token_ids, answer.logprobs),
                finish_reason=_finish_reason(answer),
                stop_reason=_stop_reason(answer),
                token_ids=list(answer.token_ids) if self._token_ids else UNSET,
            )
            for answer in output.outputs
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            prompt_token_ids=list(output.prompt_token_ids) if self._token_ids else UNSET,
            prompt_logprobs=_prompt_logprobs(self._tokenizer, self._prompt_logprobs, output),
        )

    def _first_chunks(self, output: RequestOutput) -> list[ChatCompletionChunk]:
        chunks = [
            self._chunk(
                [
                    ChatChunkChoice(
                        index=answer.index,
                        delta=Delta(role="assistant", content=""),
                        logprobs=None,
                        finish_reason=None,
                    )
                ],
                self._usage,
            )
            for answer in output.outputs
        ]
        if self._token_ids:
            chunks[0].prompt_token_ids = list(output.prompt_token_ids)
        return chunks

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage
        )

    def _write_logprobs(
        self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob]] | None
    ) -> ChatLogprobs | None:
        if self._top_logprobs is None:
            return None
        return build_chat_logprobs(self._tokenizer, self._top_logprobs, token_ids, logprobs or ())


def _prompt_logprobs(
    tokenizer: Tokenizer, k: int | None, output: RequestOutput
) -> PromptLogprobs | UnsetType:
    if k is None:
        return UNSET
    logprobs = output.outputs[0].prompt_logprobs or ()
    return build_prompt_logprobs(tokenizer, k, output.prompt_token_ids, logprobs)


def _has_news(answer: CompletionOutput, *, tokens_matter: bool) -> bool:
    """Whether a client can see a difference: text may be held back, a character incomplete."""
    if answer.text_diff or answer.finish_reason is not None:
        return True
    return tokens_matter and bool(answer.token_ids_diff)


def _finish_reason(answer: CompletionOutput) -> FinishReason | None:
    return cast("Literal['stop', 'length'] | None", answer.finish_reason)


def _stop_reason(answer: CompletionOutput) -> str | int | UnsetType | None:
    # Not OpenAI's, so it shows up only where it says something: which stop string or token it was.
    return UNSET if answer.stop_reason is None else answer.stop_reason
