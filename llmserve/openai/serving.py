"""OpenAI's endpoints as functions: a decoded JSON body in, an answer or a stream of chunks out.

Used by the HTTP server and by batch jobs alike. It knows neither HTTP nor files, and of the engine
only what AsyncLLM shows.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from pydantic import JsonValue

from llmserve.checkpoint.quality_file import Quality, read_quality
from llmserve.core.request import INTERACTIVE_PRIORITY
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.guided_decoding import check_guided_decoding
from llmserve.errors import (
    CheckpointError,
    ContextLengthError,
    InvalidRequestError,
    LlmserveError,
    RequestTimeoutError,
)
from llmserve.llm import AsyncLLM
from llmserve.openai.errors import ModelNotFoundError, RouteNotFoundError, describe_error
from llmserve.openai.generation import Generation, Prompt
from llmserve.openai.observer import RequestObserver, SilentObserver
from llmserve.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    parse_request,
)
from llmserve.openai.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Model,
    ModelList,
    ModelQuality,
    QualityMeasurement,
)
from llmserve.openai.sampling import clamp_max_tokens, to_sampling_params
from llmserve.openai.writers import ChatWriter, CompletionWriter, Writer

logger = logging.getLogger(__name__)

DEFAULT_COMPLETION_TOKENS = 16
"""``max_tokens`` of a completion that sets none: OpenAI's own."""
# Text so long is tokenised in a thread: it would hold up every stream for a noticeable time.
_LONG_TEXT_CHARS = 32_768
# Grammars are checked one at a time and a bad one takes seconds: not in the threads of all else.
_checks = ThreadPoolExecutor(max_workers=1, thread_name_prefix="llmserve-guided")

ChunkT = TypeVar("ChunkT", bound=msgspec.Struct)
ResponseT = TypeVar("ResponseT", bound=msgspec.Struct)
ResultT = TypeVar("ResultT")


class ChunkStream(Generic[ChunkT]):
    """The chunks of one answer. ``aclose`` aborts what still runs, even before the first chunk.

    Iterating raises EngineError or InvalidRequestError if the answer fails midway.
    """

    def __init__(self, chunks: AsyncGenerator[ChunkT, None], generation: Generation) -> None:
        self._chunks = chunks
        self._generation = generation

    def __aiter__(self) -> ChunkStream[ChunkT]:
        return self

    async def __anext__(self) -> ChunkT:
        return await anext(self._chunks)

    async def aclose(self) -> None:
        """Leave. Safe to call at any time and more than once."""
        await self._chunks.aclose()
        # A generator that was never begun has no finally to run.
        await self._generation.aclose()


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """What ``respond`` gives: a status as of HTTP, and the body."""

    status: int
    body: dict[str, JsonValue]


