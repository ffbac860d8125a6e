"""The runner around the decoder: loading, sizes, warm-up, block copies, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import ModelRunnerOutput, NewRequest, SchedulerOutput
from llmserve.errors import CheckpointError, ConfigError
from llmserve.runtime.torch import load_runner
from llmserve.runtime.torch.input_batch import Samples
from llmserve.runtime.torch.kernels.int8_linear import int8_products_pay
from llmserve.runtime.torch.runner import TorchRunner, _tell_samples, resolve_device
from llmserve.runtime.torch.sampler import NOT_FINITE, Sampled
from llmserve.runtime.torch.sampling_table import SamplingTable
from tests.runtime.torch_engines import Driver, make_engine, open_runner, prefill, replace_embedding

GREEDY = SamplingParams(max_tokens=8, seed=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(tmp_path_factory.mktemp("runner"))


def _new(request_id: str, token_ids: list[int], params: SamplingParams = GREEDY) -> NewRequest:
    return NewRequest(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling_params=params,
    )


def _run(runner: TorchRunner, step: SchedulerOutput) -> dict[str, list[int]]:
    return runner.finish(runner.launch(step)).token_ids


@pytest.mark.parametrize("tied", [False, True])
def test_info(tmp_path: Path, tied: bool) -> None:
    path = make_engine(tmp_path, dtype=torch.bfloat16, tie_word_embeddings=tied)
    info = open_runner(path, tokens_per_block=16).info
    on_disk = load_file(path / "rank0.safetensors").values()
    assert info.weights_bytes == sum(tensor.nbytes for tensor in on_disk)
    assert (info.device, info.dtype, info.quant_algo) == ("cpu", "bfloat16", None)
    (group,) = info.kv_groups
    assert group.layers == (0, 1)
    # K and V, 2 layers, 16 tokens, 2 heads of 16, 2 bytes.
    assert group.bytes_per_block == 2 * 2 * 16 * 2 * 16 * 2
    runner = open_runner(path, tokens_per_block=16, num_blocks=10)
    assert sum(cache.nbytes for cache in runner._kv_cache) == 10 * group.bytes_per_block


@pytest.mark.parametrize("quant", ["w8a16", "fp8_rowwise"])
def test_quantised_weights_stay_small(tmp_path: Path, quant: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 8}
    path = make_engine(tmp_path, quant=quant, dtype=torch.bfloat16, **sizes)
    runner = open_runner(path)
    on_disk = sum(tensor.nbytes for tensor in load_file(path / "rank0.safetensors").values())
    if quant == "fp8_rowwise" or not int8_products_pay():
        assert runner.info.weights_bytes == on_disk
    else:
        # oneDNN's packed form has int32 sums of the columns, and pads them to its tiles.
        assert on_disk < runner.info.weights_bytes < on_disk * 1.1


def test_warm_up_leaves_no_trace(engine: Path) -> None:
    runner = open_runner(engine)
    for cache in runner._kv_cache:
        cache.zero_()
    runner.warm_up()
    assert not any(bool(cache.any()) for cache in runner._kv_cache)
    assert runner._inputs._slots == {}
    assert len(runner._inputs._free_slots) == 16
    fresh, prompt = Driver(open_runner(engine)), [[5, 6, 7]]
    assert Driver(runner).generate(prompt, GREEDY) == fresh.generate(prompt, GREEDY)


@pytest.mark.parametrize("tokens_per_block", [1, 2])
def test_warm_up_with_tiny_blocks(engine: Path, tokens_per_block: int) -> None:
    open_runner(engine, tokens_per_block=tokens_per_block).warm_up()


def test_block_copies_come_before_the_step(engine: Path, device: str) -> None:
    runner = open_runner(engine, device=device)
    prompt = list(range(40, 50))
    first = SchedulerOutput(
        step_id=0,
        new_requests=[_new("a", prompt)],
        new_block_ids={"a": ([3, 5],)},
        prefills=[prefill("a", 0, 10)],
    )
    expected = _run(runner, first)["a"]
    # 'b' has the same prompt: block 3 is shared, and block 5 copied before its last token.
    second = SchedulerOutput(
        step_id=1,
        new_requests=[_new("b", prompt)],
        new_block_ids={"b": ([3, 9],)},
        block_copies=([(5, 9)],),
        prefills=[prefill("b", 9, 1)],
    )
    assert _run(runner, second)["b"] == expected
    for cache in runner._kv_cache:
        copied, computed = cache[9 * 8 : 9 * 8 + 2].cpu(), cache[5 * 8 : 5 * 8 + 2].cpu()
        assert torch.equal(copied[0], computed[0])
        assert torch.allclose(copied[1], computed[1], atol=1e-5)


def test_block_copies_read_all_sources_first_and_stay_in_their_group(tmp_path: Path) -> None:
    # Qwen2's first layer sees everything, its other two a window.
    runner = open_runner(make_engine(tmp_path, family="qwen2"), num_blocks=4)
    assert [kv_group.layers for kv_group in runner.info.kv_groups] == [(0,), (1, 2)]
    for cache in runner._kv_cache:
        cache.copy_(torch.arange(4).repeat_interleave(8)[:, None].expand_as(cache))
    # Block 1 is handed on in the same step: it is a source and a destination.
    copies = [(0, 1), (1, 2)], [(3, 0)]
    runner.finish(runner.launch(SchedulerOutput(step_id=0, block_copies=copies)))
    contents = [cache[::8, 0].tolist() for cache in runner._kv_cache]
    assert contents == [[0, 0, 1, 3], [3, 1, 2, 3], [3, 1, 2, 3]]


def test_each_kv_group_has_its_own_blocks(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, family="qwen2")
    prompt = list(range(40, 50))
    answers = []
    for tables in (([0, 1], [0, 1]), ([3, 1], [2, 7])):
        runner = open_runner(engine, num_blocks=8)
        step = SchedulerOutput(
            step_id=0,
            new_requests=[_new("a", prompt)],
            new_block_ids={"a": tables},
            prefills=[prefill("a", 0, 10)],
        )
        tokens = _run(runner, step)["a"]
        for step_id in range(1, 6):
            tokens += _run(runner, SchedulerOutput(step_id=step_id, decodes=["a"]))["a"]
        answers.append(tokens)
        for kv_group, blocks in zip(runner.info.kv_groups, tables, strict=True):
            for layer in kv_group.layers:
                written = ~runner._kv_cache[layer].view(8, -1).isnan().all(-1)
                assert written.nonzero()[:, 0].tolist() == sorted(blocks)
    assert answers[0] == answers[1]


def test_a_pool_of_another_size_per_group(tmp_path: Path) -> None:
    engine = make_engine(tmp_path, family="qwen2")
    limits = {"max_batch_size": 1, "max_num_tokens": 8, "max_seq_len": 64, "tokens_per_block": 4}
    runner = load_runner(engine, **limits, device="cpu")
    assert isinstance(runner, TorchRunner)
    with pytest.raises(ValueError, match="zip"):
        runner.allocate_kv_cache((5,))
    runner.allocate_kv_cache((5, 3))
    sizes = [cache.shape[0] for cache in runner._kv_cache]
    assert sizes == [20, 12, 12]
    nbytes = [sum(runner._kv_cache[i].nbytes for i in g.layers) for g in runner.info.kv_groups]
    counts = zip((5, 3), runner.info.kv_groups, strict=True)
    assert nbytes == [count * g.bytes_per_block for count, g in counts]
    # A window that no request outgrows needs no group of its own.
    short = load_runner(engine, **{**limits, "max_seq_len": 8}, device="cpu")
    assert [g.layers for g in short.info.kv_groups] == [(0, 1, 2)]


def test_a_step_may_go_back(engine: Path) -> None:
    runner = open_runner(engine)
    prompt = list(range(60, 72))
    whole = SchedulerOutput(
        step_id=0,
        new_requests=[_new("a", prompt)],
        new_block_ids={"a": ([0, 1],)},
        prefills=[prefill("a", 0, 12)],
    )
    token = _run(runner, whole)["a"][0]
    again = _run(runner, SchedulerOutput(step_id=1, prefills=[prefill("a", 8, 5)]))
    alone = Driver(open_runner(engine)).generate([[*prompt, token]], GREEDY)[0][0]
    assert again == {"a": [alone]}


def test_a_prefill_chunk_that_is_not_the_last_brings_nothing(engine: Path) -> None:
    runner = open_runner(engine)
    step = SchedulerOutput(
        step_id=0,
        new_requests=[_new("a", list(range(20)))],
        new_block_ids={"a": ([0],)},
        prefills=[prefill("a", 0, 8)],
    )
    assert runner.finish(runner.launch(step)) == ModelRunnerOutput()


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=1.0, seed=5), SamplingParams(seed=0, logprobs=1)]
)
@pytest.mark.parametrize("right", [0, 1, 3])
def test_drafts_bring_the_tokens_that_would_come_one_by_one(
    engine: Path, device: str, params: SamplingParams, right: int
) -> None:
    prompt = list(range(60, 70))
    first = SchedulerOutput(
        step_id=0,
        new_requests=[_new("a", prompt, params)],
        new_block_ids={"a": ([0, 1, 2],)},
        prefills=[prefill("a", 0, 10)],
    )
    plain = open_runner(engine, device=device)
    expected = _run(plain, first)["a"]
    logprobs = []
    for step_id in range(1, 8):
        handle = plain.launch(SchedulerOutput(step_id=step_id, decodes=["a"]))
        result = plain.finish(handle)
        expected += result.token_ids["a"]
        logprobs += result.logprobs.get("a", [])
    runner = open_runner(engine, device=device)
    tokens = _run(runner, first)["a"]
    drafts = expected[1 : 1 + right]
    if right < 3:
        drafts += [(expected[1 + right] + 1) % 320, 5]
    verified = runner.finish(
        runner.launch(SchedulerOutput(step_id=1, decodes=["a"], draft_token_ids={"a": drafts}))
    )
    assert verified.token_ids["a"] == expected[1 : right + 2]
    found = verified.logprobs.get("a", [])
    assert len(found) == (right + 1 if params.logprobs else 0)
    for ours, theirs in zip(found, logprobs, strict=False):
        assert ours.top_token_ids == theirs.top_token_ids
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
    # Rejected guesses are written over and leave no trace.
    tokens += verified.token_ids["a"]
    while len(tokens) < len(expected):
        tokens += _run(runner, SchedulerOutput(step_id=len(tokens), decodes=["a"]))["a"]
    assert tokens == expected


@pytest.mark.parametrize(("accepted", "fails"), [(1, False), (2, False), (3, True)])
def test_a_fault_behind_the_accepted_tokens_is_none(accepted: int, fails: bool) -> None:
    table = SamplingTable(2, 100)
    samples = Samples(
        request_ids=["a", "b"],
        bounds=np.array([0, 3, 4]),
        rows=table.rows(np.array([0, 0, 0, 1]), np.array([5, 6, 7, 4])),
        flat_rows=torch.arange(4),
        guesses=None,
    )
    sampled = Sampled(
        token_ids=torch.tensor([11, 12, 13, 14]),
        faults=torch.tensor([0, 0, NOT_FINITE, 0]),
        logprobs={},
    )
    output = ModelRunnerOutput()
    _tell_samples(samples, sampled, np.array([accepted, 1]), output)
    assert ("a" in output.errors) == fails
    expected = {"b": [14]} if fails else {"a": [11, 12, 13][:accepted], "b": [14]}
    assert output.token_ids == expected


def test_masks(engine: Path, device: str) -> None:
    runner = open_runner(engine, device=device)
    names = ["a", "b", "c"]
    step = SchedulerOutput(
        step_id=0,
        new_requests=[_new(name, [9, 8, i]) for i, name in enumerate(names)],
        new_block_ids={name: ([i],) for i, name in enumerate(names)},
        prefills=[prefill(name, 0, 3) for name in names],
    )
    only_42, nothing = np.zeros(10, dtype=np.int32), np.zeros(10, dtype=np.int32)
    only_42[1] = 1 << 10
    free = runner.finish(runner.launch(step))
    again = SchedulerOutput(step_id=1, prefills=step.prefills, finished_request_ids=names)
    again.new_requests, again.new_block_ids = step.new_requests, step.new_block_ids
    bound = runner.finish(runner.launch(again), {"b": only_42, "c": nothing})
    assert free.token_ids["b"] != [42]
    assert bound.token_ids == {"a": free.token_ids["a"], "b": [42]}
    assert bound.errors == {"c": "there is no token that may stand at position 3: all are banned"}
    # The token that the mask left is the next step's input.
    followed = _run(runner, SchedulerOutput(step_id=2, decodes=["b"]))["b"]
    assert followed == Driver(open_runner(engine)).generate([[9, 8, 1, 42]], GREEDY)[0][:1]


def test_masks_are_of_requests_that_sample_one_token(engine: Path) -> None:
    runner, mask = open_runner(engine), np.full(10, -1, dtype=np.int32)
    step = SchedulerOutput(
        step_id=0,
        new_requests=[_new("a", [1, 2])],
        new_block_ids={"a": ([0],)},
        prefills=[prefill("a", 0, 2)],
    )
    with pytest.raises(ValueError, match="a mask for b, which does not sample"):
        runner.finish(runner.launch(step), {"b": mask})
    step = SchedulerOutput(step_id=1, decodes=["a"], draft_token_ids={"a": [7]})
    with pytest.raises(ValueError, match="a has drafts"):
        runner.finish(runner.launch(step), {"a": mask})


def test_the_kv_cache_is_allocated_once(engine: Path) -> None:
    with pytest.raises(ValueError, match="allocated already"):
        open_runner(engine).allocate_kv_cache((1,))


def test_the_last_position_may_sample(engine: Path) -> None:
    prompt = [int(i) for i in torch.arange(250) % 300]
    driver = Driver(open_runner(engine))
    answer = driver.generate([prompt], SamplingParams(max_tokens=6, seed=0))[0]
    assert len(answer) == 6


def test_slots_are_used_again(engine: Path) -> None:
    driver = Driver(open_runner(engine, max_batch_size=2), max_batch_size=2)
    prompts = [[i, i + 1] for i in range(7)]
    together = driver.generate(prompts, GREEDY)
    assert together == [driver.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert sorted(driver.runner._inputs._free_slots) == [0, 1]


def test_a_loud_neighbour_changes_no_bit_of_w8a16_logits(tmp_path: Path) -> None:
    runner = open_runner(make_engine(tmp_path, quant="w8a16"))
    embedding = runner._decoder.embedding.weight.clone()
    quiet, loud = 10, 11
    # Norms undo a large row as a whole; one large channel of it they leave large.
    embedding[loud] = embedding[quiet]
    embedding[loud, 3] *= 50
    replace_embedding(runner, embedding)

    def logits(neighbour: int) -> torch.Tensor:
        prompts = {"a": [1, 2, 3], "b": [4, neighbour, neighbour]}
        step = SchedulerOutput(
            step_id=0,
            new_requests=[_new(name, prompt) for name, prompt in prompts.items()],
            new_block_ids={name: ([i],) for i, name in enumerate(prompts)},
            prefills=[prefill(name, 0, 3) for name in prompts],
        )
        handle = runner.launch(step)
        runner.finish(handle)
        runner.launch(SchedulerOutput(step_id=1, finished_request_ids=["a", "b"]))
        assert handle.logits is not None
        return handle.logits

    first, second = logits(quiet), logits(loud)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", "cuda:99"])
def test_devices_that_are_not_there(engine: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        resolve_device(device)


def test_deterministic_is_for_cpus(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="deterministic is possible on a CPU alone"):
        open_runner(engine, device="cuda", deterministic=True)


def _damage(engine: Path, tmp_path: Path, name: str, value: torch.Tensor | None) -> Path:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((engine / "config.json").read_bytes())
    tensors = load_file(engine / "rank0.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if value is None else {name: value}), damaged / "rank0.safetensors")
    return damaged


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transformer.ln_f.weight", None),
        ("transformer.layers.2.mlp.fc.weight", torch.zeros(1)),
        ("lm_head.weight", torch.zeros(320, 63)),
        ("transformer.layers.0.mlp.proj.weight", torch.zeros(64, 96, dtype=torch.bfloat16)),
    ],
)
def test_a_damaged_engine_is_an_error_that_names_the_tensor(
    engine: Path, tmp_path: Path, name: str, value: torch.Tensor | None
) -> None:
    with pytest.raises(CheckpointError, match=name):
        open_runner(_damage(engine, tmp_path, name, value))


def test_importing_the_package_is_light() -> None:
    code = "import sys, llmserve.runtime.torch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads(engine: Path) -> None:
    before = torch.get_num_threads()
    try:
        limits = {"max_batch_size": 1, "max_num_tokens": 8, "max_seq_len": 8, "tokens_per_block": 4}
        load_runner(engine, **limits, threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_available_kv_bytes(engine: Path, device: str) -> None:
    assert open_runner(engine, device=device).available_kv_bytes() > 0


def test_shutdown_frees_the_cache(engine: Path) -> None:
    runner = open_runner(engine)
    runner.shutdown()
    assert runner._kv_cache == []
