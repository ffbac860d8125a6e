"""``AsyncLLM``: requests in token ids, answers in tokens and text, in one asyncio event loop."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

from llmserve.artifacts import Backend, ensure_engine
from llmserve.checkpoint.config_file import CONFIG_FILE, artifact_kind
from llmserve.config import BuildConfig, DType, EngineConfig
from llmserve.core.request import INTERACTIVE_PRIORITY, FinishReason, Output, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.admission import check_request
from llmserve.engine.engine import Engine
from llmserve.engine.process import ProcessEngine
from llmserve.engine.tensorrt_llm import TensorRTLLMEngine
from llmserve.errors import ConfigError, EngineDeadError, EngineError, InvalidRequestError
from llmserve.llm.answer import Answer
from llmserve.llm.outputs import RequestOutput
from llmserve.tokenizer import GenerationConfig, Tokenizer


class AsyncLLM:
    """An engine with its tokenizer. All methods belong to the engine's event loop.

    Attributes:
        engine: Started by whoever made it, and shut down by them.
        tokenizer: The model's.
        generation_config: End-of-sequence tokens and the API's sampling defaults.
        model_dir: Where the artefact lies, if it has a place.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        generation_config: GenerationConfig,
        model_dir: Path | None = None,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.model_dir = model_dir

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        request_id: str,
        prompt: str | None = None,
        priority: int = INTERACTIVE_PRIORITY,
        timeout_s: float | None = None,
        cache_salt: str | None = None,
    ) -> RequestStream:
        """Submit a prompt and return the stream of its answers.

        Args:
            prompt_token_ids: At least one token.
            sampling_params: ``max_tokens`` None fills the context, ``seed`` None draws one; the n
                answers share the seed and differ in their sequence index. ``guided_decoding`` of
                somebody else's making has passed ``engine.guided_decoding.check_guided_decoding``.
            request_id: Unique; the engine sees ``{request_id}-{index}``.
            prompt: The prompt's text, only handed through.
            priority: Lower starts earlier, -100 to 100.
            timeout_s: Seconds after which its answers end with reason 'timeout'; None for never.
            cache_salt: KV blocks are shared under the same salt only.

        Returns:
            A stream that must be read to its end or closed: ``contextlib.aclosing`` does.

        Raises:
            InvalidRequestError: It can never be served as asked.
            ContextLengthError: Prompt and max_tokens exceed max_seq_len.
            EngineOverloadedError: The queue is full.
            EngineDeadError: The engine is down.
            EngineShutdownError: Draining or shut down.
        """
        requests = self.make_requests(
            prompt_token_ids,
            sampling_params,
            request_id=request_id,
            priority=priority,
            timeout_s=timeout_s,
            cache_salt=cache_salt,
        )
        answers = [
            Answer(
                index,
                self.tokenizer,
                request.prompt_token_ids,
                sampling_params,
                request.eos_token_ids,
            )
            for index, request in enumerate(requests)
        ]
        output = RequestOutput(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=list(requests[0].prompt_token_ids),
            outputs=[answer.completion for answer in answers],
        )
        return RequestStream(self.engine, requests, answers, output)

    def make_requests(
        self,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        request_id: str,
        priority: int = INTERACTIVE_PRIORITY,
        timeout_s: float | None = None,
        cache_salt: str | None = None,
    ) -> list[Request]:
        """The n requests to the engine that a prompt becomes, with nothing left open.

        Raises:
            InvalidRequestError: An empty prompt, a token id outside the vocabulary, or parameters
                that exclude each other.
            ContextLengthError: Prompt and max_tokens exceed max_seq_len.
        """
        params, info = sampling_params, self.engine.info
        if params.stop and not params.detokenize:
            raise InvalidRequestError("stop strings need detokenize", param="stop")
        if params.min_tokens and params.guided_decoding is not None:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}; it is not allowed where an answer must match "
                "something, which alone says when it may end",
                param="min_tokens",
            )
        _check_vocabulary(params, info.vocab_size)
        prompt = tuple(prompt_token_ids)
        if params.truncate_prompt_tokens is not None:
            prompt = prompt[-params.truncate_prompt_tokens :]
        max_tokens = params.max_tokens
        if max_tokens is None:
            # At least one, so that a prompt without room for it is refused as too long.
            max_tokens = max(info.max_seq_len - len(prompt), 1)
        seed = secrets.randbits(63) if params.seed is None else params.seed
        params = replace(params, max_tokens=max_tokens, seed=seed)
        requests = [
            Request(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=prompt,
                sampling_params=params,
                eos_token_ids=() if params.ignore_eos else self.generation_config.eos_token_ids,
                sequence_index=index,
                priority=priority,
                timeout_s=timeout_s,
                cache_salt=cache_salt,
            )
            for index in range(params.n)
        ]
        check_request(requests[0], info)
        return requests