class OpenAIServing:
    """The endpoints of one model.

    Args:
        llm: Generates.
        served_model_name: The name clients use.
        observer: Is told the times of every answer.
        priority: Of requests that set none; lower starts earlier.
        max_timeout_s: Most seconds that a request may take, and its timeout if it sets none; None
            for no such limit.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        served_model_name: str,
        observer: RequestObserver | None = None,
        *,
        priority: int = INTERACTIVE_PRIORITY,
        max_timeout_s: float | None = None,
    ) -> None:
        self.llm = llm
        self.served_model_name = served_model_name
        self._observer = observer or SilentObserver()
        self._priority = priority
        self._max_timeout_s = max_timeout_s
        self._created = int(time.time())
        self._quality = _read_quality(llm.model_dir)

    def models(self) -> ModelList:
        """``GET /v1/models``."""
        return ModelList(data=[self._model()])

    def model(self, name: str) -> Model:
        """``GET /v1/models/{id}``.

        Raises:
            ModelNotFoundError: It is another name than the served one.
        """
        self._check_model(name)
        model = self._model()
        quality, quant_algo = self._quality, self.llm.engine.info.quant_algo
        model.quality = None if quality is None else _model_quality(quality, quant_algo)
        return model

    def _model(self) -> Model:
        max_seq_len = self.llm.engine.info.max_seq_len
        return Model(id=self.served_model_name, created=self._created, max_model_len=max_seq_len)

    async def create_completion(
        self, body: object, request_id: str
    ) -> Completion | ChunkStream[Completion]:
        """``POST /v1/completions``.

        Args:
            body: Decoded JSON.
            request_id: For the log, where it stands beside the answer's own id.

        Returns:
            The whole answer, or with ``stream`` its chunks; the engine has accepted it then.

        Raises:
            InvalidRequestError: The body cannot be served as it is.
            EngineError: The engine takes no requests now, or failed.
            RequestTimeoutError: The answer did not end in time.
        """
        arrival_s = time.perf_counter()
        request = parse_request(CompletionRequest, body)
        await self._check(request)
        prompt_logprobs = request.prompt_logprobs
        if request.echo and request.logprobs is not None:
            prompt_logprobs = max(request.logprobs, prompt_logprobs or 0)
        params = to_sampling_params(
            request,
            self.llm.generation_config,
            max_tokens=request.max_tokens or DEFAULT_COMPLETION_TOKENS,
            logprobs=request.logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        prompts = await self._encode_prompts(request)
        params_list = [params] * len(prompts)
        if request.max_tokens is None:
            limit = self.llm.engine.info.max_seq_len
            params_list = [
                clamp_max_tokens(params, len(prompt.token_ids), limit) for prompt in prompts
            ]
        id, created = _new_id("cmpl", request, request_id)
        generation = await self._generate(request, prompts, params_list, id, arrival_s)
        writer = CompletionWriter(
            request, self.llm.tokenizer, id=id, created=created, model=self.served_model_name
        )
        if request.stream:
            return ChunkStream(_chunks(generation, writer, request.include_usage), generation)
        return await _whole(generation, writer)

    async def create_chat_completion(
        self, body: object, request_id: str
    ) -> ChatCompletion | ChunkStream[ChatCompletionChunk]:
        """``POST /v1/chat/completions``; as ``create_completion``."""
        arrival_s = time.perf_counter()
        request = parse_request(ChatCompletionRequest, body)
        await self._check(request)
        params = to_sampling_params(
            request,
            self.llm.generation_config,
            max_tokens=request.max_completion_tokens or request.max_tokens,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs,
        )
        prompt = await self._encode_chat(request)
        id, created = _new_id("chatcmpl", request, request_id)
        generation = await self._generate(request, [Prompt(prompt)], [params], id, arrival_s)
        writer = ChatWriter(
            request, self.llm.tokenizer, id=id, created=created, model=self.served_model_name
        )
        if request.stream:
            return ChunkStream(_chunks(generation, writer, request.include_usage), generation)
        return await _whole(generation, writer)

    async def respond(self, url: str, body: object, request_id: str) -> JsonAnswer:
        """Answer as HTTP would, without HTTP: what a line of a batch file needs.

        Args:
            url: ``/v1/completions`` or ``/v1/chat/completions``.
            body: Decoded JSON; ``stream`` is refused.
            request_id: For the log.

        Returns:
            Status and body. Errors are answers too: nothing is raised but cancellation.
        """
        try:
            if isinstance(body, dict) and body.get("stream"):
                raise InvalidRequestError("stream has no meaning here", param="stream")
            answer: object
            if url == "/v1/completions":
                answer = await self.create_completion(body, request_id)
            elif url == "/v1/chat/completions":
                answer = await self.create_chat_completion(body, request_id)
            else:
                raise RouteNotFoundError(f"there is no endpoint {url}", param="url")
            return JsonAnswer(200, msgspec.to_builtins(answer))
        except Exception as error:
            if not isinstance(error, LlmserveError):
                logger.exception("request %s failed", request_id)
            described = describe_error(error)
            return JsonAnswer(described.status, msgspec.to_builtins(described.body))

    def _check_model(self, name: str) -> None:
        if name != self.served_model_name:
            raise ModelNotFoundError(
                f"the model {name!r} is not served here; {self.served_model_name!r} is",
                param="model",
            )

    async def _check(self, request: GenerationRequest) -> None:
        """Refuse what the fields alone cannot judge, before a prompt is encoded."""
        self._check_model(request.model)
        limit = self._max_timeout_s
        if limit is not None and request.timeout is not None and request.timeout > limit:
            raise InvalidRequestError(
                f"timeout is {request.timeout:g}; it must be at most {limit:g} on this server",
                param="timeout",
            )
        if (guide := request.guided_decoding) is None:
            return
        field, guided_decoding = guide
        loop, timeout_s = asyncio.get_running_loop(), self._timeout_s(request)
        try:
            async with asyncio.timeout(timeout_s):
                await loop.run_in_executor(_checks, check_guided_decoding, guided_decoding)
        except TimeoutError:
            raise _too_late(timeout_s or 0.0) from None
        except InvalidRequestError as error:
            sentence = str(error).replace("guided_decoding", field, 1)
            raise InvalidRequestError(sentence, param=field, code=error.code) from error

    def _timeout_s(self, request: GenerationRequest) -> float | None:
        return self._max_timeout_s if request.timeout is None else request.timeout

    async def _generate(
        self,
        request: GenerationRequest,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        id: str,
        arrival_s: float,
    ) -> Generation:
        timeout_s = rest_s = self._timeout_s(request)
        if timeout_s is not None:  # what the request has waited for until now counts as well
            rest_s = timeout_s - (time.perf_counter() - arrival_s)
            if rest_s <= 0:
                raise _too_late(timeout_s)
        return await Generation.open(
            self.llm,
            prompts,
            params,
            request_id=id,
            priority=self._priority if request.priority is None else request.priority,
            timeout_s=rest_s,
            cache_salt=request.cache_salt,
            arrival_s=arrival_s,
            observer=self._observer,
        )

    def _check_length(self, request: GenerationRequest, text: str, param: str) -> None:
        """Refuse a text far too long by its beginning. The engine counts those near the limit."""
        if request.truncate_prompt_tokens is not None:
            return
        limit = self.llm.engine.info.max_seq_len
        if (num_tokens := self.llm.tokenizer.num_tokens_at_least(text, limit)) > limit:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens, but the prompt has at "
                f"least {num_tokens}, before any for the completion. Shorten the prompt.",
                param=param,
            )

    async def _encode_prompts(self, request: CompletionRequest) -> list[Prompt]:
        def encode_prompt(text: str) -> Prompt:
            self._check_length(request, text, "prompt")
            token_ids = self.llm.tokenizer.encode(
                text, add_special_tokens=request.add_special_tokens is not False
            )
            return Prompt(token_ids, text)

        def encode() -> list[Prompt]:
            return [
                encode_prompt(prompt) if isinstance(prompt, str) else Prompt(prompt)
                for prompt in request.prompt
            ]

        texts = [prompt for prompt in request.prompt if isinstance(prompt, str)]
        return await _run(encode, sum(map(len, texts)))

    async def _encode_chat(self, request: ChatCompletionRequest) -> list[int]:
        messages = [message.for_template() for message in request.messages]
        continues = bool(request.continue_final_message)
        add_generation_prompt = request.add_generation_prompt

        def encode() -> list[int]:
            text = self.llm.tokenizer.render_chat(
                messages,
                add_generation_prompt=(
                    not continues if add_generation_prompt is None else add_generation_prompt
                ),
                continue_final_message=continues,
                template_kwargs=request.chat_template_kwargs,
            )
            self._check_length(request, text, "messages")
            # The template has written all special tokens, BOS too.
            return self.llm.tokenizer.encode(text, add_special_tokens=False)

        return await _run(encode, sum(len(message["content"]) + 64 for message in messages))


def _too_late(timeout_s: float) -> RequestTimeoutError:
    return RequestTimeoutError(f"the request did not end within its timeout of {timeout_s:g} s")


async def _run(function: Callable[[], ResultT], num_chars: int) -> ResultT:
    return function() if num_chars < _LONG_TEXT_CHARS else await asyncio.to_thread(function)


async def _chunks(
    generation: Generation, writer: Writer[object, ChunkT], include_usage: bool
) -> AsyncGenerator[ChunkT, None]:
    try:
        async with aclosing(generation.updates()) as updates:
            async for prompt_index, output in updates:
                for chunk in writer.chunks(prompt_index, output):
                    yield chunk
        if include_usage:
            yield writer.usage_chunk(generation.usage())
    finally:
        await generation.aclose()


async def _whole(generation: Generation, writer: Writer[ResponseT, object]) -> ResponseT:
    try:
        async with aclosing(generation.updates()) as updates:
            async for _ in updates:
                pass
        return writer.response(generation.outputs, generation.usage())
    finally:
        await generation.aclose()


def _read_quality(model_dir: Path | None) -> Quality | None:
    """The model's quality.json; a damaged one is no reason not to serve it."""
    try:
        return None if model_dir is None else read_quality(model_dir)
    except CheckpointError as error:
        logger.warning("%s; the model is served without its quality", error)
        return None


def _model_quality(quality: Quality, quant_algo: str | None) -> ModelQuality:
    measurement = None
    if (measured := quality.measurement) is not None:
        measurement = QualityMeasurement(
            weights=measured.candidate,
            reference=measured.reference,
            perplexity=measured.perplexity,
            reference_perplexity=measured.reference_perplexity,
            kl_divergence=measured.mean_kl,
            top1_agreement=measured.top1_agreement,
            num_tokens=measured.num_tokens,
            tokens_sha256=measured.tokens_sha256,
        )
    return ModelQuality(
        quant_algo=quant_algo,
        measurement=measurement,
        max_quantization_error=max(quality.quantization_error.values(), default=None),
        digest_algorithm=quality.digest_algorithm,
        source=quality.source,
        result=quality.result,
    )


def _new_id(prefix: str, request: GenerationRequest, request_id: str) -> tuple[str, int]:
    """An id that no other request has, whatever request ids clients send, and the time."""
    id = f"{prefix}-{uuid.uuid4().hex}"
    given = (("user", request.user), ("metadata", request.metadata))
    notes = [f"{name} {value!r:.1000}" for name, value in given if value]
    logger.info("request %s is %s", request_id, ", ".join([id, *notes]))
    return id, int(time.time())
