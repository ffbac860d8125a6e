from __future__ import annotations

import os

import pytest

from llmserve.config import EngineConfig, KvCacheConfig
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.native import EngineCore
from llmserve.errors import ConfigError, ContextLengthError, InvalidRequestError
from llmserve.runtime.fake import BYTES_PER_BLOCK, expected_tokens
from tests.engine.factories import ROOMY, make_request, make_spec


def make_core(config: EngineConfig = ROOMY, **settings: object) -> EngineCore:
    runner, limits = make_spec(**settings).load(config)
    return EngineCore(runner, limits, config)


def run_to_end(core: EngineCore) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    while core.has_unfinished_requests():
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
    core.check_integrity()
    return outputs


def test_a_batch_runs_to_its_end() -> None:
    core = make_core()
    requests = [make_request(i, prompt_length=3 + 5 * i) for i in range(10)]
    for request in requests:
        core.add_request(request)
    outputs = run_to_end(core)
    for request in requests:
        mine = outputs[request.request_id]
        tokens = [token for output in mine for token in output.token_ids]
        assert tokens == expected_tokens(request.prompt_token_ids, 20)
        assert [output.finish_reason for output in mine[:-1]] == [None] * 19
        assert mine[-1].finish_reason is FinishReason.LENGTH
    stats = core.stats()
    assert (stats.used_num_blocks, stats.generation_tokens) == (0, 200)
    assert stats.last_step_s > 0
    core.shutdown()


def test_info_says_what_was_resolved() -> None:
    config = EngineConfig(max_seq_len=100, kv_cache=KvCacheConfig(max_total_bytes=2**20))
    info = make_core(config).info
    assert (info.backend, info.device, info.pid) == ("native", "cpu", os.getpid())
    assert (info.max_batch_size, info.max_num_tokens, info.max_seq_len) == (64, 256, 100)
    assert (info.num_kv_blocks, info.tokens_per_block) == (2**20 // BYTES_PER_BLOCK, 4)
    assert info.kv_cache_bytes == 2**20
    assert info.max_concurrent_full_requests == 1024 // 25


def test_a_pool_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_total_bytes"):
        make_core(EngineConfig(kv_cache=KvCacheConfig(max_total_bytes=BYTES_PER_BLOCK * 63)))


def test_one_requests_fault_leaves_the_others_alone() -> None:
    core = make_core(errors={"request-1": "its logits are not finite"})
    requests = [make_request(i) for i in range(3)]
    for request in requests:
        core.add_request(request)
    outputs = run_to_end(core)
    (failed,) = outputs["request-1"]
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.error == "its logits are not finite"
    for i in (0, 2):
        tokens = [token for output in outputs[f"request-{i}"] for token in output.token_ids]
        assert tokens == expected_tokens(requests[i].prompt_token_ids, 20)


def test_abort_frees_everything() -> None:
    core = make_core()
    core.add_request(make_request(0, max_tokens=100))
    core.step()
    assert core.stats().used_num_blocks > 0
    output = core.abort_request("request-0")
    assert output is not None
    assert output.finish_reason is FinishReason.ABORT
    assert core.abort_request("request-0") is None
    assert not core.has_unfinished_requests()
    core.check_integrity()
    assert core.stats().used_num_blocks == 0


def test_what_can_never_be_served_is_refused() -> None:
    core = make_core()
    core.add_request(make_request(0, prompt_length=200, max_tokens=56))
    with pytest.raises(ContextLengthError, match=r"256 tokens, but 257 .*200 .*57") as raised:
        core.add_request(make_request(1, prompt_length=200, max_tokens=57))
    assert (raised.value.param, raised.value.code) == ("max_tokens", "context_length_exceeded")
    with pytest.raises(ContextLengthError) as raised:
        core.add_request(make_request(1, prompt_length=256, max_tokens=1))
    assert raised.value.param == "prompt"

    def refused(prompt: tuple[int, ...], match: str, **fields: object) -> None:
        params = SamplingParams(**{"max_tokens": 5, "seed": 0, **fields})  # type: ignore[arg-type]
        request = Request(request_id="x", prompt_token_ids=prompt, sampling_params=params)
        with pytest.raises(InvalidRequestError, match=match):
            core.add_request(request)

    refused((), "prompt is empty")
    refused((1, 256, 2), "token id 256 .* 0 to 255")
    refused((1, -1, 300), "token id -1 ")
    refused((1,), "seed", seed=None, temperature=1.0)
    assert len(run_to_end(core)) == 1
