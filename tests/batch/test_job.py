from __future__ import annotations

import asyncio
import errno
import itertools
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.batch.format import JsonObject, Response, seed_of
from llmserve.batch.job import run_job
from llmserve.batch.journal import Journal
from llmserve.errors import (
    BatchError,
    BatchInputError,
    BatchJournalError,
    EngineDeadError,
)
from tests.batch.jobs import (
    FakeResponder,
    answer_to,
    chat_line,
    make_job,
    read_lines,
    write_jobs,
)

NAMES = [f"line {i}" for i in range(12)]
DIED = Response(503, {"error": {"message": "the engine process died", "code": "engine_down"}})


@pytest.fixture
def jobs_dir(tmp_path: Path) -> Path:
    write_jobs(tmp_path / "jobs.jsonl", [chat_line(name, content=name) for name in NAMES])
    return tmp_path


def text_of(body: JsonObject) -> str:
    return body["messages"][0]["content"]  # type: ignore[index, no-any-return]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def expected_body(name: str) -> JsonObject:
    return answer_to(chat_line(name, content=name)["body"] | {"seed": seed_of(name)}).body


async def test_every_line_is_answered_in_order_and_nothing_else_is_left(jobs_dir: Path) -> None:
    responder = FakeResponder()
    result = await run_job(make_job(jobs_dir), responder)
    assert (result.total, result.failed, result.already_complete) == (12, 0, False)
    answers = read_lines(jobs_dir / "answers.jsonl")
    assert [answer["custom_id"] for answer in answers] == NAMES
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"] == expected_body(answer["custom_id"])
        assert answer["id"] == answer["response"]["request_id"].replace("req_", "batch_req_")
    assert len({answer["id"] for answer in answers}) == 12
    assert sorted(os.listdir(jobs_dir)) == ["answers.jsonl", "jobs.jsonl"]
    assert responder.most_in_flight == 4


