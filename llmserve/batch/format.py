"""OpenAI's batch file format: the jobs file is checked here, whole, before anything runs.

A line of the jobs file::

    {"custom_id": "a-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": ...}}

A line of the output file and of the error file::

    {"id": "batch_req_...", "custom_id": "a-1",
     "response": {"status_code": 200, "request_id": "req_...", "body": {...}}, "error": null}

A failed request has another status there, and ``{"error": {...}}`` for a body. ``error`` is for
requests without any response, which do not happen here; files from elsewhere may hold them.

This module knows what a line must look like. What a *body* may hold beyond ``model`` and ``stream``
is the API's business: a body it refuses is answered with a 400 in the error file.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from llmserve.errors import BatchInputError

URLS = ("/v1/chat/completions", "/v1/completions")
JsonObject = dict[str, object]

_FIELDS = ("custom_id", "method", "url", "body")
# A file with a systematic mistake has it on every line: so many are told, the others counted.
_MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class InputLine:
    """One request of a jobs file. Its body stays on disk until it is due.

    Attributes:
        number: Line number in the file, from 1.
        custom_id: The caller's name for it, unique in the file.
        url: One of ``URLS``.
        offset: Where the line begins in the file, in bytes.
        num_bytes: Its length without the line's end.
        crc32: Of those bytes: shows a file that changed while the job ran.
    """

    number: int
    custom_id: str
    url: str
    offset: int
    num_bytes: int
    crc32: int


class BatchInput:
    """A checked jobs file, held open so that bodies are read when they are due.

    Attributes:
        path: The file.
        sha256: Hex digest of its content.
        lines: Its requests in the order of the file. Blank lines are skipped.
    """

    def __init__(self, path: Path, file: BinaryIO, sha256: str, lines: Sequence[InputLine]) -> None:
        self.path = path
        self.sha256 = sha256
        self.lines = lines
        self._file = file

    @classmethod
    def open(cls, path: Path, *, served_model_name: str) -> BatchInput:
        """Read and check a jobs file.

        Args:
            path: A regular file of JSON lines in UTF-8.
            served_model_name: What every body's ``model`` must be.

        Raises:
            BatchInputError: The file can't be read, is empty, or has lines at fault. The message
                names line, field and limit of each, up to 20.
        """
        try:
            file = path.open("rb")
        except OSError as error:
            raise BatchInputError(f"cannot read {path}: {error.strerror}") from error
        try:
            sha256, lines = _check_file(path, file, served_model_name)
        except BaseException:
            file.close()
            raise
        return cls(path, file, sha256, lines)

    def body(self, line: InputLine) -> JsonObject:
        """The request body of a line.

        Raises:
            BatchInputError: The file has changed since it was opened.
        """
        content = os.pread(self._file.fileno(), line.num_bytes, line.offset)
        if zlib.crc32(content) != line.crc32:
            raise BatchInputError(
                f"{self.path} changed while the job ran (line {line.number}); "
                "restore it and run the same command again"
            )
        body = json.loads(content)["body"]
        assert isinstance(body, dict)
        return body

    def request_id(self, line: InputLine) -> str:
        """A stable id: the same line of the same file has it in every run."""
        return _digest(self.sha256, line.custom_id)[:32]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> BatchInput:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class Response:
    """What the API answered to one request.

    Attributes:
        status_code: As over HTTP: 200, or the error's.
        body: The response body, or ``{"error": {...}}``.
    """

    status_code: int
    body: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Answer:
    """A line of the output file or of the error file.

    Attributes:
        custom_id: The request it answers.
        failed: Whether it goes to the error file.
        line: The JSON text in UTF-8, without the line's end.
        completion_tokens: Generated tokens, as the response reports them.
    """

    custom_id: str
    failed: bool
    line: bytes
    completion_tokens: int = 0

    @classmethod
    def from_response(cls, custom_id: str, request_id: str, response: Response) -> Answer:
        """An answer from the API, of any status."""
        usage = response.body.get("usage")
        tokens = usage.get("completion_tokens", 0) if isinstance(usage, dict) else 0
        content = {
            "status_code": response.status_code,
            "request_id": f"req_{request_id}",
            "body": response.body,
        }
        failed = response.status_code != 200
        line = _encode(
            {
                "id": f"batch_req_{request_id}",
                "custom_id": custom_id,
                "response": content,
                "error": None,
            }
        )
        return cls(custom_id, failed, line, tokens)


def read_answer(line: bytes) -> tuple[str, bool]:
    """The custom_id of an output line, and whether it is a failure.

    Raises:
        ValueError: It isn't a line of an output or error file.
    """
    answer = json.loads(line)
    try:
        custom_id, response, error = answer["custom_id"], answer["response"], answer["error"]
        failed = error is not None or response["status_code"] != 200
    except (KeyError, TypeError) as fault:
        raise ValueError("not a line of a batch output file") from fault
    if not isinstance(custom_id, str):
        raise ValueError("custom_id is not a string")
    return custom_id, failed


def seed_of(custom_id: str) -> int:
    """A seed in [0, 2^63) for a request that asks for none: the same in every run of the job."""
    return int(_digest("seed", custom_id)[:16], 16) >> 1


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _encode(answer: JsonObject) -> bytes:
    try:
        return json.dumps(answer, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # An error message may quote a lone surrogate of the request: only an escape can carry it.
        return json.dumps(answer).encode()


class _LineError(Exception):
    """One line's fault, without its number."""


