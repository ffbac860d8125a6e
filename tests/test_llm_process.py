"""LLM over an engine in a real process, with a fake runner: scripts, Ctrl-C, kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from llmserve.config import BuildConfig, EngineConfig
from llmserve.core.sampling_params import SamplingParams
from llmserve.engine.process import ProcessEngine
from llmserve.engine.runner_spec import FakeRunnerSpec
from llmserve.errors import EngineDeadError
from llmserve.llm import LLM, async_llm, offline, open_llm
from llmserve.runtime.fake import expected_tokens
from tests.processes import has_ended
from tests.tokenizer_files import EOS_ID, IM_END_ID, write_tokenizer

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
BUILD = BuildConfig(max_batch_size=4, max_num_tokens=64, max_seq_len=256, tokens_per_block=8)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """LLM on a directory with a tokenizer, and no artefact needed."""
    directory = write_tokenizer(tmp_path)
    monkeypatch.setattr(offline, "ensure_engine", lambda model, **kwargs: directory)

    def build(**runner):
        spec = FakeRunnerSpec(build=BUILD, **runner)
        monkeypatch.setattr(async_llm, "ProcessEngine", partial(ProcessEngine, runner=spec))
        return LLM(directory)

    return build


def test_answers_come_from_the_process(make):
    with make() as llm:
        pid = llm.info.pid
        assert pid != os.getpid()
        prompts = [[i, 2, 3] for i in range(20)]
        outputs = llm.generate(prompts, PARAMS)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.outputs[0].token_ids == expected_tokens(prompt, 20)
            assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)
            assert output.queue_s >= 0
    assert has_ended(pid)


async def test_open_llm_starts_the_engine_of_a_model(tmp_path, monkeypatch):
    directory = write_tokenizer(tmp_path)
    asked = {}

    def ensure_engine(model, **kwargs):
        asked.update(model=model, **kwargs)
        return directory

    spec = FakeRunnerSpec(build=BUILD)
    monkeypatch.setattr(async_llm, "ensure_engine", ensure_engine)
    monkeypatch.setattr(async_llm, "ProcessEngine", partial(ProcessEngine, runner=spec))
    config = EngineConfig(max_seq_len=64)
    llm = await open_llm("owner/name", dtype="float16", quant="w8a16", engine_config=config)
    try:
        expected = {"dtype": "float16", "quant": "w8a16", "build_config": None}
        assert asked == {"model": "owner/name", "backend": "auto", **expected}
        assert (llm.model_dir, llm.engine.info.max_seq_len) == (directory, 64)
        assert llm.generation_config.eos_token_ids == (EOS_ID, IM_END_ID)
        stream = llm.generate([5, 6], PARAMS, request_id="r")
        assert [step async for step in stream][-1].finished
        assert stream.output.outputs[0].token_ids == expected_tokens([5, 6], 20)
    finally:
        await llm.engine.shutdown()


def test_a_stop_string_frees_the_engine(make):
    with make(step_s=0.001) as llm:
        free = llm.generate([5, 6], SamplingParams(max_tokens=200, ignore_eos=True)).outputs[0]
        stop = free.text[10:13]
        wanted = SamplingParams(max_tokens=200, ignore_eos=True, stop=stop)
        cut = llm.generate([5, 6], wanted).outputs[0]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        assert cut.text == free.text[: free.text.index(stop)]
        stats = llm._loop_thread.run(llm._async_llm.engine.stats())
        deadline = time.monotonic() + 5
        while stats.used_num_blocks and time.monotonic() < deadline:
            time.sleep(0.02)
            stats = llm._loop_thread.run(llm._async_llm.engine.stats())
        assert stats.used_num_blocks == 0


def test_a_killed_engine_is_an_error_and_comes_back(make):
    with make(step_s=0.01) as llm:
        result = llm.generate_async([5, 6], SamplingParams(max_tokens=200, ignore_eos=True), True)
        next(result)
        os.kill(llm.info.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            result.result(timeout=10)
        deadline = time.monotonic() + 10
        while True:
            try:
                output = llm.generate([5, 6], PARAMS)
                break
            except EngineDeadError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert output.outputs[0].token_ids == expected_tokens([5, 6], 20)


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
from llmserve.config import BuildConfig
from llmserve.engine.process import ProcessEngine
from llmserve.engine.runner_spec import FakeRunnerSpec
from llmserve.llm import LLM, async_llm, offline
from llmserve import SamplingParams

spec = FakeRunnerSpec(build=BuildConfig(max_seq_len=256), step_s=STEP)
offline.ensure_engine = lambda model, **kwargs: Path(model)
async_llm.ProcessEngine = partial(ProcessEngine, runner=spec)
llm = LLM(sys.argv[1])
print(llm.info.pid, flush=True)
output = llm.generate([5, 6], SamplingParams(max_tokens=200, ignore_eos=True))
print(output.outputs[0].length, flush=True)
"""


def start_script(tmp_path, step_s):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("STEP", str(step_s)), str(write_tokenizer(tmp_path))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_script_without_main_guard_or_shutdown_leaves_no_process(tmp_path):
    with start_script(tmp_path, 0.0) as process:
        pid = int(process.stdout.readline())
        try:
            out, err = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (out, err, process.returncode) == ("200\n", "", 0)
    assert has_ended(pid)


def test_ctrl_c_ends_script_and_engine(tmp_path):
    with start_script(tmp_path, 0.2) as process:
        pid = int(process.stdout.readline())
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=10)
        finally:
            process.kill()
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert has_ended(pid)
