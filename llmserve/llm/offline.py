"""``LLM``: generation from a plain script or a notebook, with TensorRT-LLM's signatures."""

from __future__ import annotations

import asyncio
import itertools
import weakref
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, cast

from tqdm import tqdm

from llmserve.artifacts import ensure_engine
from llmserve.config import (
    BuildConfig,
    CapacitySchedulerPolicy,
    DType,
    EngineConfig,
    KvCacheConfig,
    NGramDecodingConfig,
)
from llmserve.core.request import INTERACTIVE_PRIORITY
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.engine import EngineInfo
from llmserve.engine.guided_decoding import check_guided_decoding
from llmserve.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineShutdownError,
    InvalidRequestError,
    LlmserveError,
)
from llmserve.llm.async_llm import AsyncLLM, RequestStream, open_engine
from llmserve.llm.loop_thread import LoopThread
from llmserve.llm.outputs import CompletionOutput, RequestOutput
from llmserve.tokenizer import Tokenizer

# One prompt: text, or token ids.
PromptInput = str | Sequence[int]

# Arguments of TensorRT-LLM's LLM that scripts often write out, with the one value served here.
_ONLY_VALUES: dict[str, object] = {
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "trust_remote_code": False,
    "pipeline_parallel_size": 1,
    "max_beam_width": 1,
}


