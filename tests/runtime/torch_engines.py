"""Engines of random tiny models, and the scheduler that drives a runner over them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmserve.build.native import build
from llmserve.config import BuildConfig, CapacitySchedulerPolicy
from llmserve.convert.converter import convert
from llmserve.core.kv_cache_manager import KVCacheManager
from llmserve.core.request import Output, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.scheduler import Scheduler
from llmserve.core.step import NewRequest, ScheduledPrefill, SchedulerOutput
from llmserve.runtime.torch import load_runner
from llmserve.runtime.torch.runner import TorchRunner
from tests.core.factories import StandInSpeculator
from tests.models import make_model

MAX_SEQ_LEN = 256


def make_engine(
    path: Path, *, family: str = "llama", quant: str = "none", seed: int = 0, **overrides: Any
) -> Path:
    """A random model (``path / "hf"``) as a native engine (``path / "engine"``).

    Returns:
        The engine's directory.
    """
    make_model(path / "hf", family, seed=seed, tokenizer=False, **overrides)
    convert(path / "hf", path / "checkpoint", quant=quant)
    return build(path / "checkpoint", path / "engine", BuildConfig(max_seq_len=MAX_SEQ_LEN))


def open_runner(
    engine: Path,
    *,
    device: str = "cpu",
    num_blocks: int = 64,
    tokens_per_block: int = 8,
    max_batch_size: int = 16,
    max_num_tokens: int = 512,
    max_seq_len: int = MAX_SEQ_LEN,
    deterministic: bool = False,
) -> TorchRunner:
    """A loaded runner with a KV cache whose every value is NaN, so many blocks in each group."""
    runner = load_runner(
        engine,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=tokens_per_block,
        device=device,
        deterministic=deterministic,
    )
    assert isinstance(runner, TorchRunner)
    runner.allocate_kv_cache((num_blocks,) * len(runner.info.kv_groups))
    for cache in runner._kv_cache:
        cache.fill_(float("nan") if cache.is_floating_point() else 127)
    return runner


def replace_embedding(runner: TorchRunner, weight: torch.Tensor) -> None:
    """Give a runner another embedding (vocab, hidden)."""
    embedding = replace(runner._decoder.embedding, weight=weight)
    runner._decoder = replace(runner._decoder, embedding=embedding)


def prompt_logits(
    runner: TorchRunner, prompt: Sequence[int], chunks: Sequence[int] | None = None
) -> torch.Tensor:
    """The logits (tokens, vocab) of a prompt, all of its rows.

    Args:
        runner: The model.
        prompt: Token ids.
        chunks: Tokens of each step, in all those of the prompt; one token is computed as a decode.
            None: one step.
    """
    blocks = list(range(-(-len(prompt) // runner._tokens_per_block)))
    new = NewRequest(
        request_id="prompt",
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        sampling_params=SamplingParams(seed=0),
    )
    tables = {"prompt": (blocks,) * len(runner.info.kv_groups)}
    logits, start = [], 0
    with torch.inference_mode():
        runner._inputs.update(SchedulerOutput(step_id=0, new_requests=[new], new_block_ids=tables))
        for count in chunks or [len(prompt)]:
            inputs = runner._inputs.pack(
                SchedulerOutput(step_id=1, prefills=[prefill("prompt", start, count)])
            )
            hidden = runner._decoder.forward(
                inputs.token_ids, inputs.positions, inputs.plan, runner._kv_cache
            )
            logits.append(runner._decoder.logits(hidden).cpu())
            start += count
        runner._inputs.update(SchedulerOutput(step_id=2, finished_request_ids=["prompt"]))
    assert start == len(prompt)
    return torch.cat(logits)


def prefill(request_id: str, num_computed_tokens: int, num_tokens: int) -> ScheduledPrefill:
    """A range of a request's known tokens to compute."""
    return ScheduledPrefill(
        request_id=request_id, num_computed_tokens=num_computed_tokens, num_tokens=num_tokens
    )


