#!/usr/bin/env python3
"""Measures what deterministic computation costs: its time for a step, divided by that without.

    python scripts/bench_deterministic.py --threads 2

Two runners of one engine, plain and deterministic, take turns step by step, so that whatever else
the machine does falls on both alike; medians are divided. Steps are decodes of some streams behind
a context, and a prefill. The models are the demo model with 8-bit weights and a random Llama of 110
million parameters. It also counts tokens whose logits a plain runner computes to other bits beside
others than alone, to show that there is something to pay for; the deterministic one must have none.

Prints the hardware, a table, and one JSON line last. The exit code is 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import describe_machine
from transformers import LlamaConfig, LlamaForCausalLM

from llmserve.build.native import build
from llmserve.config import BuildConfig
from llmserve.convert.converter import convert
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest, ScheduledPrefill, SchedulerOutput
from llmserve.runtime.torch import load_runner
from llmserve.runtime.torch.runner import TorchRunner

DEMO = Path(__file__).resolve().parents[1] / "checkpoints" / "demo"
BLOCK = 32
# By name: the model, its weights, and the dtype of all else.
MODELS = {
    "demo-w8a16": ("demo", "w8a16", "auto"),
    "110m-w8a16": ("110m", "w8a16", "bfloat16"),
    "110m-float32": ("110m", "none", "float32"),
    "110m-bfloat16": ("110m", "none", "bfloat16"),
}


def main() -> int:
    """Run the benchmark; returns the exit code."""
    args = _arguments()
    result: dict[str, Any] = {
        "benchmark": "deterministic",
        "machine": describe_machine(
            "torch",
            "llmserve",
            capability=torch.backends.cpu.get_cpu_capability(),
            threads=args.threads,
            load=round(os.getloadavg()[0], 1),
        ),
    }
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    print("| model | step | plain ms | deterministic ms | ratio |")
    print("| --- | --- | --- | --- | --- |")
    result["runs"], result["bits"] = [], {}
    with tempfile.TemporaryDirectory() as directory:
        for name in args.models:
            engine = make_engine(Path(directory) / name, *MODELS[name])
            pair = [Steps(engine, deterministic, args) for deterministic in (False, True)]
            for streams in args.streams:
                result["runs"].append(
                    _shown(name, f"decode {streams}", decode(pair, streams, args))
                )
            result["runs"].append(_shown(name, f"prefill {args.prefill}", prefill(pair, args)))
            result["bits"][name] = [steps.other_bits(8, args) for steps in pair]
    print("\nlogits with other bits in a batch of 8 than alone (plain, deterministic):")
    for name, counts in result["bits"].items():
        print(f"  {name}: {counts[0]} and {counts[1]} of 8 rows")
    print(json.dumps(result))
    return int(any(deterministic for _, deterministic in result["bits"].values()))


class Steps:
    """A runner, its requests given by hand."""

    def __init__(self, engine: Path, deterministic: bool, args: argparse.Namespace) -> None:
        seq_len = max(args.context + args.steps + 2, args.prefill + 1)
        self._blocks = -(-seq_len // BLOCK)
        streams = max(*args.streams, 8)
        start = time.perf_counter()
        runner = load_runner(
            engine,
            max_batch_size=streams,
            max_num_tokens=max(args.prefill, args.context, streams),
            max_seq_len=seq_len,
            tokens_per_block=BLOCK,
            device="cpu",
            threads=args.threads,
            deterministic=deterministic,
        )
        assert isinstance(runner, TorchRunner)
        self.load_s = time.perf_counter() - start
        self._runner = runner
        self._runner.allocate_kv_cache((streams * self._blocks,))
        self._runner.warm_up()
        self._known: list[str] = []

    def run(self, **parts: Any) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self._runner.finish(self._runner.launch(SchedulerOutput(step_id=0, **parts)))
        return time.perf_counter() - start

    def add(self, prompts: Sequence[Sequence[int]]) -> list[float]:
        """Prefill new requests, a step each; their seconds."""
        return [self.run(**self._new(prompt)) for prompt in prompts]

    def decode(self) -> float:
        """Seconds of one step of all requests."""
        return self.run(decodes=self._known)

    def forget(self) -> None:
        """End all requests."""
        self.run(finished_request_ids=self._known)
        self._known = []

    def other_bits(self, streams: int, args: argparse.Namespace) -> int:
        """Rows of logits that differ when requests decode side by side and when alone."""
        prompts = _prompts(streams, args.context)
        alone = []
        for prompt in prompts:
            self.add([prompt])
            alone.append(self._decode_logits())
            self.forget()
        self.add(prompts)
        together = self._decode_logits()
        self.forget()
        return int((together != torch.cat(alone)).any(-1).sum())

    def _decode_logits(self) -> torch.Tensor:
        handle = self._runner.launch(SchedulerOutput(step_id=0, decodes=self._known))
        logits = handle.logits
        assert logits is not None
        logits = logits.clone()
        self._runner.finish(handle)
        return logits

    def _new(self, prompt: Sequence[int]) -> dict[str, Any]:
        first, request_id = len(self._known) * self._blocks, f"r{len(self._known)}"
        self._known.append(request_id)
        new = NewRequest(
            request_id=request_id,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            sampling_params=SamplingParams(seed=0),
        )
        whole = ScheduledPrefill(
            request_id=request_id, num_computed_tokens=0, num_tokens=len(prompt)
        )
        blocks = (list(range(first, first + self._blocks)),)
        return {
            "new_requests": [new],
            "new_block_ids": {request_id: blocks},
            "prefills": [whole],
        }


def decode(
    pair: Sequence[Steps], streams: int, args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Seconds of steps that decode so many requests behind a context, of both runners."""
    for steps in pair:
        steps.add(_prompts(streams, args.context))
        steps.decode()
    times = [(pair[0].decode(), pair[1].decode()) for _ in range(args.steps)]
    for steps in pair:
        steps.forget()
    plain, deterministic = zip(*times, strict=True)
    return list(plain), list(deterministic)


def prefill(pair: Sequence[Steps], args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Seconds of steps that compute a prompt, of both runners."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(max(3, args.steps // 8)):
        for steps, seconds in zip(pair, times, strict=True):
            seconds += steps.add(_prompts(1, args.prefill))
            steps.forget()
    return times


def make_engine(path: Path, model: str, quant: str, dtype: str) -> Path:
    """A native engine under ``path``."""
    source = DEMO
    if model != "demo":
        source = path / "hf"
        config = LlamaConfig(
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            intermediate_size=2048,
            vocab_size=32000,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(source)
    convert(source, path / "checkpoint", quant=quant, dtype=dtype)
    return build(path / "checkpoint", path / "engine", BuildConfig())


def _prompts(count: int, length: int) -> list[list[int]]:
    tokens = torch.randint(1000, (count, length), generator=torch.Generator().manual_seed(count))
    prompts: list[list[int]] = tokens.tolist()
    return prompts


def _shown(name: str, step: str, times: tuple[list[float], list[float]]) -> dict[str, Any]:
    plain, deterministic = (statistics.median(seconds) * 1e3 for seconds in times)
    ratio = deterministic / plain
    print(f"| {name} | {step} | {plain:.2f} | {deterministic:.2f} | {ratio:.2f} |", flush=True)
    return {
        "model": name,
        "step": step,
        "plain_ms": round(plain, 3),
        "deterministic_ms": round(deterministic, 3),
        "ratio": round(ratio, 3),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=256, help="tokens before the decodes")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prefill")
    parser.add_argument("--steps", type=int, default=40, help="decodes of each runner")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
