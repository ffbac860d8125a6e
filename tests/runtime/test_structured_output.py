"""Structured output of the native engine: a random model, which would else speak nonsense."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve.build.native import build
from llmserve.config import BuildConfig, EngineConfig, KvCacheConfig
from llmserve.convert.converter import convert
from llmserve.core.request import FinishReason, Output, Request
from llmserve.core.sampling_params import GuidedDecodingParams, SamplingParams
from llmserve.engine.native import EngineCore
from llmserve.engine.runner_spec import TorchRunnerSpec
from llmserve.tokenizer.detokenizer import IncrementalDetokenizer
from llmserve.tokenizer.tokenizer import Tokenizer
from tests.engine.random_answers import SCHEMAS, is_valid
from tests.models import END_TOKEN_ID, EOS_TOKEN_ID, VOCAB_SIZE, make_model

MAX_ANSWER_TOKENS = 1024
PROMPT = (7, 8, 9)
# Fewer rows than requests and fewer tokens than they could need: some wait and some are paused.
CONFIG = EngineConfig(
    max_batch_size=16,
    kv_cache=KvCacheConfig(max_tokens=1104, tokens_per_block=16),
    capacity_scheduler_policy="max_utilization",
    deterministic=True,
    threads=1,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("structured-output")
    # Ids beyond the tokenizer's are padding that a random model likes as well as any.
    sizes = {"vocab_size": VOCAB_SIZE + 40, "max_position_embeddings": 2048}
    make_model(path / "hf", "llama", **sizes)
    convert(path / "hf", path / "checkpoint", quant="none")
    return build(path / "checkpoint", path / "engine", BuildConfig(max_seq_len=1100))


@pytest.fixture
def core(engine: Path) -> Iterator[EngineCore]:
    spec = TorchRunnerSpec(engine_dir=str(engine))
    runner, limits = spec.load(CONFIG)
    core = EngineCore(runner, limits, CONFIG, structured_output=spec.structured_output())
    yield core
    core.shutdown()


def _request(name: str, seed: int, eos: tuple[int, ...], **sampling: object) -> Request:
    sampling = {"max_tokens": MAX_ANSWER_TOKENS, "temperature": 1.0, "seed": seed, **sampling}
    params = SamplingParams(**sampling)
    return Request(
        request_id=name, prompt_token_ids=PROMPT, sampling_params=params, eos_token_ids=eos
    )


def _run(core: EngineCore, requests: list[Request]) -> dict[str, tuple[list[int], Output]]:
    """Each request's tokens and its last output."""
    for request in requests:
        core.add_request(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    last: dict[str, Output] = {}
    while core.has_unfinished_requests():
        for output in core.step():
            assert output.request_id not in last
            tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                last[output.request_id] = output
    core.check_integrity()
    return {name: (tokens[name], last[name]) for name in tokens}


def _play(engine: Path, core: EngineCore, num_requests: int) -> None:
    tokenizer = Tokenizer.from_directory(engine)
    ends = ((EOS_TOKEN_ID,), (EOS_TOKEN_ID, END_TOKEN_ID), ())
    schemas = list(itertools.islice(itertools.cycle(SCHEMAS.values()), num_requests))
    requests = [
        _request(f"r{i}", i, ends[i % 3], guided_decoding=GuidedDecodingParams(json=schema))
        for i, schema in enumerate(schemas)
    ]
    results = _run(core, requests)
    num_stopped, wrong = 0, []
    for schema, (tokens, last) in zip(schemas, results.values(), strict=True):
        assert last.finish_reason in (FinishReason.STOP, FinishReason.LENGTH), last.error
        if last.finish_reason is FinishReason.STOP:
            num_stopped += 1
            detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids=PROMPT)
            text = "".join(map(detokenizer.feed, tokens)) + detokenizer.flush()
            if not is_valid(text, schema):
                wrong.append(text)
    assert wrong == []
    assert num_stopped >= 0.95 * num_requests
    assert core.stats().num_preemptions > 0


def test_answers_that_stop_are_valid(engine: Path, core: EngineCore) -> None:
    _play(engine, core, 64)


@pytest.mark.full
def test_many_answers_that_stop_are_valid(engine: Path, core: EngineCore) -> None:
    _play(engine, core, 500)


def test_others_in_the_batch_do_not_feel_it(core: EngineCore) -> None:
    free = [_request(f"free {i}", i, (EOS_TOKEN_ID,), max_tokens=100) for i in range(4)]
    alone = {name: tokens for name, (tokens, _) in _run(core, free).items()}
    schema = GuidedDecodingParams(json=SCHEMAS["tree"])
    bound = [_request(f"bound {i}", i, (), guided_decoding=schema) for i in range(4)]
    together = _run(core, [*bound, *free])
    assert {name: together[name][0] for name in alone} == alone


def test_an_answer_ends_with_its_last_token_where_nothing_may_follow(core: EngineCore) -> None:
    choice = GuidedDecodingParams(choice=("abc", "xyz"))
    for eos in ((), (EOS_TOKEN_ID,)):
        request = _request("one", 1, eos, guided_decoding=choice)
        ((tokens, last),) = _run(core, [request]).values()
        assert last.finish_reason is FinishReason.STOP
        assert last.stop_reason is None
        assert not set(tokens) & {EOS_TOKEN_ID, END_TOKEN_ID}
