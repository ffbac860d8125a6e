from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import pytest

from llmserve.batch.format import Answer, BatchInput, Response, read_answer, seed_of
from llmserve.errors import BatchInputError
from tests.batch.jobs import MODEL, chat_line, write_jobs


def open_jobs(path: Path) -> BatchInput:
    return BatchInput.open(path, served_model_name=MODEL)


def without(field: str) -> dict[str, Any]:
    return {name: value for name, value in chat_line("a").items() if name != field}


def test_lines_and_bodies_in_the_files_order(tmp_path: Path) -> None:
    jobs_path = write_jobs(
        tmp_path / "jobs.jsonl", [chat_line("é"), "", chat_line("b", "ünïcode\u2028"), "  \t"]
    )
    with open_jobs(jobs_path) as jobs:
        assert [(line.number, line.custom_id) for line in jobs.lines] == [(1, "é"), (3, "b")]
        assert jobs.body(jobs.lines[0]) == chat_line("é")["body"]
        assert jobs.body(jobs.lines[1]) == chat_line("b", "ünïcode\u2028")["body"]


def test_crlf_and_a_last_line_without_end(tmp_path: Path) -> None:
    lines = [json.dumps(chat_line(name)).encode() for name in "ab"]
    (tmp_path / "jobs.jsonl").write_bytes(b"\r\n".join(lines))
    with open_jobs(tmp_path / "jobs.jsonl") as jobs:
        assert [line.custom_id for line in jobs.lines] == ["a", "b"]
        assert jobs.body(jobs.lines[1]) == chat_line("b")["body"]


def test_a_byte_order_mark_before_the_first_line(tmp_path: Path) -> None:
    lines = [json.dumps(chat_line(name)).encode() for name in "ab"]
    (tmp_path / "jobs.jsonl").write_bytes(codecs.BOM_UTF8 + b"\n".join(lines))
    with open_jobs(tmp_path / "jobs.jsonl") as jobs:
        assert [jobs.body(line) for line in jobs.lines] == [chat_line(n)["body"] for n in "ab"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON: Expecting property name"),
        ('{"custom_id": NaN}', "line 2: not JSON: NaN is no JSON number"),
        ("[" * 100_000, "line 2: not JSON"),
        (b'{"custom_id": "\xff"}', "line 2: not UTF-8 (byte 16 of the line)"),
        ("7", "line 2: is 7; it must be an object"),
        (without("custom_id"), "line 2: custom_id is missing"),
        (without("method"), "line 2: method is missing"),
        (without("url"), "line 2: url is missing"),
        (without("body"), "line 2: body is missing"),
        (chat_line(""), "line 2: custom_id is ''; it must be a non-empty string"),
        (chat_line("a") | {"custom_id": 7}, "line 2: custom_id is 7; it must be a non-empty"),
        (json.dumps(chat_line("\ud800")), "line 2: custom_id is '\\ud800'; it holds half"),
        (chat_line("a") | {"method": "GET"}, "line 2: method is 'GET'; it must be 'POST'"),
        (chat_line("a") | {"url": "/v1/embeddings"}, "line 2: url is '/v1/embeddings'; it must"),
        (chat_line("a") | {"url": ["/v1/completions"]}, "line 2: url is ['/v1/completions']; it"),
        (chat_line("a") | {"body": []}, "line 2: body is []; it must be an object"),
        (chat_line("a") | {"extra": 1}, "line 2: 'extra' is an unknown field; a line has"),
        (chat_line("a", stream=True), "line 2: body.stream is True; a batch answer can't stream"),
        (chat_line("a", model="gpt"), "line 2: body.model is 'gpt'; it must be 'demo'"),
        (chat_line("first"), "line 2: custom_id 'first' is used on line 1 already"),
    ],
)
def test_a_bad_line_names_itself_and_its_field(
    tmp_path: Path, line: dict[str, Any] | str | bytes, message: str
) -> None:
    jobs_path = write_jobs(tmp_path / "jobs.jsonl", [chat_line("first"), line])
    with pytest.raises(BatchInputError) as caught:
        open_jobs(jobs_path)
    assert message in str(caught.value)


def test_stream_false_and_null_ask_for_nothing(tmp_path: Path) -> None:
    lines = [chat_line("a", stream=False), chat_line("b", stream=None)]
    with open_jobs(write_jobs(tmp_path / "jobs.jsonl", lines)) as jobs:
        assert len(jobs.lines) == 2


def test_all_faults_are_told_at_once_but_not_without_end(tmp_path: Path) -> None:
    jobs_path = write_jobs(
        tmp_path / "jobs.jsonl", [chat_line(f"{i}", "", stream=1) for i in range(30)]
    )
    with pytest.raises(BatchInputError) as caught:
        open_jobs(jobs_path)
    text = str(caught.value)
    assert "line 20:" in text
    assert "line 21:" not in text
    assert text.endswith("and 10 more")


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "jobs.jsonl").write_bytes(content)
    with pytest.raises(BatchInputError, match="is empty"):
        open_jobs(tmp_path / "jobs.jsonl")


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(BatchInputError, match=r"cannot read .*No such file"):
        open_jobs(tmp_path / "nothing.jsonl")
    with pytest.raises(BatchInputError, match=r"cannot read .*directory"):
        open_jobs(tmp_path)


def test_a_file_changed_while_it_is_open(tmp_path: Path) -> None:
    jobs_path = write_jobs(tmp_path / "jobs.jsonl", [chat_line("a", "one")])
    with open_jobs(jobs_path) as jobs:
        jobs_path.write_bytes(jobs_path.read_bytes().replace(b"one", b"two"))
        with pytest.raises(BatchInputError, match=r"changed while the job ran \(line 1\)"):
            jobs.body(jobs.lines[0])


def test_an_answer_is_openais_output_line() -> None:
    body: dict[str, object] = {"text": "né", "usage": {"completion_tokens": 5}}
    answer = Answer.from_response("a", "77", Response(200, body))
    assert json.loads(answer.line) == {
        "id": "batch_req_77",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req_77", "body": body},
        "error": None,
    }
    assert "né".encode() in answer.line
    assert (answer.failed, answer.completion_tokens) == (False, 5)
    assert read_answer(answer.line) == ("a", False)


def test_failures_of_both_kinds() -> None:
    refused = Answer.from_response("a", "77", Response(400, {"error": {"message": "no"}}))
    assert refused.failed
    assert read_answer(refused.line) == ("a", True)
    elsewhere = {"id": "1", "custom_id": "b", "response": None, "error": {"code": "expired"}}
    assert read_answer(json.dumps(elsewhere).encode()) == ("b", True)


def test_a_lone_surrogate_in_an_answer_is_escaped() -> None:
    answer = Answer.from_response("a", "77", Response(400, {"error": "bad \ud800"}))
    assert json.loads(answer.line)["response"]["body"] == {"error": "bad \ud800"}


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b"7", b'{"custom_id": "a"}', b"\xff"])
def test_what_is_no_answer(line: bytes) -> None:
    with pytest.raises(ValueError):
        read_answer(line)


def test_seeds_are_stable_and_spread() -> None:
    assert seed_of("a-1") == 2440869429454664148  # pinned: jobs go on across versions
    seeds = {seed_of(str(i)) for i in range(1000)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
