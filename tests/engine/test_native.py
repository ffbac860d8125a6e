from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from llmserve.config import EngineConfig, KvCacheConfig, NGramDecodingConfig
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.sampling_params import GuidedDecodingParams, SamplingParams
from llmserve.engine.native import EngineCore
from llmserve.errors import ConfigError, ContextLengthError, InvalidRequestError
from llmserve.runtime.fake import BYTES_PER_BLOCK, FakeRunner, expected_tokens
from tests.engine.factories import ROOMY, make_prompt, make_request, make_spec
from tests.models import EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer


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


def test_a_step_is_scheduled_while_the_one_before_computes() -> None:
    core = make_core(step_s=0.05)
    core.add_request(make_request(0))
    core.launch()
    assert not core.step_is_done()
    time.sleep(0.15)
    # Two have been computed, and nobody had to come and launch the second one.
    assert all(pending.is_done for pending in core._under_way)
    assert len(core._under_way) == 2
    assert len(core.collect()) == 1
    assert len(core.collect()) == 1
    core.shutdown()


def test_the_model_does_not_wait_for_what_the_caller_does_between_steps() -> None:
    core = make_core(step_s=0.03)
    core.add_request(make_request(0, max_tokens=11))
    begun_s = time.monotonic()
    while core.has_unfinished_requests():
        core.step()
        time.sleep(0.028)
    # One after the other, steps and pauses would take 0.64 s.
    assert 0.33 < time.monotonic() - begun_s < 0.55


def test_the_runner_is_told_who_has_ended_before_a_rest() -> None:
    runner, limits = make_spec().load(ROOMY)
    assert isinstance(runner, FakeRunner)
    core = EngineCore(runner, limits, ROOMY)
    core.add_request(make_request(0))
    run_to_end(core)
    while core.step_is_under_way():
        core.step()
    assert runner.known_request_ids == set()


def test_a_timeout_ends_a_request_wherever_it_is() -> None:
    core = make_core(EngineConfig(max_batch_size=1))
    core.add_request(replace(make_request(0, max_tokens=200), timeout_s=0.05))  # running
    core.add_request(replace(make_request(1), timeout_s=0.05))  # waiting
    core.add_request(replace(make_request(2), timeout_s=60.0))
    core.step()
    time.sleep(0.06)
    outputs = run_to_end(core)
    for i in (0, 1):
        last = outputs[f"request-{i}"][-1]
        assert last.finish_reason is FinishReason.TIMEOUT
        assert last.error is not None
        assert "0.05 s" in last.error
    assert outputs["request-2"][-1].finish_reason is FinishReason.LENGTH
    assert core.stats().finished == {"timeout": 2, "length": 1}


def test_what_the_runner_raises_comes_out() -> None:
    core = make_core(fail_at_step=2)
    core.add_request(make_request(0))
    core.step()
    core.step()
    with pytest.raises(RuntimeError, match="fails at step 2"):
        core.step()
    core.shutdown()


def test_shutdown_in_the_middle_of_everything() -> None:
    core = make_core(step_s=0.02)
    core.add_request(make_request(0))
    core.launch()
    core.shutdown()
    assert not core._thread._thread.is_alive()


def test_guided_decoding_needs_a_tokenizer() -> None:
    params = SamplingParams(seed=0, guided_decoding=GuidedDecodingParams(choice=("a", "b")))
    request = replace(make_request(0), sampling_params=params)
    with pytest.raises(InvalidRequestError, match="needs a tokenizer") as raised:
        make_core().add_request(request)
    assert raised.value.param == "guided_decoding"


def test_guided_answers_match_beside_free_ones(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    spec = make_spec(vocab_size=VOCAB_SIZE, tokenizer_file=str(tmp_path / "tokenizer.json"))
    runner, limits = spec.load(ROOMY)
    core = EngineCore(runner, limits, ROOMY, structured_output=spec.structured_output())
    choices = ("the quick brown fox", "jumps over", "the lazy dog")
    params = SamplingParams(
        max_tokens=50, seed=0, guided_decoding=GuidedDecodingParams(choice=choices)
    )
    for i in range(5):
        request = replace(make_request(i), eos_token_ids=(EOS_TOKEN_ID,))
        core.add_request(replace(request, sampling_params=params) if i % 2 else request)
    outputs = run_to_end(core)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for i in range(5):
        mine = outputs[f"request-{i}"]
        tokens = [token for output in mine for token in output.token_ids]
        if i % 2:
            assert mine[-1].finish_reason is FinishReason.STOP
            assert tokenizer.decode(tokens) in choices
        else:
            expected = expected_tokens(make_prompt(i), 20, vocab_size=VOCAB_SIZE)
            assert tokens == expected
    core.shutdown()


def test_guesses_change_no_token() -> None:
    config = replace(ROOMY, speculative=NGramDecodingConfig())
    # So few tokens that what followed one of them often follows again.
    core = make_core(config, vocab_size=2, step_s=0.001)
    requests = [make_request(i, max_tokens=60) for i in range(3)]
    requests = [
        replace(request, prompt_token_ids=tuple(t % 2 for t in request.prompt_token_ids))
        for request in requests
    ]
    for request in requests:
        core.add_request(request)
    outputs = run_to_end(core)
    for request in requests:
        tokens = [token for o in outputs[request.request_id] for token in o.token_ids]
        assert tokens == expected_tokens(request.prompt_token_ids, 60, vocab_size=2)
    assert core.stats().num_draft_tokens > 0
    core.shutdown()


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
