"""Guesses in a whole engine: they change how many steps there are, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from llmserve.artifacts import ensure_engine
from llmserve.config import EngineConfig, KvCacheConfig, NGramDecodingConfig
from llmserve.core import speculation
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.stats import EngineStats
from llmserve.engine.native import EngineCore
from llmserve.engine.runner_spec import TorchRunnerSpec
from llmserve.runtime.fake import BYTES_PER_BLOCK, expected_tokens
from llmserve.tokenizer import Tokenizer
from tests.engine.factories import ROOMY, make_prompt, make_spec
from tests.runtime.torch_engines import make_engine

DEMO = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"


@pytest.fixture(autouse=True)
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever steps take on this machine: rows are free."""
    monkeypatch.setattr(speculation.StepCost, "row_s", 0.0)
    monkeypatch.setattr(speculation, "_MIN_SPEEDUP", 1.0)


def answer(core: EngineCore, requests: Sequence[Request]) -> tuple[dict[str, Output], EngineStats]:
    """Serve requests to their end: all that came of each as one output, and the stats then."""
    answers: dict[str, Output] = {}
    for request in requests:
        core.add_request(request)
    while core.has_unfinished_requests():
        for output in core.step():
            whole = answers.setdefault(output.request_id, Output(output.request_id, [], []))
            whole.token_ids = [*whole.token_ids, *output.token_ids]
            assert whole.logprobs is not None
            whole.logprobs = [*whole.logprobs, *(output.logprobs or ())]
            assert whole.finish_reason is None, "an output after the last one"
            whole.finish_reason, whole.stop_reason = output.finish_reason, output.stop_reason
    core.check_integrity()
    stats = core.stats()
    core.shutdown()
    assert stats.used_num_blocks == 0
    return answers, stats


def answer_both(
    engine: Path, requests: Sequence[Request], config: EngineConfig
) -> tuple[dict[str, Output], EngineStats, dict[str, Output], EngineStats]:
    """The same requests without guesses and with them."""
    results = []
    for speculative in (None, NGramDecodingConfig()):
        own_config = replace(config, speculative=speculative)
        runner, limits = TorchRunnerSpec(engine_dir=str(engine)).load(own_config)
        results.append(answer(EngineCore(runner, limits, own_config), requests))
    (plain, plain_stats), (guessed, guessed_stats) = results
    assert plain_stats.num_draft_tokens == 0
    return plain, plain_stats, guessed, guessed_stats


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
@pytest.mark.parametrize("num_blocks", [64, 1024])
def test_the_fake_runner_gives_its_own_tokens(policy, num_blocks):
    # Two different tokens: half of all guesses are right, and half are taken back.
    config = EngineConfig(
        capacity_scheduler_policy=policy,
        kv_cache=KvCacheConfig(max_total_bytes=num_blocks * BYTES_PER_BLOCK),
        speculative=NGramDecodingConfig(max_draft_len=5),
    )
    spec = make_spec(vocab_size=2)
    runner, limits = spec.load(config)
    core = EngineCore(runner, limits, config)
    requests = [
        Request(
            request_id=str(i),
            prompt_token_ids=tuple(token % 2 for token in make_prompt(i, 5 + 3 * i)),
            sampling_params=SamplingParams(max_tokens=60 + i, seed=0),
        )
        for i in range(12)
    ]
    answers, stats = answer(core, requests)
    for request in requests:
        count = request.sampling_params.max_tokens
        assert count is not None
        assert list(answers[request.request_id].token_ids) == expected_tokens(
            request.prompt_token_ids, count, vocab_size=2
        )
        assert answers[request.request_id].finish_reason is FinishReason.LENGTH
    assert 0 < stats.num_accepted_draft_tokens < stats.num_draft_tokens
    assert stats.generation_tokens == sum(60 + i for i in range(12))
    if (policy, num_blocks) == ("max_utilization", 64):
        assert stats.num_preemptions > 0


@pytest.mark.parametrize(("vocab_size", "ahead"), [(2**30, True), (1, False)])
def test_steps_are_scheduled_ahead_unless_there_is_a_guess(vocab_size, ahead):
    config = replace(ROOMY, speculative=NGramDecodingConfig())
    runner, limits = make_spec(vocab_size=vocab_size).load(config)
    core = EngineCore(runner, limits, config)
    prompt = tuple(range(min(20, vocab_size)))
    params = SamplingParams(max_tokens=200, seed=0)
    core.add_request(Request(request_id="a", prompt_token_ids=prompt, sampling_params=params))
    for _ in range(4):  # the prompt, and the first tokens, after which all repeat themselves
        core.step()
    for _ in range(10):
        core.launch()
        assert (len(core._under_way) == 2) is ahead
        core.collect()
    core.shutdown()


