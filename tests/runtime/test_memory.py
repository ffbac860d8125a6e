"""That a step takes no more than ``activation_bytes`` says, by the growth of this process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from llmserve.build.native import build
from llmserve.config import BuildConfig, CalibrationConfig
from llmserve.convert.converter import convert
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest, ScheduledPrefill, SchedulerOutput
from llmserve.runtime.torch.runner import TorchRunner
from tests.models import VOCAB_SIZE, make_model
from tests.runtime.torch_engines import open_runner

MIB = 2**20
# What freed buffers below malloc's threshold leave behind, and first calls of oneDNN.
SLACK = 64 * MIB
SIZES = {"num_hidden_layers": 1, "max_position_embeddings": 8192}
WIDE = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
# By name: the family, its sizes, the KV cache's dtype, and the engine's limits on tokens in a step,
# requests, and tokens of a request.
CASES: dict[str, tuple[str, dict[str, Any], str, tuple[int, int, int]]] = {
    "experts": (
        "qwen3_moe",
        {**SIZES, "hidden_size": 512, "moe_intermediate_size": 128, "num_experts_per_tok": 8},
        "auto",
        (4096, 2, 4096),
    ),
    "mlp": ("llama", {**SIZES, "intermediate_size": 8192}, "auto", (2048, 2, 2048)),
    "gathered_int8": ("llama", WIDE, "int8", (64, 16, 2048)),
    "gathered_fp8": ("llama", WIDE, "fp8", (64, 16, 2048)),
    "softcapped": (
        "gemma2",
        {**WIDE, "num_attention_heads": 16, "head_dim": 16},
        "auto",
        (4096, 2, 4096),
    ),
    "sampled": ("llama", {**SIZES, "vocab_size": 49152}, "auto", (192, 192, 16)),
}


@pytest.mark.parametrize("name", list(CASES))
def test_a_step_takes_no_more_than_is_told(name: str, tmp_path: Path) -> None:
    family, sizes, kv_cache_dtype, (tokens, requests, length) = CASES[name]
    vocab = sizes.get("vocab_size", VOCAB_SIZE)
    make_model(tmp_path / "hf", family, dtype=torch.bfloat16, **sizes)
    source = convert(
        tmp_path / "hf",
        tmp_path / "checkpoint",
        kv_cache_dtype=kv_cache_dtype,
        calibration=None if kv_cache_dtype == "auto" else CalibrationConfig(samples=2, seq_len=32),
    )
    limits = {"max_num_tokens": tokens, "max_batch_size": requests, "max_seq_len": length}
    engine = build(source, tmp_path / "engine", BuildConfig(**limits))
    blocks = -(-length // 32)
    runner = open_runner(engine, num_blocks=requests * blocks, tokens_per_block=32, **limits)
    runner.warm_up()
    for cache in runner._kv_cache:
        cache.zero_()
    runner._inputs.token_ids.zero_()
    params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=0)
    prompt = [i % vocab for i in range(length - 1)]
    new = [
        NewRequest(
            request_id=f"r{i}",
            token_ids=prompt,
            num_prompt_tokens=length - 1,
            sampling_params=params,
        )
        for i in range(requests)
    ]
    tables = {f"r{i}": (list(range(i * blocks, (i + 1) * blocks)),) for i in range(requests)}
    groups = len(runner.info.kv_groups)
    known = SchedulerOutput(
        step_id=0,
        new_requests=new,
        new_block_ids={request_id: ids * groups for request_id, ids in tables.items()},
        prefills=[_prefill(i, length - 2, 1) for i in range(requests)],
    )
    # The end of every prompt at once, then each one's newest token, then one prompt whole.
    decodes = SchedulerOutput(step_id=1, decodes=list(tables))
    prompt_alone = SchedulerOutput(step_id=2, prefills=[_prefill(0, 0, min(tokens, length - 2))])
    measured = max(_growth(runner, step) for step in (known, decodes, prompt_alone))
    told = runner.info.workspace_bytes  # ``activation_bytes`` of these limits
    assert measured <= told + SLACK, f"{measured / MIB:.0f} MiB, told {told / MIB:.0f}"


def _prefill(request: int, start: int, count: int) -> ScheduledPrefill:
    return ScheduledPrefill(request_id=f"r{request}", num_computed_tokens=start, num_tokens=count)


def _growth(runner: TorchRunner, step: SchedulerOutput) -> int:
    """Resident bytes at the peak of a step above those before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _status("VmRSS")
    runner.finish(runner.launch(step))
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
