"""Engines of several ranks against transformers, and against the same model on one rank."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.build.native import build
from llmserve.checkpoint.config import ParallelMapping, PretrainedConfig
from llmserve.checkpoint.quant_config import QuantConfig
from llmserve.config import BuildConfig, CalibrationConfig
from llmserve.convert.converter import convert
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import SchedulerOutput
from llmserve.errors import CheckpointError, ConfigError, EngineError
from llmserve.quantization import weight_format
from llmserve.quantization.unsharded import UnshardedTensors
from llmserve.runtime.torch import load_runner
from llmserve.runtime.torch.tensor_parallel import TensorParallelRunner, rank_devices
from tests.core.factories import StandInSpeculator
from tests.models import load_model, make_model
from tests.processes import has_ended
from tests.runtime.rank_threads import RankThreads
from tests.runtime.torch_engines import (
    MAX_SEQ_LEN,
    Driver,
    Guesser,
    make_engine,
    open_runner,
    prompt_logits,
    tokens,
)
from tests.sharded import DictSource, shard_checkpoint

PROMPTS = [
    torch.randint(320, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (40, 3, 17)
]
GREEDY = SamplingParams(max_tokens=16, seed=0)
SAMPLED = SamplingParams(max_tokens=16, seed=7, temperature=1.0, top_p=0.95, logprobs=2)
PARAMS = [
    replace(GREEDY, logit_bias=((5, 2.0),)),
    SAMPLED,
    replace(SAMPLED, seed=8, frequency_penalty=0.5, min_tokens=9, stop_token_ids=tuple(range(90))),
]

# By name: the family, what differs from its model in tests.models, ranks, and whether they share
# the embedding. Two K and V heads on four ranks are duplicated.
MODELS: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "llama": ("llama", {"vocab_size": 321}, 2, True),
    "llama_duplicated_heads": ("llama", {"vocab_size": 322}, 4, False),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}, 4, True),
    "llama_tied": ("llama", {"tie_word_embeddings": True, "vocab_size": 321}, 4, False),
    "mixtral": ("mixtral", {}, 2, True),
    "qwen2": ("qwen2", {}, 2, True),
    "qwen3": ("qwen3", {"vocab_size": 323}, 2, True),
    "qwen3_moe": ("qwen3_moe", {}, 4, False),
    "gemma": ("gemma", {"vocab_size": 321}, 2, True),
    "gemma2": ("gemma2", {}, 2, False),
    "gemma3": ("gemma3_text", {"vocab_size": 322}, 4, True),
    "phi3": ("phi3", {}, 4, True),
}


def make_ranks(
    path: Path, tp_size: int, *, use_parallel_embedding: bool = True, **settings: Any
) -> Path:
    """``make_engine``, and the same model as an engine of several ranks, which is returned."""
    if not (path / "engine").exists():
        make_engine(path, **settings)
    checkpoint = shard_checkpoint(
        path / "checkpoint",
        path / f"checkpoint{tp_size}",
        tp_size,
        use_parallel_embedding=use_parallel_embedding,
    )
    limits = BuildConfig(max_seq_len=MAX_SEQ_LEN)
    return build(checkpoint, path / f"engine{tp_size}", limits)


def _all_logits(ranks: RankThreads, prompt: list[int]) -> torch.Tensor:
    """The prompt's logits, which all ranks must have alike."""
    first, *others = ranks.each(prompt_logits, [prompt] * len(ranks.ranks))
    assert all(torch.equal(first, other) for other in others)
    return first


