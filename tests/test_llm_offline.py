"""LLM, for scripts: over a scripted engine in the same process."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from llmserve.config import EngineConfig, KvCacheConfig, NGramDecodingConfig
from llmserve.core.sampling_params import GuidedDecodingParams, SamplingParams
from llmserve.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    EngineError,
    EngineOverloadedError,
    EngineShutdownError,
    InvalidRequestError,
)
from llmserve.llm import LLM, AsyncLLM, offline
from llmserve.tokenizer import GenerationConfig, Tokenizer
from tests.engines import ScriptedEngine, expected_tokens
from tests.tokenizer_files import BOS_ID, EOS_ID, write_tokenizer

PROMPTS = ["the quick brown fox", "hello world, how are you", "one two three"]


class Opened:
    """What stands in for artifacts and ProcessEngine; keeps what LLM asked for."""

    def __init__(self, directory):
        self.directory = directory
        self.engine = ScriptedEngine()
        self.ensured = None
        self.engine_config = None
        self.tokenizer = None
        self.error = None

    def ensure_engine(self, model, **kwargs):
        self.ensured = (model, kwargs)
        return self.directory

    async def open_engine(self, engine_dir, *, tokenizer, engine_config):
        self.engine_config, self.tokenizer = engine_config, tokenizer
        if self.error is not None:
            raise self.error
        await self.engine.start()
        tokenizer = Tokenizer.from_directory(engine_dir)
        return AsyncLLM(self.engine, tokenizer, GenerationConfig(eos_token_ids=(EOS_ID,)))


@pytest.fixture
def opened(tmp_path, monkeypatch):
    opened = Opened(write_tokenizer(tmp_path, add_bos=True))
    monkeypatch.setattr(offline, "ensure_engine", opened.ensure_engine)
    monkeypatch.setattr(offline, "open_engine", opened.open_engine)
    return opened


@pytest.fixture
def llm(opened):
    with LLM("a-model") as llm:
        yield llm


def loop_threads():
    return [thread for thread in threading.enumerate() if thread.name == "llmserve-llm"]


def wait_until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_one_input_gives_one_output_and_a_list_a_list(llm):
    single = llm.generate(PROMPTS[0], use_tqdm=False)
    ids = llm.tokenizer.encode(PROMPTS[0])
    assert ids[0] == BOS_ID
    assert single.prompt == PROMPTS[0]
    assert single.prompt_token_ids == ids
    assert single.outputs[0].token_ids == expected_tokens(ids, 32)  # the default max_tokens
    assert single.finished

    from_ids = llm.generate(ids)
    assert from_ids.prompt is None
    assert from_ids.outputs[0].text == single.outputs[0].text

    several = llm.generate(PROMPTS)
    assert [output.prompt for output in several] == PROMPTS
    assert several[0].outputs[0].text == single.outputs[0].text
    several = llm.generate([ids, ids[:2]])
    assert [output.prompt_token_ids for output in several] == [ids, ids[:2]]
    assert llm.generate([PROMPTS[0]])[0].outputs[0].text == single.outputs[0].text
    assert llm.generate([]) == []


def test_sampling_params_for_all_or_for_each(llm):
    lengths = [3, 5, 7]
    each = [SamplingParams(max_tokens=n) for n in lengths]
    outputs = llm.generate(PROMPTS, each)
    assert [output.outputs[0].length for output in outputs] == lengths
    outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=4, n=2))
    assert [[c.length for c in output.outputs] for output in outputs] == [[4, 4]] * 3
    with pytest.raises(InvalidRequestError, match="2 sampling_params for 3 inputs"):
        llm.generate(PROMPTS, each[:2])
    plain = llm.generate(PROMPTS[0], SamplingParams(add_special_tokens=False))
    assert BOS_ID not in plain.prompt_token_ids


def test_priority_timeout_and_salt_are_of_all_inputs(llm, opened):
    llm.generate(PROMPTS[:2], priority=5, timeout_s=60, cache_salt="mine")
    llm.generate_async(PROMPTS[0], priority=-5, timeout_s=30.5, cache_salt="other").result()
    llm.generate(PROMPTS[0])
    assert [(r.priority, r.timeout_s, r.cache_salt) for r in opened.engine.requests] == [
        (5, 60, "mine"),
        (5, 60, "mine"),
        (-5, 30.5, "other"),
        (0, None, None),
    ]


def test_a_guide_that_cannot_be_used_is_refused_before_anything_runs(llm, opened):
    good = SamplingParams(guided_decoding=GuidedDecodingParams(regex="a+"), max_tokens=2)
    bad = SamplingParams(guided_decoding=GuidedDecodingParams(regex="("))
    with pytest.raises(InvalidRequestError, match=r"^inputs\[1\]: guided_decoding cannot be used"):
        llm.generate(PROMPTS[:2], [good, bad])
    with pytest.raises(InvalidRequestError):
        llm.generate_async(PROMPTS[0], bad)
    assert opened.engine.requests == []
    llm.generate(PROMPTS[0], good)
    (request,) = opened.engine.requests
    assert request.sampling_params.guided_decoding == good.guided_decoding


def test_a_bad_input_is_named_before_anything_runs(llm, opened):
    for inputs, says in [
        ([[5, 6], [7] * 300], "300 in the prompt"),
        ([[5, 6], []], "prompt is empty"),
        ([[5, 6], [5, 10_000]], "10000"),
        ([[5, 6], [5, "x"]], "'x' is no id"),
        (["fine", "\ud800"], "surrogate"),
        (["fine", {"prompt": "x"}], "not dict"),
    ]:
        with pytest.raises(InvalidRequestError, match=rf"^inputs\[1\]: .*{says}"):
            llm.generate(inputs)
    for inputs in (5, None):
        with pytest.raises(InvalidRequestError, match="text, token ids, or a list of either"):
            llm.generate(inputs)
    with pytest.raises(ContextLengthError):
        llm.generate([7] * 300)
    assert opened.engine.requests == []


def test_an_engine_fault_names_its_input_and_aborts_the_rest(llm, opened):
    opened.engine.token_delay_s = 0.001
    opened.engine.request_errors["1-0"] = "the logits are NaN"
    with pytest.raises(EngineError, match=r"^inputs\[1\]: the logits are NaN"):
        llm.generate(PROMPTS, SamplingParams(max_tokens=200))
    assert opened.engine.open == {}
    assert sorted(opened.engine.aborted) == ["0-0", "2-0"]
    assert llm.generate(PROMPTS[0]).finished


def test_a_dead_engine_is_an_error_for_all(llm, opened):
    opened.engine.die_after_tokens = 20
    with pytest.raises(EngineDeadError, match=r"^the engine process died"):
        llm.generate(PROMPTS)
    opened.engine.revive()
    assert len(llm.generate(PROMPTS)) == 3


def test_many_inputs_do_not_overrun_the_queue(llm, opened, monkeypatch):
    opened.engine.max_queue_size = 2
    submit, refusals, most = opened.engine.submit, [], [0]

    def counted(request):
        try:
            stream = submit(request)
        except EngineOverloadedError as error:
            error.retry_after_s = 0.001
            refusals.append(request.request_id)
            raise
        most[0] = max(most[0], len(opened.engine.open))
        return stream

    monkeypatch.setattr(opened.engine, "submit", counted)
    outputs = llm.generate([[i + 4] for i in range(100)], SamplingParams(max_tokens=2))
    assert [output.outputs[0].token_ids for output in outputs] == [[i + 4] * 2 for i in range(100)]
    assert refusals
    opened.engine.max_queue_size = None
    most[0] = 0
    llm.generate([[5]] * 100, SamplingParams(max_tokens=2))
    assert most[0] == 2 * llm.info.max_batch_size


async def test_generate_async_in_the_callers_event_loop(llm):
    ids = llm.tokenizer.encode(PROMPTS[0])
    result = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=5), streaming=True)
    diffs = []
    async for output in result:
        diffs += output.outputs[0].token_ids_diff
    assert diffs == expected_tokens(ids, 5)
    assert result.finished
    assert (await result).outputs[0].token_ids == diffs
    together = await asyncio.gather(*(llm.generate_async(prompt).aresult() for prompt in PROMPTS))
    assert [output.prompt for output in together] == PROMPTS

    whole = [output async for output in llm.generate_async(PROMPTS[0])]
    assert [output.finished for output in whole] == [True]


def test_generate_async_without_an_event_loop(llm):
    ids = llm.tokenizer.encode(PROMPTS[0])
    result = llm.generate_async(ids, SamplingParams(max_tokens=4), streaming=True)
    assert (result.prompt, result.prompt_token_ids, result.finished) == (None, ids, False)
    lengths = [output.outputs[0].length for output in result]
    assert lengths == [1, 2, 3, 4]
    assert result.result() is result.result()
    assert result.outputs[0].token_ids == expected_tokens(ids, 4)
    assert list(result) == []

    text = llm.generate_async(PROMPTS[0])
    assert text.prompt == PROMPTS[0]
    assert [output.finished for output in text] == [True]


def test_results_of_many_threads(llm):
    results = {}

    def work(i):
        results[i] = llm.generate([i + 4, 5], SamplingParams(max_tokens=20)).outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: expected_tokens([i + 4, 5], 20) for i in range(16)}


def test_a_result_may_be_waited_for_with_a_limit(llm, opened):
    opened.engine.pause()
    result = llm.generate_async(PROMPTS[0])
    with pytest.raises(TimeoutError):
        result.result(timeout=0.02)
    assert opened.engine.open
    llm._loop_thread.run(_call(opened.engine.resume))
    assert result.result(timeout=10).outputs[0].finish_reason == "length"


async def _call(function):
    function()


def test_abort_ends_a_result(llm, opened):
    opened.engine.token_delay_s = 0.005
    result = llm.generate_async(PROMPTS[0], SamplingParams(max_tokens=200), streaming=True)
    next(result)
    result.abort()
    assert result.result().outputs[0].finish_reason == "abort"
    assert 0 < result.outputs[0].length < 200
    result.abort()


async def test_cancelling_a_waiting_task_aborts(llm, opened):
    opened.engine.pause()
    result = llm.generate_async(PROMPTS[0])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(result, 0.02)
    wait_until(lambda: opened.engine.open == {})
    with pytest.raises(EngineError, match="cancelled"):
        await result


def test_a_dropped_result_is_aborted(llm, opened):
    opened.engine.pause()
    llm.generate_async(PROMPTS[0])
    gc.collect()
    wait_until(lambda: opened.engine.aborted == ["0-0"])


def test_errors_of_generate_async(llm, opened):
    with pytest.raises(ContextLengthError):
        llm.generate_async([7] * 300)
    opened.engine.overloaded = True
    with pytest.raises(EngineOverloadedError):
        llm.generate_async(PROMPTS[0])
    opened.engine.overloaded = False
    opened.engine.die_after_tokens = 3
    result = llm.generate_async(PROMPTS[0], streaming=True)
    for _ in range(2):
        with pytest.raises(EngineDeadError):
            list(result)
    with pytest.raises(EngineDeadError):
        result.result()


def test_settings_reach_the_artefact_and_the_engine(opened, tmp_path):
    cache = KvCacheConfig(max_tokens=4096)
    model = "owner/name"
    with LLM(
        model,
        revision="v1",
        dtype="float32",
        quant="w8a16",
        tokenizer="elsewhere",
        max_batch_size=3,
        max_num_tokens=100,
        max_seq_len=50,
        kv_cache_config=cache,
        capacity_scheduler_policy="max_utilization",
        enable_chunked_prefill=False,
        speculative_config=NGramDecodingConfig(max_draft_len=3),
        deterministic=True,
        threads=2,
        device="cpu",
        kv_cache_dtype="fp8",
        tensor_parallel_size=2,
        trust_remote_code=False,
    ):
        pass
    kwargs = {
        "dtype": "float32",
        "quant": "w8a16",
        "kv_cache_dtype": "fp8",
        "tp_size": 2,
        "build_config": None,
    }
    assert opened.ensured == ("owner/name@v1", kwargs)
    assert opened.tokenizer == "elsewhere"
    assert opened.engine_config == EngineConfig(
        max_batch_size=3,
        max_num_tokens=100,
        max_seq_len=50,
        kv_cache=cache,
        capacity_scheduler_policy="max_utilization",
        enable_chunked_prefill=False,
        speculative=NGramDecodingConfig(max_draft_len=3),
        deterministic=True,
        threads=2,
        device="cpu",
    )
    with pytest.raises(ConfigError, match="revision is 'v1'"):
        LLM(tmp_path, revision="v1")


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ({"max_batchsize": 4}, "LLM has no argument 'max_batchsize'"),
        ({"skip_tokenizer_init": True}, "skip_tokenizer_init is True; only False"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_named(opened, argument, says):
    with pytest.raises(ValueError, match=says):
        LLM("a-model", **argument)
    assert loop_threads() == []


def test_a_failed_start_leaves_no_thread(opened):
    opened.error = EngineDeadError("it ended while loading")
    with pytest.raises(EngineDeadError, match="while loading"):
        LLM("a-model")
    assert loop_threads() == []


def test_shutdown_is_final_and_may_be_called_twice(opened):
    opened.engine.pause()
    llm = LLM("a-model")
    pending = llm.generate_async(PROMPTS[0])
    with llm:
        pass
    llm.shutdown()
    assert opened.engine.shut_down
    assert opened.engine.open == {}
    assert loop_threads() == []
    with pytest.raises(EngineShutdownError):
        llm.generate(PROMPTS[0])
    with pytest.raises(EngineShutdownError):
        pending.result()


def test_the_last_reference_shuts_down(opened):
    llm = LLM("a-model")
    llm.generate(PROMPTS[0])
    del llm
    gc.collect()
    assert opened.engine.shut_down
    assert loop_threads() == []


def test_the_garbage_collector_may_shut_down_in_any_thread(opened):
    llm = LLM("a-model")
    llm._loop_thread.submit(_call(llm.shutdown)).result(timeout=10)
    wait_until(lambda: loop_threads() == [])
    assert opened.engine.shut_down


SCRIPT = """
import sys
from pathlib import Path
from llmserve.llm import LLM, AsyncLLM, offline
from llmserve.tokenizer import GenerationConfig, Tokenizer
from tests.engines import ScriptedEngine