class Driver:
    """A scheduler and a runner, and the steps between them.

    Args:
        runner: What executes them.
        num_blocks: Of each KV group's pool.
        policy: Of the scheduler.
        enable_block_reuse: Of the KV cache.
        max_num_tokens: Of a step.
        max_batch_size: Of a step; as far as max_num_tokens lets it.
        runs_ahead: Schedule each step while the one before is under way.
        speculator: Guesses tokens.
    """

    def __init__(
        self,
        runner: TorchRunner,
        *,
        num_blocks: int | tuple[int, ...] = 64,
        policy: CapacitySchedulerPolicy = "guaranteed_no_evict",
        enable_block_reuse: bool = True,
        max_num_tokens: int = 512,
        max_batch_size: int = 16,
        runs_ahead: bool = False,
        speculator: StandInSpeculator | None = None,
    ) -> None:
        self.runner = runner
        groups = runner.info.kv_groups
        self.kv = KVCacheManager(
            groups,
            (num_blocks,) * len(groups) if isinstance(num_blocks, int) else num_blocks,
            runner._tokens_per_block,
            max_step_tokens=max_num_tokens,
            enable_block_reuse=enable_block_reuse,
        )
        self.scheduler = Scheduler(
            max_batch_size=min(max_batch_size, max_num_tokens),
            max_num_tokens=max_num_tokens,
            max_seq_len=MAX_SEQ_LEN,
            kv=self.kv,
            policy=policy,
            enable_chunked_prefill=True,
            max_queue_size=64,
            speculator=speculator,  # type: ignore[arg-type]
        )
        self.runs_ahead = runs_ahead
        self.num_requests = 0
        self.steps: list[SchedulerOutput] = []
        self.under_way: list[SchedulerOutput] = []
        self.handle: Any = None  # of the first of them

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        sequence_index: int = 0,
        eos_token_ids: tuple[int, ...] = (),
        constraint: Any = None,
    ) -> str:
        """Queue a request and return its id. A constraint has a method ``mask``."""
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        self.scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=tuple(prompt),
                sampling_params=params,
                eos_token_ids=eos_token_ids,
                sequence_index=sequence_index,
            ),
            0.0,
            constraint,
        )
        return request_id

    def run(self) -> dict[str, list[Output]]:
        """Step until nothing is left; the outputs by request."""
        outputs: dict[str, list[Output]] = {}
        while self.scheduler.has_unfinished_requests():
            for output in self.step():
                outputs.setdefault(output.request_id, []).append(output)
        # What is still under way brings nothing more, and what has ended is told to the runner with
        # the next step.
        late = self._finish_all() + self.step() + self._finish_all()
        assert not late
        assert not self.known_request_ids
        return outputs

    @property
    def known_request_ids(self) -> set[str]:
        """Requests that the runner has not forgotten."""
        return set(self.runner._inputs._slots) if isinstance(self.runner, TorchRunner) else set()

    def step(self) -> list[Output]:
        """Schedule a step, and finish the oldest under way."""
        outputs = []
        if self.under_way and not self.scheduler.may_run_ahead:
            outputs += self._finish()
        step = self.scheduler.schedule(0.0)
        self.steps.append(step)
        self.under_way.append(step)
        if len(self.under_way) == 1:
            self.handle = self.runner.launch(step)
        while len(self.under_way) > self.runs_ahead:
            outputs += self._finish()
        return outputs

    def _finish_all(self) -> list[Output]:
        outputs = []
        while self.under_way:
            outputs += self._finish()
        return outputs

    def _finish(self) -> list[Output]:
        step = self.under_way.pop(0)
        masks = {
            request_id: constraint.mask()
            for request_id, constraint in self.scheduler.constraints(step).items()
        }
        result = self.runner.finish(self.handle, masks)
        outputs = self.scheduler.update_from_output(step, result)
        self.scheduler.check_integrity()
        if self.under_way:
            self.handle = self.runner.launch(self.under_way[0])
        return outputs

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[int]]:
        """The tokens of each prompt, all submitted at once."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        ids = [self.submit(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        outputs = self.run()
        return [tokens(outputs[i]) for i in ids]


def tokens(outputs: Sequence[Output]) -> list[int]:
    """All tokens of one request's outputs."""
    return [token for output in outputs for token in output.token_ids]


class Guesser:
    """Guesses what comes next in answers that are known: some right, some wrong, some not at all.

    Args:
        prompts: Of the requests.
        answers: Theirs.
        seed: Of its choices.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[list[int]], seed: int = 0
    ) -> None:
        self._answers = {tuple(p): a for p, a in zip(prompts, answers, strict=True)}
        self._random = random.Random(seed)

    def __call__(self, request_id: str, token_ids: list[int]) -> list[int]:
        length = len(token_ids)
        fits = (
            (len(prompt), answer)
            for prompt, answer in self._answers.items()
            if tuple(token_ids[: len(prompt)]) == prompt
            and token_ids[len(prompt) :] == answer[: length - len(prompt)]
        )
        num_prompt, answer = max(fits)
        right = answer[length - num_prompt :][: self._random.randint(0, 4)]
        wrong = [self._random.randrange(256) for _ in range(self._random.choice((0, 0, 1, 3)))]
        return right + wrong