class LLM:
    """A model that generates text, for scripts::

        from llmserve import LLM, SamplingParams

        with LLM("checkpoints/my-engine") as llm:
            print(llm.generate("Hello", SamplingParams(max_tokens=20)).outputs[0].text)

    The engine runs in a process of its own and an event loop in a thread, so it works with and
    without a main guard, in a notebook, and beside the caller's own event loop. It is thread-safe.

    Args:
        model: A directory with an HF checkpoint, a TensorRT-LLM checkpoint or an engine, or a Hub
            id. What is missing is made and kept in the cache directory.
        tokenizer: A tokenizer or a directory with one; None takes the model's.
        dtype: Of an HF checkpoint's conversion.
        quant: Of an HF checkpoint's conversion: one of ``config.QUANT_ALGOS``, None for 'none'.
        kv_cache_dtype: Of an HF checkpoint's conversion: 'auto', 'int8' or 'fp8'.
        tensor_parallel_size: Of an HF checkpoint's conversion; what is converted has its own.
        revision: Of a Hub id.
        build_config: Limits of an engine that is built here.
        max_batch_size: Most requests in one step; None for the engine's.
        max_num_tokens: Most tokens in one step; None for the engine's.
        max_seq_len: Longest prompt plus answer in tokens; None for the engine's.
        kv_cache_config: The paged KV cache.
        capacity_scheduler_policy: guaranteed_no_evict or max_utilization.
        enable_chunked_prefill: Let a prompt be computed over several steps.
        speculative_config: Guess tokens by prompt lookup and verify several in a step; None: never.
        deterministic: The same bits for a request whatever else runs; on a CPU alone.
        threads: Threads of the compute process; None takes the cores of the cgroup.
        device: 'auto' takes CUDA where there is a GPU.
        **kwargs: Other arguments of TensorRT-LLM's LLM, where their value changes nothing.

    Raises:
        ConfigError: An unknown argument, or a value that cannot be honoured (a ValueError too).
        CheckpointError: The model cannot be used.
        EngineError: The engine did not start.
    """

    def __init__(
        self,
        model: str | Path,
        tokenizer: Tokenizer | str | Path | None = None,
        *,
        dtype: DType = "auto",
        quant: str | None = None,
        kv_cache_dtype: str | None = None,
        tensor_parallel_size: int = 1,
        revision: str | None = None,
        build_config: BuildConfig | None = None,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        max_seq_len: int | None = None,
        kv_cache_config: KvCacheConfig | None = None,
        capacity_scheduler_policy: CapacitySchedulerPolicy = "guaranteed_no_evict",
        enable_chunked_prefill: bool = True,
        speculative_config: NGramDecodingConfig | None = None,
        deterministic: bool = False,
        threads: int | None = None,
        device: str = "auto",
        **kwargs: object,
    ) -> None:
        _refuse(kwargs)
        if revision is not None:
            if Path(model).exists():
                raise ConfigError(f"revision is {revision!r}; {model} is a directory, not a Hub id")
            model = f"{model}@{revision}"
        engine_config = EngineConfig(
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_seq_len=max_seq_len,
            kv_cache=kv_cache_config or KvCacheConfig(),
            capacity_scheduler_policy=capacity_scheduler_policy,
            enable_chunked_prefill=enable_chunked_prefill,
            speculative=speculative_config,
            deterministic=deterministic,
            threads=threads,
            device=device,
        )
        # In the caller's thread, where Ctrl-C ends a long conversion.
        engine_dir = ensure_engine(
            model,
            dtype=dtype,
            quant=quant,
            kv_cache_dtype=kv_cache_dtype,
            tp_size=tensor_parallel_size if tensor_parallel_size != 1 else None,
            build_config=build_config,
        )
        self._request_ids = itertools.count()
        self._loop_thread = LoopThread("llmserve-llm")
        try:
            self._async_llm: AsyncLLM = self._loop_thread.run(
                open_engine(engine_dir, tokenizer=tokenizer, engine_config=engine_config)
            )
        except BaseException:
            self._loop_thread.stop()
            raise
        # Runs at shutdown(), when the last reference goes, or when the interpreter ends.
        self._shut_down = weakref.finalize(self, _shut_down, self._loop_thread, self._async_llm)

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._async_llm.tokenizer

    @property
    def info(self) -> EngineInfo:
        """What the engine is and holds."""
        return self._async_llm.engine.info

    def generate(
        self,
        inputs: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int = INTERACTIVE_PRIORITY,
        timeout_s: float | None = None,
        cache_salt: str | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer prompts and wait for all answers.

        Every input is checked before the first one is submitted. If the engine fails on one,
        the others are aborted. However many inputs there are, the engine's queue is not overrun.

        Args:
            inputs: Text, a list of token ids, or a list of either.
            sampling_params: One for all, or one per input; None for ``SamplingParams()``: greedy,
                32 tokens. (The model's generation_config.json is for the HTTP API alone, as in
                TensorRT-LLM.)
            use_tqdm: Show a progress bar if standard error is a terminal.
            priority: Of all of them: lower starts earlier, -100 to 100.
            timeout_s: Seconds from an input's submission after which its answers end as they are,
                with finish_reason 'timeout'; None for never.
            cache_salt: KV blocks are shared under the same salt only.

        Returns:
            One output for a single input, else a list in the order of the inputs.

        Raises:
            InvalidRequestError: An input cannot be served; the message begins with its index.
            EngineError: The engine failed.
        """
        prompts, is_single = _as_list(inputs)
        all_params = _params_per_prompt(sampling_params, len(prompts))
        jobs = []
        for index, (prompt, params) in enumerate(zip(prompts, all_params, strict=True)):
            try:
                jobs.append(self._job(prompt, params, priority, timeout_s, cache_salt))
            except InvalidRequestError as error:
                _name_input(error, index)
                raise
        with tqdm(total=len(jobs), unit="prompt", disable=None if use_tqdm else True) as bar:
            outputs = self._loop_thread.run(_generate_all(self._async_llm, jobs, bar))
        return outputs[0] if is_single else outputs

    def generate_async(
        self,
        inputs: PromptInput,
        sampling_params: SamplingParams | None = None,
        streaming: bool = False,
        *,
        priority: int = INTERACTIVE_PRIORITY,
        timeout_s: float | None = None,
        cache_salt: str | None = None,
    ) -> GenerationResult:
        """Submit one prompt and return at once.

        Args:
            inputs: Text or a list of token ids.
            sampling_params: None for ``SamplingParams()``: greedy, 32 tokens.
            streaming: Let iteration yield every step instead of the finished answers alone.
            priority: Lower starts earlier, -100 to 100.
            timeout_s: Seconds after which its answers end with finish_reason 'timeout'.
            cache_salt: KV blocks are shared under the same salt only.

        Returns:
            The result: await it, call ``.result()``, or iterate over it with ``for`` or
            ``async for``.

        Raises:
            InvalidRequestError: The input cannot be served.
            EngineError: Overloaded, down or shut down.
        """
        params = sampling_params or SamplingParams()
        job = self._job(inputs, params, priority, timeout_s, cache_salt)
        stream = self._loop_thread.run(_submit(self._async_llm, job))
        return GenerationResult(stream, self._loop_thread, streaming)

    def shutdown(self) -> None:
        """Abort what runs and end the engine process. A second call does nothing."""
        self._shut_down()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    def _job(
        self,
        prompt: PromptInput,
        params: SamplingParams,
        priority: int,
        timeout_s: float | None,
        cache_salt: str | None,
    ) -> _Job:
        if params.guided_decoding is not None:
            check_guided_decoding(params.guided_decoding)
        text = prompt if isinstance(prompt, str) else None
        if isinstance(prompt, str):
            token_ids = self.tokenizer.encode(prompt, add_special_tokens=params.add_special_tokens)
        elif not isinstance(prompt, Sequence):
            raise InvalidRequestError(
                f"a prompt is text or a list of token ids, not {type(prompt).__name__}"
            )
        else:
            token_ids = list(cast(Sequence[int], prompt))
            for token_id in token_ids:
                if not isinstance(token_id, int):
                    raise InvalidRequestError(
                        f"a prompt is text or a list of token ids, and {token_id!r} is no id"
                    )
        request_id = str(next(self._request_ids))
        job = _Job(request_id, text, token_ids, params, priority, timeout_s, cache_salt)
        # Only to have it checked now; the stream makes the requests that are sent.
        self._async_llm.make_requests(
            token_ids,
            params,
            request_id=request_id,
            priority=priority,
            timeout_s=timeout_s,
            cache_salt=cache_salt,
        )
        return job


class GenerationResult:
    """A prompt being answered: what ``LLM.generate_async`` returns.

    Await it or call ``result`` for the finished output; iterate, with ``for`` or ``async for``, for
    the output at each step (the same object, changed). It works in any thread and in any event
    loop. Cancelling a task that waits for it aborts the request.
    """

    def __init__(self, stream: RequestStream, loop_thread: LoopThread, streaming: bool) -> None:
        self._stream = stream
        self._loop_thread = loop_thread
        self._streaming = streaming
        self._lock = asyncio.Lock()
        self._error: Exception | None = None
        self._exhausted = False  # iteration has given the last output

    @property
    def request_id(self) -> str:
        """Unique in this LLM."""
        return self._stream.output.request_id

    @property
    def prompt(self) -> str | None:
        """The prompt's text if it was given as text."""
        return self._stream.output.prompt

    @property
    def prompt_token_ids(self) -> list[int]:
        """The prompt as the model sees it."""
        return self._stream.output.prompt_token_ids

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The answers as far as they were read."""
        return self._stream.output.outputs

    @property
    def finished(self) -> bool:
        """Whether the last output was read."""
        return self._stream.output.finished

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the finished output.

        Args:
            timeout: Seconds to wait; None for ever. The request goes on after a timeout.

        Raises:
            TimeoutError: It is not finished yet.
            EngineError: The engine failed.
        """
        future = self._start(to_end=True)
        try:
            return future.result(timeout)
        except TimeoutError:
            raise
        except BaseException:
            future.cancel()
            raise

    async def aresult(self) -> RequestOutput:
        """Wait for the finished output, in any event loop."""
        return await asyncio.wrap_future(self._start(to_end=True))

    def __await__(self) -> Generator[object, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> GenerationResult:
        return self

    def __next__(self) -> RequestOutput:
        if self._exhausted:
            raise StopIteration
        future = self._start(to_end=not self._streaming)
        try:
            output = future.result()
        finally:
            future.cancel()
        self._exhausted = output.finished
        return output

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._exhausted:
            raise StopAsyncIteration
        output = await asyncio.wrap_future(self._start(to_end=not self._streaming))
        self._exhausted = output.finished
        return output

    def abort(self) -> None:
        """Ask for an early end; what is left of the answers has finish_reason 'abort'."""
        self._loop_thread.run(self._stream.abort())

    def _start(self, *, to_end: bool) -> Future[RequestOutput]:
        return self._loop_thread.submit(self._read(to_end=to_end))

    async def _read(self, *, to_end: bool) -> RequestOutput:
        """In the loop's thread: the next output, or the last one."""
        async with self._lock:
            if self._error is not None:
                raise self._error
            if self.finished:
                return self._stream.output
            try:
                async for output in self._stream:
                    if output.finished or not to_end:
                        return output
                raise EngineError("the request was aborted: a task waiting for it was cancelled")
            except Exception as error:
                self._error = error
                raise


@dataclass(frozen=True, slots=True)
class _Job:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    priority: int
    timeout_s: float | None
    cache_salt: str | None


async def _submit(async_llm: AsyncLLM, job: _Job) -> RequestStream:
    return async_llm.generate(
        job.prompt_token_ids,
        job.sampling_params,
        request_id=job.request_id,
        prompt=job.prompt,
        priority=job.priority,
        timeout_s=job.timeout_s,
        cache_salt=job.cache_salt,
    )


async def _generate_all(
    async_llm: AsyncLLM, jobs: Sequence[_Job], bar: tqdm[NoReturn]
) -> list[RequestOutput]:
    """Answer all jobs; the first failure aborts the rest."""
    # Enough to keep the engine full, and few enough for its queue.
    window = asyncio.Semaphore(2 * async_llm.engine.info.max_batch_size)

    async def answer(index: int, job: _Job) -> RequestOutput:
        async with window:
            try:
                output = await _generate_one(async_llm, job)
            except (EngineDeadError, EngineShutdownError):
                raise
            except LlmserveError as error:
                _name_input(error, index)
                raise
        bar.update()
        return output

    tasks = [asyncio.create_task(answer(index, job)) for index, job in enumerate(jobs)]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _generate_one(async_llm: AsyncLLM, job: _Job) -> RequestOutput:
    while True:
        try:
            stream = await _submit(async_llm, job)
            async for _ in stream:
                pass
            return stream.output
        except EngineOverloadedError as error:
            # Others use the engine as well, or its queue is shorter than the window.
            await asyncio.sleep(error.retry_after_s)


def _shut_down(loop_thread: LoopThread, async_llm: AsyncLLM) -> None:
    loop_thread.stop(async_llm.engine.shutdown())


def _refuse(kwargs: dict[str, object]) -> None:
    for name, value in kwargs.items():
        if name not in _ONLY_VALUES:
            raise ConfigError(f"LLM has no argument {name!r}")
        if value != _ONLY_VALUES[name]:
            raise ConfigError(
                f"{name} is {value!r}; only {_ONLY_VALUES[name]!r} is implemented here"
            )


def _as_list(inputs: PromptInput | Sequence[PromptInput]) -> tuple[list[PromptInput], bool]:
    """The inputs as a list of prompts, and whether there was one alone."""
    if isinstance(inputs, str):
        return [inputs], True
    if not isinstance(inputs, Sequence):
        raise InvalidRequestError(
            f"inputs are text, token ids, or a list of either, not {type(inputs).__name__}"
        )
    if inputs and isinstance(inputs[0], int):
        return [cast(Sequence[int], inputs)], True
    return list(cast(Sequence[PromptInput], inputs)), False


def _params_per_prompt(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if len(sampling_params) != num_prompts:
        raise InvalidRequestError(
            f"there are {len(sampling_params)} sampling_params for {num_prompts} inputs; "
            "give one for all or one for each"
        )
    return list(sampling_params)


def _name_input(error: LlmserveError, index: int) -> None:
    """Make the error say which input it is about."""
    error.args = (f"inputs[{index}]: {error}",)