def _check_file(
    path: Path, file: BinaryIO, served_model_name: str
) -> tuple[str, Sequence[InputLine]]:
    """Read the whole file once: its digest and its lines, or one error with all faults."""
    if not path.is_file():
        raise BatchInputError(f"{path} is not a regular file; a job must be readable again")
    sha256 = hashlib.sha256()
    lines: list[InputLine] = []
    problems: list[str] = []
    num_problems = 0
    first_use: dict[str, int] = {}
    for number, offset, raw in _numbered_lines(file):
        sha256.update(raw)
        content = raw.rstrip(b"\r\n")
        if number == 1 and content.startswith(codecs.BOM_UTF8):  # editors on Windows write one
            content = content.removeprefix(codecs.BOM_UTF8)
            offset += len(codecs.BOM_UTF8)
        if not content.strip():
            continue
        try:
            custom_id, url = _check_line(content, served_model_name)
            first = first_use.setdefault(custom_id, number)
            if first != number:
                raise _LineError(f"custom_id {custom_id!r} is used on line {first} already")
        except _LineError as error:
            num_problems += 1
            if len(problems) < _MAX_PROBLEMS:
                problems.append(f"line {number}: {error}")
        else:
            crc32 = zlib.crc32(content)
            lines.append(InputLine(number, custom_id, url, offset, len(content), crc32))
    if num_problems:
        if num_problems > len(problems):
            problems.append(f"and {num_problems - len(problems)} more")
        raise BatchInputError(f"{path} cannot be run:\n  " + "\n  ".join(problems))
    if not lines:
        raise BatchInputError(f"{path} is empty; it must hold one request a line")
    return sha256.hexdigest(), lines


def _numbered_lines(file: BinaryIO) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    for number, raw in enumerate(file, 1):
        yield number, offset, raw
        offset += len(raw)


def _check_line(content: bytes, served_model_name: str) -> tuple[str, str]:
    """custom_id and url of a line; raises _LineError naming the field at fault."""
    request = _parse(content)
    for name in request:
        if name not in _FIELDS:
            raise _LineError(f"{name!r} is an unknown field; a line has {', '.join(_FIELDS)}")
    for name in _FIELDS:
        if name not in request:
            raise _LineError(f"{name} is missing")
    custom_id, url, body = request["custom_id"], request["url"], request["body"]
    if not isinstance(custom_id, str) or not custom_id:
        raise _LineError(f"custom_id is {_show(custom_id)}; it must be a non-empty string")
    if not _is_text(custom_id):
        raise _LineError(f"custom_id is {_show(custom_id)}; it holds half a surrogate pair")
    if request["method"] != "POST":
        raise _LineError(f"method is {_show(request['method'])}; it must be 'POST'")
    if not isinstance(url, str) or url not in URLS:
        raise _LineError(f"url is {_show(url)}; it must be {' or '.join(URLS)}")
    if not isinstance(body, dict):
        raise _LineError(f"body is {_show(body)}; it must be an object")
    if body.get("stream"):
        raise _LineError(f"body.stream is {_show(body['stream'])}; a batch answer can't stream")
    if body.get("model") != served_model_name:
        raise _LineError(
            f"body.model is {_show(body.get('model'))}; it must be {served_model_name!r}, "
            "or what --served-model-name says"
        )
    return custom_id, url


def _parse(content: bytes) -> JsonObject:
    try:
        request = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _LineError(f"not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise _LineError(f"not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise _LineError(f"not JSON: {error}") from error
    if not isinstance(request, dict):
        raise _LineError(f"is {_show(request)}; it must be an object")
    return request


def _is_text(string: str) -> bool:
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _show(value: object) -> str:
    """A value for an error message: its repr, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