class RequestStream(AsyncIterator[RequestOutput]):
    """The answers to one prompt as they come: an async iterator over one changing RequestOutput.

    Iterating raises EngineError for a fault of the engine in this request and EngineDeadError if
    the engine dies; nothing comes after that. Leaving early, by ``aclose``, by cancellation or
    by dropping the stream, aborts what still runs. One task at a time may iterate.

    Attributes:
        output: What iterating yields, from the beginning.
    """

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        answers: Sequence[Answer],
        output: RequestOutput,
    ) -> None:
        # The sequences that still run, by index.
        self._streams: dict[int, AsyncIterator[Output]] = {}
        self._request_ids = [request.request_id for request in requests]
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._answers = answers
        self.output = output
        # For n > 1 only: what the sequences bring, and the tasks that fetch it.
        self._news: asyncio.Queue[tuple[int, Output | Exception]] = asyncio.Queue()
        self._fetchers: dict[int, asyncio.Task[None]] = {}
        try:
            for index, request in enumerate(requests):
                self._streams[index] = engine.submit(request)
        except BaseException:
            self._abort_soon()
            raise

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._streams:
            raise StopAsyncIteration
        for answer in self._answers:
            answer.clear_diffs()
        try:
            for index, output in await self._next_outputs():
                await self._take(index, output)
        except BaseException:
            await self.aclose()
            raise
        self.output.finished = not self._streams
        return self.output

    async def abort(self) -> None:
        """Ask for an early end: the stream goes on to its last output, with reason 'abort'."""
        for index in list(self._streams):
            await self._engine.abort(self._request_ids[index])

    async def aclose(self) -> None:
        """Abort what still runs; the stream ends here."""
        for index in list(self._streams):
            await self._leave(index)

    async def _next_outputs(self) -> list[tuple[int, Output]]:
        """Wait for news; all that is there for n > 1."""
        if len(self._answers) == 1:
            try:
                return [(0, await anext(self._streams[0]))]
            except StopAsyncIteration:
                raise EngineDeadError("the engine left a request without an end") from None
        if not self._fetchers:
            for index, stream in self._streams.items():
                self._fetchers[index] = asyncio.create_task(_fetch(index, stream, self._news))
        arrived = [await self._news.get()]
        while not self._news.empty():
            arrived.append(self._news.get_nowait())
        outputs = []
        for index, output in arrived:
            if isinstance(output, Exception):
                raise output
            outputs.append((index, output))
        return outputs

    async def _take(self, index: int, output: Output) -> None:
        if index not in self._streams:
            return  # a stop string has ended this sequence, and the engine was a step ahead
        if index == 0:
            self.output.cached_tokens = output.num_cached_tokens
            self.output.queue_s = output.queue_s
        if output.finish_reason is FinishReason.ERROR:
            raise EngineError(output.error or "the engine failed on this request")
        answer = self._answers[index]
        answer.update(output)
        if output.finish_reason is not None:
            del self._streams[index]
        elif answer.completion.finish_reason is not None:
            await self._leave(index)

    async def _leave(self, index: int) -> None:
        """Stop listening to a sequence and abort it."""
        stream = self._streams.pop(index)
        await self._engine.abort(self._request_ids[index])
        if (fetcher := self._fetchers.pop(index, None)) is not None:
            fetcher.cancel()
            await asyncio.wait([fetcher])
        if (close := getattr(stream, "aclose", None)) is not None:
            await close()

    def _abort_soon(self) -> None:
        """Abort without awaiting, from where that is impossible."""
        request_ids = [self._request_ids[index] for index in self._streams]
        self._streams.clear()
        if request_ids and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(_abort_all(self._engine, request_ids), self._loop)

    def __del__(self) -> None:
        # Dropped half-read, and the garbage collector may run in any thread.
        self._abort_soon()