@pytest.mark.parametrize("model", list(MODELS))
def test_ranks_compute_what_one_does(tmp_path: Path, model: str) -> None:
    family, overrides, tp_size, share = MODELS[model]
    engine = make_ranks(tmp_path, tp_size, family=family, use_parallel_embedding=share, **overrides)
    ranks = RankThreads(engine)
    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        exact = load_model(tmp_path / "hf", torch.float64)(prompt).logits[0]
        theirs = load_model(tmp_path / "hf")(prompt).logits[0]
    logits = _all_logits(ranks, PROMPTS[0])
    assert logits.shape == exact.shape
    assert (logits - exact).abs().max() <= 4 * (theirs - exact).abs().max()
    expected = Driver(open_runner(tmp_path / "engine")).generate(PROMPTS, PARAMS)
    assert Driver(ranks).generate(PROMPTS, PARAMS) == expected
    _check_speculated(ranks, expected)


def _check_speculated(runner: Any, expected: list[list[int]]) -> None:
    """That every rank knows which guesses are accepted."""
    driver = Driver(runner, speculator=StandInSpeculator(Guesser(PROMPTS, expected)))
    assert driver.generate(PROMPTS, PARAMS) == expected
    stats = driver.scheduler.snapshot()
    assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens


def test_ranks_tell_prompt_logprobs_and_heed_masks(tmp_path: Path) -> None:
    ranks = RankThreads(make_ranks(tmp_path, 2, vocab_size=321))
    params = SamplingParams(max_tokens=4, seed=0, prompt_logprobs=2)
    alone, together = (
        Driver(runner, max_num_tokens=16) for runner in (open_runner(tmp_path / "engine"), ranks)
    )
    found = []
    for driver in (alone, together):
        request_id = driver.submit(PROMPTS[0], params, constraint=Only(9))
        outputs = driver.run()[request_id]
        assert tokens(outputs) == [9] * 4
        found.append(outputs[0].prompt_logprobs or ())
    assert len(found[0]) == len(PROMPTS[0]) - 1
    for ours, theirs in zip(*found, strict=True):
        assert ours.top_token_ids == theirs.top_token_ids
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


class Only:
    """Lets a single token through."""

    def __init__(self, token_id: int) -> None:
        self._token_id = token_id

    def accept(self, token_id: int) -> bool:
        assert token_id == self._token_id
        return False

    def mask(self) -> npt.NDArray[np.int32]:
        allowed = np.arange(352) == self._token_id
        return np.packbits(allowed, bitorder="little").view(np.int32)


def _as_plain(engine: Path, path: Path) -> Path:
    """An engine of one rank whose plain weights are what the ranks' quantised ones stand for."""
    config = PretrainedConfig.from_dict(
        json.loads((engine / "config.json").read_text())["pretrained_config"]
    )
    dequantize = weight_format(config.quantization.quant_algo).dequantize
    plain = replace(config, quantization=QuantConfig())
    ranks = []
    for rank in range(config.tp_size):
        tensors = load_file(engine / f"rank{rank}.safetensors")
        scaled = [name for name in tensors if name.endswith(".per_channel_scale")]
        for name in scaled:
            scale, weight = tensors.pop(name), name.replace("per_channel_scale", "weight")
            tensors[weight] = dequantize({"weight": tensors[weight], "per_channel_scale": scale})
        ranks.append(tensors)
    path.mkdir()
    source = UnshardedTensors([DictSource(tensors) for tensors in ranks], plain)
    save_file({name: source.tensor(name) for name in source.names()}, path / "rank0.safetensors")
    (path / "config.json").write_text(
        json.dumps(replace(plain, mapping=ParallelMapping()).to_dict())
    )
    return build(path, path / "engine", BuildConfig(max_seq_len=MAX_SEQ_LEN))


