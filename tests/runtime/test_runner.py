"""The runner around the decoder: loading, sizes, warm-up, block copies, what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import NewRequest, ScheduledRequest, SchedulerOutput
from llmserve.errors import CheckpointError, ConfigError
from llmserve.runtime.torch import load_runner
from llmserve.runtime.torch.kernels.int8_linear import int8_products_pay
from llmserve.runtime.torch.runner import TorchRunner, resolve_device
from tests.runtime.torch_engines import Driver, make_engine, open_runner, replace_embedding

GREEDY = SamplingParams(max_tokens=8, seed=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(tmp_path_factory.mktemp("runner"))


def _new(request_id: str, token_ids: list[int]) -> NewRequest:
    return NewRequest(
        request_id=request_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids),
        sampling_params=GREEDY,
    )


def _part(request_id: str, start: int, count: int, blocks: list[int]) -> ScheduledRequest:
    return ScheduledRequest(
        request_id=request_id, num_computed_tokens=start, num_tokens=count, new_block_ids=(blocks,)
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
    assert runner._inputs._requests == {}
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
        step_id=0, new_requests=[_new("a", prompt)], scheduled=[_part("a", 0, 10, [3, 5])]
    )
    expected = _run(runner, first)["a"]
    # 'b' has the same prompt: block 3 is shared, and block 5 copied before its last token.
    second = SchedulerOutput(
        step_id=1,
        new_requests=[_new("b", prompt)],
        block_copies=[(5, 9)],
        scheduled=[_part("b", 9, 1, [3, 9])],
    )
    assert _run(runner, second)["b"] == expected
    for cache in runner._kv_cache:
        copied, computed = cache[9 * 8 : 9 * 8 + 2].cpu(), cache[5 * 8 : 5 * 8 + 2].cpu()
        assert torch.equal(copied[0], computed[0])
        assert torch.allclose(copied[1], computed[1], atol=1e-5)


def test_a_step_may_go_back(engine: Path) -> None:
    runner = open_runner(engine)
    prompt = list(range(60, 72))
    whole = SchedulerOutput(
        step_id=0, new_requests=[_new("a", prompt)], scheduled=[_part("a", 0, 12, [0, 1])]
    )
    token = _run(runner, whole)["a"][0]
    again = _run(runner, SchedulerOutput(step_id=1, scheduled=[_part("a", 8, 5, [])]))
    alone = Driver(open_runner(engine)).generate([[*prompt, token]], GREEDY)[0][0]
    assert again == {"a": [alone]}


def test_a_prefill_chunk_that_is_not_the_last_brings_nothing(engine: Path) -> None:
    runner = open_runner(engine)
    step = SchedulerOutput(
        step_id=0, new_requests=[_new("a", list(range(20)))], scheduled=[_part("a", 0, 8, [0])]
    )
    result = runner.finish(runner.launch(step))
    assert (result.token_ids, result.logprobs, result.errors) == ({}, {}, {})


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
            scheduled=[_part(name, 0, 3, [i]) for i, name in enumerate(prompts)],
        )
        handle = runner.launch(step)
        runner.finish(handle)
        runner.launch(SchedulerOutput(step_id=1, finished_request_ids=["a", "b"]))
        assert handle.logits is not None
        return handle.logits

    first, second = logits(quiet), logits(loud)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


def test_masks_and_drafts_are_refused(engine: Path) -> None:
    runner = open_runner(engine)
    step = SchedulerOutput(step_id=0, new_requests=[_new("a", [1])], scheduled=[])
    handle = runner.launch(step)
    with pytest.raises(ValueError, match="masks"):
        runner.finish(handle, masks=object())
    part = _part("a", 0, 1, [0])
    part.draft_token_ids = [7]
    with pytest.raises(ValueError, match="draft"):
        runner.launch(SchedulerOutput(step_id=1, scheduled=[part]))
    with pytest.raises(ValueError, match="allocated already"):
        runner.allocate_kv_cache((1,))


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", "cuda:99"])
def test_devices_that_are_not_there(engine: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=device):
        resolve_device(device)


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
