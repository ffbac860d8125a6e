"""Engines of random tiny models, and the scheduler that drives a runner over them."""

from __future__ import annotations

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
from llmserve.core.step import NewRequest, ScheduledRequest, SchedulerOutput
from llmserve.runtime.torch import load_runner
from llmserve.runtime.torch.runner import TorchRunner
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
) -> TorchRunner:
    """A loaded runner with a KV cache whose every value is NaN."""
    runner = load_runner(
        engine,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=tokens_per_block,
        device=device,
    )
    runner.allocate_kv_cache((num_blocks,))
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
    logits, start = [], 0
    with torch.inference_mode():
        runner._inputs.update(SchedulerOutput(step_id=0, new_requests=[new]))
        for count in chunks or [len(prompt)]:
            part = ScheduledRequest(
                request_id="prompt",
                num_computed_tokens=start,
                num_tokens=count,
                new_block_ids=(blocks if start == 0 else [],),
            )
            runner._inputs.update(SchedulerOutput(step_id=1, scheduled=[part]))
            inputs = runner._inputs.pack([part])
            hidden = runner._decoder.forward(
                inputs.token_ids, inputs.positions, inputs.plan, runner._kv_cache
            )
            logits.append(runner._decoder.logits(hidden).cpu())
            start += count
        runner._inputs.update(SchedulerOutput(step_id=2, finished_request_ids=["prompt"]))
    assert start == len(prompt)
    return torch.cat(logits)


class Driver:
    """A scheduler and a runner, and the steps between them."""

    def __init__(
        self,
        runner: TorchRunner,
        *,
        num_blocks: int = 64,
        policy: CapacitySchedulerPolicy = "guaranteed_no_evict",
        enable_block_reuse: bool = True,
        max_num_tokens: int = 512,
        max_batch_size: int = 16,
    ) -> None:
        self.runner = runner
        self.kv = KVCacheManager(
            runner.info.kv_groups, (num_blocks,), runner._tokens_per_block, enable_block_reuse
        )
        self.scheduler = Scheduler(
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_seq_len=MAX_SEQ_LEN,
            kv=self.kv,
            policy=policy,
            enable_chunked_prefill=True,
            max_queue_size=64,
        )
        self.num_requests = 0
        self.steps: list[SchedulerOutput] = []

    def submit(self, prompt: Sequence[int], params: SamplingParams, sequence_index: int = 0) -> str:
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        self.scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=tuple(prompt),
                sampling_params=params,
                sequence_index=sequence_index,
            ),
            0.0,
        )
        return request_id

    def run(self) -> dict[str, list[Output]]:
        """Step until nothing is left; the outputs by request."""
        outputs: dict[str, list[Output]] = {}
        while self.scheduler.has_unfinished_requests():
            for output in self.step():
                outputs.setdefault(output.request_id, []).append(output)
        # What has ended is told to the runner with the next step.
        self.step()
        self.kv.check_integrity()
        return outputs

    def step(self) -> list[Output]:
        step = self.scheduler.schedule(0.0)
        self.steps.append(step)
        result = self.runner.finish(self.runner.launch(step))
        return self.scheduler.update_from_output(step, result)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[int]]:
        """The tokens of each prompt, all submitted at once."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        ids = [self.submit(prompt, p) for prompt, p in zip(prompts, each, strict=True)]
        outputs = self.run()
        return [[t for output in outputs[i] for t in output.token_ids] for i in ids]