class Engine(ScriptedEngine):
    async def shutdown(self, *, drain_s=0.0):
        await super().shutdown(drain_s=drain_s)
        print("shut down", sorted(self.aborted), flush=True)

async def open_engine(engine_dir, *, tokenizer, engine_config):
    engine = Engine(token_delay_s=DELAY)
    await engine.start()
    return AsyncLLM(engine, Tokenizer.from_directory(engine_dir), GenerationConfig())

offline.ensure_engine = lambda model, **kwargs: Path(model)
offline.open_engine = open_engine
llm = LLM(sys.argv[1])
print("ready", flush=True)
print(llm.generate("hello world").outputs[0].text[:11], flush=True)
"""


def script(tmp_path, delay):
    return [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT).replace("DELAY", str(delay)),
        str(write_tokenizer(tmp_path)),
    ]


def test_a_plain_script_ends_cleanly_without_shutdown(tmp_path):
    done = subprocess.run(script(tmp_path, 0), capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == (
        "ready\nhello world\nshut down []\n",
        "",
        0,
    )


def test_ctrl_c_ends_a_script_in_the_middle(tmp_path):
    with subprocess.Popen(
        script(tmp_path, 10), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert time.monotonic() - begun < 5
    assert out.startswith("shut down")
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert process.returncode == -signal.SIGINT