@pytest.fixture(scope="module")
def tiny_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine(tmp_path_factory.mktemp("tiny"))


# Penalties that reward what was said: such answers repeat themselves, and are guessed.
SAMPLING = {
    "greedy": SamplingParams(logprobs=2),
    "sampled": SamplingParams(temperature=0.7, top_p=0.9, top_k=20, logprobs=2),
    "penalties": SamplingParams(
        repetition_penalty=0.9, presence_penalty=-0.5, frequency_penalty=0.05, logprobs=2
    ),
    "sampled with penalties": SamplingParams(
        temperature=0.6, repetition_penalty=0.9, frequency_penalty=-0.1, min_p=0.02, logprobs=2
    ),
    "min_tokens and a bias": SamplingParams(
        temperature=0.6, min_tokens=20, logit_bias=((5, 3.0), (6, 2.0)), stop_token_ids=(7, 9, 11)
    ),
}


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("crowded", [False, True], ids=["roomy", "crowded"])
def test_a_real_model_gives_the_same_tokens(tiny_engine, name, crowded):
    rng = random.Random(0)
    requests = []
    for i in range(6):
        # Few different tokens, so that there is much to look up.
        prompt = tuple(rng.randrange(3, 9) for _ in range(10 + 7 * i))
        params = replace(SAMPLING[name], max_tokens=40, seed=i)
        requests.append(Request(request_id=str(i), prompt_token_ids=prompt, sampling_params=params))
    config = EngineConfig(
        max_batch_size=4,
        max_seq_len=128,
        max_num_tokens=24 if crowded else 256,
        capacity_scheduler_policy="max_utilization",
        kv_cache=KvCacheConfig(tokens_per_block=8, max_tokens=128 if crowded else 1024),
    )
    plain, _, guessed, stats = answer_both(tiny_engine, requests, config)
    assert stats.num_accepted_draft_tokens > 0
    assert stats.num_accepted_draft_tokens < stats.num_draft_tokens
    if crowded:
        assert stats.num_preemptions > 0
    for request_id, expected in plain.items():
        got = guessed[request_id]
        assert list(got.token_ids) == list(expected.token_ids)
        assert (got.finish_reason, got.stop_reason) == (
            expected.finish_reason,
            expected.stop_reason,
        )
        assert got.logprobs is not None
        assert expected.logprobs is not None
        for ours, theirs in zip(got.logprobs, expected.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert ours.rank == theirs.rank


def test_order_notices_take_far_fewer_steps(tmp_path):
    tokenizer = Tokenizer.from_directory(DEMO)
    notices = {
        "Translate to German: Order KX-4821 for Anna Keller ships on 14 March 2026.": "Die "
        "Bestellung KX-4821 für Anna Keller wird am 14. März 2026 versandt.",
        "Translate to Spanish: Invoice Z-23004 for Noémie Vidal is due on 1 September 2013.": "La "
        "factura Z-23004 para Noémie Vidal vence el 1 de septiembre de 2013.",
        "Translate to English: La commande PV-555-K pour Karin Navarro sera livrée le 17 octobre "
        "1995 à 17 h 38.": "Order PV-555-K for Karin Navarro will be delivered on 17 October 1995 "
        "at 5:38 PM.",
    }

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    requests = [
        Request(
            request_id=expected,
            prompt_token_ids=encode(f"<|begin|><|user|>{prompt}<|end|><|assistant|>"),
            sampling_params=SamplingParams(max_tokens=80, seed=0),
            eos_token_ids=encode("<|end|>"),
        )
        for prompt, expected in notices.items()
    ]
    engine = ensure_engine(DEMO, dtype="float32", cache_dir=tmp_path)
    config = EngineConfig(max_batch_size=1, kv_cache=KvCacheConfig(max_total_bytes=16 * 2**20))
    plain, plain_stats, guessed, stats = answer_both(engine, requests, config)
    for expected in notices.values():
        assert tokenizer.decode(list(guessed[expected].token_ids[:-1])) == expected
        assert list(guessed[expected].token_ids) == list(plain[expected].token_ids)
    assert plain_stats.num_steps > 1.4 * stats.num_steps