@pytest.mark.parametrize("quant", ["w8a16", "fp8_rowwise"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_quantised_ranks(
    tmp_path: Path, quant: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.kernels.linear.int8_products_pay", lambda: False)
    engine = make_ranks(tmp_path, 2, family=family, quant=quant)
    ranks = RankThreads(engine)
    plain = open_runner(_as_plain(engine, tmp_path / "plain"))
    expected = prompt_logits(plain, PROMPTS[0])
    error = (_all_logits(ranks, PROMPTS[0]) - expected).norm() / expected.norm()
    assert error < 1e-5
    answers = Driver(ranks).generate(PROMPTS, GREEDY)
    assert answers == Driver(plain).generate(PROMPTS, GREEDY)
    if quant == "fp8_rowwise":
        # Quantised before it was split. W8A16's ranks are quantised each by itself, as TensorRT-LLM
        # does at load: scales of fewer columns, and so slightly other weights than on one rank.
        whole = open_runner(tmp_path / "engine")
        assert answers == Driver(whole).generate(PROMPTS, GREEDY)


@pytest.mark.parametrize(("quant", "kv_cache_dtype"), [("fp8", "int8"), ("int8_sq", "fp8")])
def test_calibrated_ranks(tmp_path: Path, quant: str, kv_cache_dtype: str) -> None:
    make_model(tmp_path / "hf", "llama", attention_bias=True)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n\n" * 8)
    convert(
        tmp_path / "hf",
        tmp_path / "checkpoint",
        quant=quant,
        kv_cache_dtype=kv_cache_dtype,
        calibration=CalibrationConfig(path=text, samples=2, seq_len=64),
    )
    limits = BuildConfig(max_seq_len=MAX_SEQ_LEN)
    alone = open_runner(build(tmp_path / "checkpoint", tmp_path / "engine", limits))
    ranks = RankThreads(make_ranks(tmp_path, 4))
    expected = prompt_logits(alone, PROMPTS[0])
    # Their scales are those of the whole model. A value that the rounding of a sum brings over the
    # border of two integers is another integer, so a few are allowed to be.
    error = (_all_logits(ranks, PROMPTS[0]) - expected).norm() / expected.norm()
    assert error < 0.01
    assert Driver(ranks).generate(PROMPTS, GREEDY) == Driver(alone).generate(PROMPTS, GREEDY)


# --- ranks as processes ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as an engine of one rank, ``engine``, and of two, ``engine2``."""
    path = tmp_path_factory.mktemp("ranks")
    make_ranks(path, 2, vocab_size=321)
    return path


@pytest.fixture
def open_ranks(made: Path) -> Iterator[Callable[..., TensorParallelRunner]]:
    """Load the model on so many ranks, each in a process."""
    opened: list[TensorParallelRunner] = []

    def open_(tp_size: int, *, deterministic: bool = False) -> TensorParallelRunner:
        runner = load_runner(
            made / f"engine{tp_size}",
            max_batch_size=16,
            max_num_tokens=512,
            max_seq_len=MAX_SEQ_LEN,
            tokens_per_block=8,
            device="cpu",
            threads=1,
            deterministic=deterministic,
        )
        assert isinstance(runner, TensorParallelRunner)
        opened.append(runner)
        runner._tokens_per_block = 8  # for the driver
        return runner

    yield open_
    for runner in opened:
        pids = [other.pid for other in runner._others]
        runner.shutdown()
        assert all(has_ended(pid) for pid in pids)


def _check_processes(made: Path, runner: TensorParallelRunner) -> None:
    alone = open_runner(made / "engine")
    assert runner.available_kv_bytes() == pytest.approx(alone.available_kv_bytes(), rel=0.2)
    runner.allocate_kv_cache((64,))
    runner.warm_up()
    expected = Driver(alone).generate(PROMPTS, PARAMS)
    assert Driver(runner, runs_ahead=True).generate(PROMPTS, PARAMS) == expected
    _check_speculated(runner, expected)


def test_two_processes(made: Path, open_ranks: Callable[..., TensorParallelRunner]) -> None:
    runner = open_ranks(2)
    alone = open_runner(made / "engine").info
    files = [load_file(made / f"engine2/rank{rank}.safetensors").values() for rank in range(2)]
    # All ranks' bytes, for they share the host's memory; two K and V heads are one on each rank.
    weights_bytes = sum(tensor.nbytes for tensors in files for tensor in tensors)
    workspace_bytes = runner.info.workspace_bytes
    assert runner.info == replace(
        alone, weights_bytes=weights_bytes, workspace_bytes=workspace_bytes
    )
    assert alone.workspace_bytes < workspace_bytes < 2 * alone.workspace_bytes
    _check_processes(made, runner)
    with pytest.raises(ValueError, match="allocated already"):
        runner._runner.allocate_kv_cache((64,))
    # Between two steps nobody looks: the error comes by itself.
    os.kill(runner._others[0].pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"^rank 1 of 2 was killed by SIGKILL$"):
        time.sleep(60)
    with pytest.raises(EngineError, match=r"^rank 1 of 2 was killed by SIGKILL$"):
        runner.launch(SchedulerOutput(step_id=0))


@pytest.fixture(scope="module")
def made_for_four(made: Path) -> Path:
    """The model as an engine of four ranks besides, ``engine4``."""
    make_ranks(made, 4)
    return made


@pytest.mark.full
def test_four_processes(
    made_for_four: Path, open_ranks: Callable[..., TensorParallelRunner]
) -> None:
    made = made_for_four
    runner = open_ranks(4)
    # Each rank has one of the two K and V heads.
    (group,) = runner.info.kv_groups
    (alone,) = open_runner(made / "engine").info.kv_groups
    assert group.bytes_per_block == 2 * alone.bytes_per_block
    _check_processes(made, runner)
    os.kill(runner._others[1].pid, signal.SIGKILL)
    with pytest.raises(EngineError, match=r"^rank 2 of 4 was killed by SIGKILL$"):
        time.sleep(60)


@pytest.mark.full
@pytest.mark.usefixtures("made_for_four")
def test_four_deterministic_processes(open_ranks: Callable[..., TensorParallelRunner]) -> None:
    # Of four numbers the order decides the sum; the ring that gloo adds up along begins elsewhere
    # for each part of a tensor.
    runner = open_ranks(4, deterministic=True)
    runner.allocate_kv_cache((64,))
    params = replace(GREEDY, logprobs=2)

    def answers(driver: Driver, prompts: list[list[int]]) -> list[Any]:
        ids = [driver.submit(prompt, params) for prompt in prompts]
        outputs = driver.run()
        return [[(o.token_ids, o.logprobs) for o in outputs[i]] for i in ids]

    alone = Driver(runner, enable_block_reuse=False)
    expected = [answers(alone, [prompt])[0] for prompt in PROMPTS]
    assert answers(Driver(runner, max_num_tokens=16), PROMPTS) == expected
    assert answers(Driver(runner, runs_ahead=True), PROMPTS) == expected


def test_a_rank_that_cannot_load(made: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "engine2"
    shutil.copytree(made / "engine2", damaged)
    tensors = load_file(damaged / "rank1.safetensors")
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, damaged / "rank1.safetensors")
    handler, children = signal.getsignal(signal.SIGCHLD), psutil.Process().children()
    with pytest.raises(CheckpointError, match=r"rank1\.safetensors: .*ln_f\.weight is missing"):
        load_runner(
            damaged,
            max_batch_size=16,
            max_num_tokens=512,
            max_seq_len=MAX_SEQ_LEN,
            tokens_per_block=8,
            device="cpu",
        )
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert psutil.Process().children() == children


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cpu", 8, ("cpu", "cpu")),
        ("auto", 0, ("cpu", "cpu")),
        ("auto", 3, ("cuda:0", "cuda:1")),
        ("cuda", 2, ("cuda:0", "cuda:1")),
        ("auto", 1, r"2 ranks \(mapping\.tp_size\), each on a GPU of its own, and 1 are visible"),
        ("cuda:1", 2, "device is 'cuda:1', but the engine has 2 ranks"),
        ("cuda", 0, "this machine has 0 CUDA devices"),
    ],
)
def test_where_ranks_compute(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int, expected: tuple[str, ...] | str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    if isinstance(expected, tuple):
        assert rank_devices(device, 2) == expected
    else:
        with pytest.raises(ConfigError, match=expected):
            rank_devices(device, 2)