async def test_nothing_counts_before_it_is_on_the_disk(
    jobs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill can't show a missing sync, only a power cut could: so look at the calls."""
    calls: list[str] = []

    def watch(name: str) -> None:
        real = getattr(os, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "fdatasync", "fsync", "replace", "unlink"):
        watch(name)
    await run_job(make_job(jobs_dir, concurrency=1), FakeResponder())
    after_writes = {after for call, after in itertools.pairwise(calls) if call == "pwrite"}
    assert after_writes == {"fdatasync"}
    assert calls[-4:] == ["fsync", "replace", "fsync", "unlink"]


async def test_a_seed_that_is_given_stays(tmp_path: Path) -> None:
    write_jobs(tmp_path / "jobs.jsonl", [chat_line("a", seed=0), chat_line("b", seed=None)])
    await run_job(make_job(tmp_path), FakeResponder())
    bodies = [a["response"]["body"]["echo"] for a in read_lines(tmp_path / "answers.jsonl")]
    assert [body["seed"] for body in bodies] == [0, seed_of("b")]


async def test_default_concurrency_is_the_engines(jobs_dir: Path) -> None:
    responder = FakeResponder()
    await run_job(make_job(jobs_dir, concurrency=None), responder)
    assert responder.most_in_flight == 8


@settings(max_examples=40, deadline=None)
@given(
    delays=st.lists(st.integers(0, 4), max_size=10),
    statuses=st.lists(st.sampled_from([200, 200, 400, 500]), min_size=1, max_size=10),
    concurrency=st.integers(1, 12),
)
def test_whatever_the_order_of_finishing_the_files_are_the_same(
    delays: list[int], statuses: list[int], concurrency: int
) -> None:
    names = [f"{i}" for i in range(len(statuses))]
    status_of = dict(zip(names, statuses, strict=True))

    def behave(body: JsonObject, tries: int) -> Response:
        return Response(status_of[text_of(body)], body)

    with tempfile.TemporaryDirectory() as path:
        directory = Path(path)
        write_jobs(directory / "jobs.jsonl", [chat_line(name, content=name) for name in names])
        responder = FakeResponder(behave, [delay / 2000 for delay in delays])
        result = asyncio.run(run_job(make_job(directory, concurrency=concurrency), responder))
        good = [name for name in names if status_of[name] == 200]
        bad = [name for name in names if status_of[name] != 200]
        assert result.failed == len(bad)
        assert [a["custom_id"] for a in read_lines(directory / "answers.jsonl")] == good
        assert (directory / "errors.jsonl").exists() == bool(bad)
        if bad:
            errors = read_lines(directory / "errors.jsonl")
            assert [e["custom_id"] for e in errors] == bad
            assert [e["response"]["status_code"] for e in errors] == [status_of[b] for b in bad]
        assert set(responder.submissions.values()) == {1}


async def test_the_engines_own_faults_are_tried_again(jobs_dir: Path) -> None:
    def behave(body: JsonObject, tries: int) -> Response | None:
        return DIED if tries < 2 and text_of(body) in NAMES[::3] else None

    responder = FakeResponder(behave)
    result = await run_job(make_job(jobs_dir), responder)
    assert result.failed == 0
    assert [a["custom_id"] for a in read_lines(jobs_dir / "answers.jsonl")] == NAMES
    assert sorted(responder.submissions.values()) == [1] * 8 + [3] * 4


async def test_a_dead_engine_is_waited_for_and_not_besieged(jobs_dir: Path) -> None:
    def behave(body: JsonObject, tries: int) -> Response | None:
        if text_of(body) == NAMES[5] and not tries:
            responder.dead = True
            asyncio.get_running_loop().call_later(0.05, setattr, responder, "dead", False)
        return DIED if responder.dead else None

    responder = FakeResponder(behave)
    result = await run_job(make_job(jobs_dir, retry_pause_s=0.001), responder)
    assert result.failed == 0
    assert max(responder.submissions.values()) == 2


async def test_a_line_that_kills_the_engine_is_found_and_the_others_are_answered(
    jobs_dir: Path,
) -> None:
    """Whatever is in flight with the deadly line dies with it, again and again."""
    responder = FakeResponder()
    deaths = asyncio.Event()

    class Deadly(FakeResponder):
        async def respond(self, url: str, body: JsonObject, request_id: str) -> Response:
            nonlocal deaths
            mine = deaths
            if text_of(body) == NAMES[5]:
                await asyncio.sleep(0.002)
                deaths, _ = asyncio.Event(), deaths.set()
                return DIED
            answer = asyncio.create_task(super().respond(url, body, request_id))
            dead = asyncio.create_task(mine.wait())
            await asyncio.wait((answer, dead), return_when=asyncio.FIRST_COMPLETED)
            dead.cancel()
            if mine.is_set():
                answer.cancel()
                return DIED
            return await answer

    responder = Deadly(delays_s=[0.01] * 24)
    result = await run_job(make_job(jobs_dir), responder)
    assert result.failed == 1
    answered = [a["custom_id"] for a in read_lines(jobs_dir / "answers.jsonl")]
    assert answered == NAMES[:5] + NAMES[6:]
    [failure] = read_lines(jobs_dir / "errors.jsonl")
    assert failure["custom_id"] == NAMES[5]
    assert failure["response"]["status_code"] == 503
    assert failure["response"]["body"] == DIED.body
    assert max(responder.submissions.values()) == 4  # three beside others, one alone


async def test_an_engine_that_stays_away_ends_the_run_which_can_be_resumed(jobs_dir: Path) -> None:
    def behave(body: JsonObject, tries: int) -> Response | None:
        if text_of(body) in NAMES[6:]:
            responder.dead = True
        return DIED if responder.dead else None

    responder = FakeResponder(behave)
    with pytest.raises(
        EngineDeadError, match=r"did not come back .* answers are safe: run the same"
    ):
        await run_job(make_job(jobs_dir, engine_timeout_s=0.05, retry_pause_s=0.001), responder)
    assert sorted(os.listdir(jobs_dir)) == ["answers.jsonl.journal", "jobs.jsonl"]
    with Journal.open(jobs_dir / "answers.jsonl.journal") as journal:
        before = set(journal.entries)
    assert before == set(NAMES[:6])
    second = FakeResponder()
    await run_job(make_job(jobs_dir), second)
    assert second.submissions.total() == 6
    assert [a["custom_id"] for a in read_lines(jobs_dir / "answers.jsonl")] == NAMES


async def test_a_bug_ends_the_run_and_is_not_taken_for_the_engines_fault(jobs_dir: Path) -> None:
    def behave(body: JsonObject, tries: int) -> None:
        if text_of(body) == NAMES[7]:
            raise RuntimeError("a bug")

    responder = FakeResponder(behave)
    with pytest.raises(RuntimeError, match="a bug"):
        await run_job(make_job(jobs_dir), responder)
    assert not (jobs_dir / "answers.jsonl").exists()
    with Journal.open(jobs_dir / "answers.jsonl.journal") as journal:
        assert set(NAMES[:4]) <= set(journal.entries)


async def test_cancelled_it_keeps_what_is_done_and_leaves_no_half_output(jobs_dir: Path) -> None:
    responder = FakeResponder(delays_s=[0] * 5 + [60] * 7)
    running = asyncio.create_task(run_job(make_job(jobs_dir), responder))
    while responder.submissions.total() < 9:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert responder.in_flight == 0
    assert sorted(os.listdir(jobs_dir)) == ["answers.jsonl.journal", "jobs.jsonl"]
    second = FakeResponder()
    await run_job(make_job(jobs_dir), second)
    assert second.submissions.total() == 7
    assert [a["custom_id"] for a in read_lines(jobs_dir / "answers.jsonl")] == NAMES


async def test_run_again_after_its_end_it_does_nothing(jobs_dir: Path) -> None:
    job = make_job(jobs_dir)
    await run_job(
        job, FakeResponder(lambda body, _: Response(400, {}) if text_of(body) == NAMES[3] else None)
    )
    before = contents(jobs_dir)
    responder = FakeResponder()
    result = await run_job(job, responder)
    assert (result.total, result.failed, result.already_complete) == (12, 1, True)
    assert responder.submissions.total() == 0
    assert contents(jobs_dir) == before


@pytest.mark.parametrize("name", ["answers.jsonl", "errors.jsonl"])
async def test_a_file_in_the_outputs_place_is_never_overwritten(jobs_dir: Path, name: str) -> None:
    (jobs_dir / name).write_text("precious\n")
    with pytest.raises(BatchError, match=f"{name} exists and is not the result of this job"):
        await run_job(make_job(jobs_dir), FakeResponder())
    assert (jobs_dir / name).read_text() == "precious\n"
    assert sorted(os.listdir(jobs_dir)) == sorted([name, "jobs.jsonl"])


async def interrupt(jobs_dir: Path) -> None:
    """Leave the job half done."""
    responder = FakeResponder(lambda body, _: 1 / 0 if text_of(body) == NAMES[7] else None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        await run_job(make_job(jobs_dir), responder)


async def test_a_changed_input_or_setting_is_not_mixed_in(jobs_dir: Path) -> None:
    await interrupt(jobs_dir)
    with pytest.raises(BatchJournalError, match="another job: the model changed since"):
        await run_job(make_job(jobs_dir, settings={"the model": "other"}), FakeResponder())
    write_jobs(jobs_dir / "jobs.jsonl", [chat_line(name, content="new") for name in NAMES])
    with pytest.raises(BatchJournalError, match="another job: the jobs file changed since"):
        await run_job(make_job(jobs_dir), FakeResponder())
    assert not (jobs_dir / "answers.jsonl").exists()


async def test_concurrency_may_change_between_runs(jobs_dir: Path) -> None:
    await interrupt(jobs_dir)
    await run_job(make_job(jobs_dir, concurrency=1), FakeResponder())
    assert [a["custom_id"] for a in read_lines(jobs_dir / "answers.jsonl")] == NAMES


async def test_a_second_run_at_the_same_time_is_refused(jobs_dir: Path) -> None:
    first = asyncio.create_task(run_job(make_job(jobs_dir), FakeResponder(delays_s=[0.05] * 4)))
    await asyncio.sleep(0.01)
    with pytest.raises(BatchJournalError, match="another run of this job is going on"):
        await run_job(make_job(jobs_dir), FakeResponder())
    await first
    assert [a["custom_id"] for a in read_lines(jobs_dir / "answers.jsonl")] == NAMES


async def test_bad_input_starts_no_engine_and_leaves_nothing(tmp_path: Path) -> None:
    write_jobs(tmp_path / "jobs.jsonl", [chat_line("a"), "oops"])
    with pytest.raises(BatchInputError, match="line 2: not JSON"):
        await run_job(make_job(tmp_path), None)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["jobs.jsonl"]


async def test_a_full_disk_while_answers_are_recorded(
    jobs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_pwrite, left = os.pwrite, [4]

    def pwrite(fd: int, content: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_pwrite(fd, content[:200], offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(BatchJournalError, match="No space left on device"):
        await run_job(make_job(jobs_dir), FakeResponder())
    monkeypatch.undo()
    assert sorted(os.listdir(jobs_dir)) == ["answers.jsonl.journal", "jobs.jsonl"]
    await run_job(make_job(jobs_dir), FakeResponder())
    assert [a["custom_id"] for a in read_lines(jobs_dir / "answers.jsonl")] == NAMES


async def test_a_full_disk_while_the_output_is_written(
    jobs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(body: JsonObject, tries: int) -> Response | None:
        return Response(400, {}) if text_of(body) == NAMES[2] else None

    real_fsync, left = os.fsync, [2]  # the journal's directory, the error file, then no more

    def fsync(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_fsync(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(BatchError, match=r"All 12 answers are safe .* run the same command again"):
        await run_job(make_job(jobs_dir), FakeResponder(behave))
    monkeypatch.undo()
    assert sorted(os.listdir(jobs_dir)) == ["answers.jsonl.journal", "jobs.jsonl"]
    # The rest needs no engine: every line has its answer.
    result = await run_job(make_job(jobs_dir), None)  # type: ignore[arg-type]
    assert (result.total, result.failed) == (12, 1)
    assert len(read_lines(jobs_dir / "answers.jsonl")) == 11
    assert len(read_lines(jobs_dir / "errors.jsonl")) == 1


async def test_paths_that_collide_or_lead_nowhere(jobs_dir: Path) -> None:
    for changes, message in [
        ({"error_path": jobs_dir / "answers.jsonl"}, "four different files"),
        ({"output_path": jobs_dir / "jobs.jsonl"}, "four different files"),
        ({"error_path": jobs_dir / "answers.jsonl.journal"}, "four different files"),
        ({"output_path": jobs_dir / "no" / "answers.jsonl"}, "there is no directory"),
        ({"output_path": jobs_dir}, "it is a directory"),
    ]:
        with pytest.raises(BatchError, match=message):
            await run_job(make_job(jobs_dir, **changes), FakeResponder())
    assert os.listdir(jobs_dir) == ["jobs.jsonl"]


async def test_progress_off_a_terminal_is_plain_lines(
    jobs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await run_job(make_job(jobs_dir), FakeResponder())
    err = capsys.readouterr().err
    assert err.startswith("12/12 lines, 0 failed, ")
    assert err.endswith(" tok/s\n")
    assert err.count("\n") == 1
    assert "\r" not in err