def _check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Refuse what only the model's vocabulary can judge."""
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and wanted > vocab_size:
            raise InvalidRequestError(
                f"{name} is {wanted}; the vocabulary has {vocab_size} tokens", param=name
            )
    biased = (token_id for token_id, _ in params.logit_bias)
    for name, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise InvalidRequestError(
                    f"{name} has {token_id}; ids must be in [0, {vocab_size})", param=name
                )


async def _fetch(
    index: int, stream: AsyncIterator[Output], news: asyncio.Queue[tuple[int, Output | Exception]]
) -> None:
    finished = False
    try:
        async for output in stream:
            finished = output.finish_reason is not None
            news.put_nowait((index, output))
        if not finished:
            raise EngineDeadError("the engine left a request without an end")
    except Exception as error:
        news.put_nowait((index, error))


async def _abort_all(engine: Engine, request_ids: Sequence[str]) -> None:
    for request_id in request_ids:
        await engine.abort(request_id)


async def open_llm(
    model: str | Path,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    dtype: DType = "auto",
    quant: str | None = None,
    build_config: BuildConfig | None = None,
    engine_config: EngineConfig | None = None,
    backend: Backend = "auto",
) -> AsyncLLM:
    """Open a model: make its engine if that is not done yet, and start it.

    Args:
        model: A directory with an HF checkpoint, a TensorRT-LLM checkpoint or an engine, or a Hub
            id with or without ``@revision``.
        tokenizer: A tokenizer or a directory with one; None takes the model's.
        dtype: Of an HF checkpoint's conversion.
        quant: Of an HF checkpoint's conversion: 'none', 'w8a16', 'fp8_rowwise'.
        build_config: Limits of an engine that is built here.
        engine_config: What the engine is started with.
        backend: Which engine runs it; 'auto' takes TensorRT-LLM for its own engines alone.

    Returns:
        An AsyncLLM whose engine is ready; ``await llm.engine.shutdown()`` when done.

    Raises:
        CheckpointError: The model cannot be used.
        ConfigError: A setting that this model or engine cannot honour.
        EngineError: The engine did not start.
    """
    engine_dir = await asyncio.to_thread(
        ensure_engine,
        model,
        dtype=dtype,
        quant=quant,
        build_config=build_config,
        backend=backend,
    )
    return await open_engine(
        engine_dir, tokenizer=tokenizer, engine_config=engine_config, backend=backend
    )


async def open_engine(
    engine_dir: Path,
    *,
    tokenizer: Tokenizer | str | Path | None = None,
    engine_config: EngineConfig | None = None,
    backend: Backend = "auto",
    gather_generation_logits: bool = False,
) -> AsyncLLM:
    """Start the engine in a directory; see ``open_llm``.

    ``gather_generation_logits`` lets an engine of TensorRT-LLM's give log-probabilities.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_directory(tokenizer or engine_dir)
    generation_config = GenerationConfig.from_directory(engine_dir, tokenizer)
    engine: Engine
    if runs_on_tensorrt_llm(engine_dir, backend):
        engine = TensorRTLLMEngine(
            engine_dir, engine_config, gather_generation_logits=gather_generation_logits
        )
    elif gather_generation_logits:
        raise ConfigError(
            "gather_generation_logits is for engines of TensorRT-LLM; the native backend gives "
            "log-probabilities without it: leave it out"
        )
    else:
        engine = ProcessEngine(engine_dir, engine_config)
    await engine.start()
    return AsyncLLM(engine, tokenizer, generation_config, engine_dir)


def runs_on_tensorrt_llm(engine_dir: Path, backend: Backend) -> bool:
    """Which engine a directory is for: TensorRT-LLM, or else the native one.

    Raises:
        ConfigError: TensorRT-LLM is asked for and the engine is a native one.
    """
    # What has no config.json is refused by the native engine.
    has_config = (engine_dir / CONFIG_FILE).is_file()
    kind = artifact_kind(engine_dir) if has_config else "engine"
    if backend == "tensorrt-llm" and kind == "engine":
        raise ConfigError(
            f"backend is 'tensorrt-llm', but {engine_dir} is an engine for the native backend; "
            "give the checkpoint it was built from"
        )
    return backend == "tensorrt-llm" or (backend == "auto" and kind == "tensorrt_llm_engine")
