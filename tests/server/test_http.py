"""Routes, errors, keys and ids, without a socket."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmserve.checkpoint.quality_file import Measurement, write_measurement
from llmserve.core.request import Output, Request
from llmserve.errors import EngineOverloadedError
from llmserve.openai.serving import OpenAIServing
from llmserve.server.app import create_app
from llmserve.server.metrics import Metrics
from llmserve.server.settings import ServerSettings
from llmserve.server.state import ServingState
from tests.engines import ScriptedEngine
from tests.openai.models import MODEL, ScoringEngine, make_llm, says

COMPLETION = {"model": MODEL, "prompt": "hi"}
MEASUREMENT = Measurement(
    reference="bfloat16",
    candidate="FP8",
    text="a text",
    tokens_sha256="00ff",
    num_samples=2,
    num_tokens=64,
    reference_perplexity=8.25,
    perplexity=8.5,
    mean_kl=0.0125,
    max_kl=0.5,
    top1_agreement=0.96875,
)
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


class Server:
    """The application with its parts, and a client."""

    def __init__(self, engine: ScriptedEngine | None = None, **settings: Any) -> None:
        self.engine = engine or says("one two")
        self.state = ServingState()
        self.metrics = Metrics(MODEL)
        self.app = create_app(self.state, ServerSettings(**settings), self.metrics)
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://test"
        )

    def load(self) -> Server:
        self.state.loaded(OpenAIServing(make_llm(self.engine), MODEL, self.metrics))
        return self


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server().load()
    async with server.client:
        yield server


def check_error(
    response: httpx.Response, status: int, code: str, param: str | None = None
) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["message"]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return error


async def test_answers(server: Server) -> None:
    response = await server.client.post("/v1/completions", json=COMPLETION)
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "one two"
    response = await server.client.post("/v1/chat/completions", json=CHAT)
    assert response.json()["choices"][0]["message"]["content"] == "one two"


async def test_a_timeout_is_a_408_that_the_sdk_does_not_send_again() -> None:
    server = Server(ScoringEngine()).load()
    async with server.client as client:
        response = await client.post("/v1/completions", json={**COMPLETION, "timeout": 5})
        error = check_error(response, 408, "timeout")
        assert "5 s" in error["message"]
        assert response.headers["x-should-retry"] == "false"
        body = {**COMPLETION, "timeout": 5, "stream": True}
        response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200  # said with the first token
    *chunks, last, _ = response.text.split("\n\n")
    assert len(chunks) == 5
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


async def test_a_stream(server: Server) -> None:
    response = await server.client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "one two"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "malformed_body", None),
        (b"{", "malformed_body", None),
        (b'{"model": "tiny", "prompt": "hi", "temperature": NaN}', "malformed_body", None),
        (b'{"model": "tiny", "prompt": "hi", "temperature": Infinity}', "malformed_body", None),
        (
            b'{"model": "tiny", "prompt": "hi", "temperature": 1e999}',
            "invalid_value",
            "temperature",
        ),
        (b'{"model": "tiny", "prompt": "\\ud800"}', "malformed_body", None),
        (b'{"model": "tiny", "prompt": "\xff"}', "malformed_body", None),
        (b"[" * 100_000, "malformed_body", None),
        (b'{"model": "tiny", "prompt": ' + b"9" * 10_000 + b"}", "malformed_body", None),
        (b"[]", "invalid_value", None),
        (b'"text"', "invalid_value", None),
        (b"null", "invalid_value", None),
        (b'{"model": "tiny"}', "missing_field", "prompt"),
    ],
)
async def test_bodies_that_are_wrong(
    server: Server, body: bytes, code: str, param: str | None
) -> None:
    response = await server.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    check_error(response, 400, code, param)


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": "1"}, "invalid_value", "temperature"),
        ({"n": True}, "invalid_value", "n"),
        ({"colour": "blue"}, "unknown_field", "colour"),
        ({"suffix": "end"}, "unsupported", "suffix"),
        ({"guided_regex": "("}, "invalid_value", "guided_regex"),
        ({"logit_bias": {"512": 1}}, "invalid_value", "logit_bias"),
        ({"min_tokens": 20, "max_tokens": 10}, "invalid_value", "min_tokens"),
        ({"max_tokens": 10**6}, "context_length_exceeded", "max_tokens"),
        ({"prompt": "long " * 10_000}, "context_length_exceeded", "prompt"),
        ({"prompt": ""}, "invalid_value", "prompt"),
        ({"prompt": [511, 512]}, "invalid_value", "prompt"),
        ({"stop": ""}, "invalid_value", "stop"),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_requests_that_are_wrong(
    server: Server, streamed: bool, fields: dict[str, Any], code: str, param: str
) -> None:
    body = {**COMPLETION, "stream": streamed, **fields}
    check_error(await server.client.post("/v1/completions", json=body), 400, code, param)
    assert (await server.client.post("/v1/completions", json=COMPLETION)).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/metrics", "/version", "/v1/models"])
async def test_what_can_be_read_answers_head(server: Server, path: str) -> None:
    assert (await server.client.head(path)).status_code == 200


async def test_unknown_model_route_and_method(server: Server) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        response = await server.client.post(path, json={**body, "model": "gpt"})
        check_error(response, 404, "model_not_found", "model")
    check_error(await server.client.get("/v1/models/gpt"), 404, "model_not_found", "model")
    check_error(await server.client.get("/v1/nothing"), 404, "route_not_found")
    check_error(await server.client.get("/v1/models/"), 404, "model_not_found", "model")
    check_error(await server.client.get("/docs"), 404, "route_not_found")
    response = await server.client.get("/v1/completions")
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_content_types(server: Server) -> None:
    content = json.dumps(COMPLETION).encode()
    for bad in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = await server.client.post(
            "/v1/completions", content=content, headers={"content-type": bad}
        )
        check_error(response, 415, "unsupported_media_type")
    response = await server.client.post(
        "/v1/completions",
        content=content,
        headers={"content-type": "Application/JSON; charset=utf-8"},
    )
    assert response.status_code == 200


async def test_models(server: Server) -> None:
    models = (await server.client.get("/v1/models")).json()
    assert models["object"] == "list"
    (model,) = models["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == (MODEL, "model", 256)
    # The list is OpenAI's; a model by itself tells of its quality as well, here of none.
    one = (await server.client.get(f"/v1/models/{MODEL}")).json()
    assert one == {**model, "quality": None}


async def test_a_model_tells_what_was_measured_of_it(tmp_path: Path) -> None:
    server = Server()
    llm = make_llm(server.engine)
    llm.model_dir = tmp_path
    record = {
        "digest_algorithm": "blake3",
        "source": {"model.safetensors": {"digest": "aa", "tensors": {"w": "bb"}}},
        "result": {"rank0.safetensors": {"digest": "cc", "tensors": {}}},
        "quantization_error": {"a": 0.25, "b": 0.5},
    }
    (tmp_path / "quality.json").write_text(json.dumps(record))
    write_measurement(tmp_path, MEASUREMENT)
    server.state.loaded(OpenAIServing(llm, MODEL, server.metrics))
    async with server.client:
        quality = (await server.client.get(f"/v1/models/{MODEL}")).json()["quality"]
        (listed,) = (await server.client.get("/v1/models")).json()["data"]
    assert quality == {
        "quant_algo": None,
        "measurement": {
            "weights": "FP8",
            "reference": "bfloat16",
            "perplexity": 8.5,
            "reference_perplexity": 8.25,
            "kl_divergence": 0.0125,
            "top1_agreement": 0.96875,
            "num_tokens": 64,
            "tokens_sha256": "00ff",
        },
        "max_quantization_error": 0.5,
        "digest_algorithm": "blake3",
        "source": {"model.safetensors": "aa"},
        "result": {"rank0.safetensors": "cc"},
    }
    assert "quality" not in listed


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", '{"measurement": 3}', '{"measurement": {"perplexity": "low"}}'),
        *('{"source": {"a": 1}}', '{"quantization_error": {"w": "small"}}'),
    ],
)
async def test_a_damaged_quality_file_is_no_reason_not_to_serve(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    llm = make_llm(server.engine)
    llm.model_dir = tmp_path
    (tmp_path / "quality.json").write_text(text)
    server.state.loaded(OpenAIServing(llm, MODEL, server.metrics))
    assert "quality.json" in caplog.text
    async with server.client:
        assert (await server.client.get(f"/v1/models/{MODEL}")).json()["quality"] is None


async def test_version(server: Server) -> None:
    assert (await server.client.get("/version")).json()["version"]


async def test_request_ids(server: Server) -> None:
    async def echoed(given: str | None) -> str:
        headers = {} if given is None else {"X-Request-Id": given}
        response = await server.client.get("/health", headers=headers)
        return response.headers["x-request-id"]

    assert await echoed("my-id_1.2:3") == "my-id_1.2:3"
    assert await echoed("a b\tc;d") == "abcd"
    assert len(await echoed("x" * 1000)) == 128
    assert len(await echoed("")) == 32
    assert await echoed(None) != await echoed(None)


async def test_two_requests_with_one_id_do_not_collide(server: Server) -> None:
    ids = set()
    for _ in range(2):
        response = await server.client.post(
            "/v1/completions", json=COMPLETION, headers={"X-Request-Id": "same"}
        )
        assert response.headers["x-request-id"] == "same"
        ids.add(response.json()["id"])
    assert len(ids) == 2


async def test_every_request_is_logged_under_its_id(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await server.client.post(
        "/v1/completions", json={**COMPLETION, "user": "me"}, headers={"X-Request-Id": "id-7"}
    )
    lines = [r.getMessage() for r in caplog.records if "id-7" in r.getMessage()]
    assert any("'me'" in line for line in lines)
    assert any("POST '/v1/completions' 200" in line for line in lines)


async def test_keys() -> None:
    server = Server(api_keys=("key-1", "key-2")).load()
    async with server.client as client:
        for header in (None, "", "Bearer", "Bearer ", "Bearer key", "Bearer key-1x", "Basic key-1"):
            headers = {} if header is None else {"authorization": header}
            for path in ("/v1/models", "/version", "/nothing", "/v1/completions"):
                response = await client.get(path, headers=headers)
                check_error(response, 401, "invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
            response = await client.post("/v1/completions", json=COMPLETION, headers=headers)
            check_error(response, 401, "invalid_api_key")
        assert not server.engine.requests
        for header in ("Bearer key-1", "bearer key-2"):
            response = await client.get("/v1/models", headers={"authorization": header})
            assert response.status_code == 200
        response = await client.get("/v1/models", headers={"authorization": "Bearer ké".encode()})
        check_error(response, 401, "invalid_api_key")
        for path in ("/health", "/metrics"):
            assert (await client.get(path)).status_code == 200


async def test_loading_and_draining() -> None:
    server = Server()
    async with server.client as client:

        async def check_unavailable(code: str) -> None:
            for response in (
                await client.post("/v1/completions", json=COMPLETION),
                await client.post("/v1/chat/completions", json={**CHAT, "stream": True}),
                await client.get("/v1/models"),
                await client.get("/health"),
            ):
                check_error(response, 503, code)
                assert int(response.headers["retry-after"]) >= 1
            assert (await client.get("/metrics")).status_code == 200

        await check_unavailable("engine_loading")
        server.load()
        assert (await client.get("/health")).json() == {"status": "ok"}
        server.state.draining = True
        await check_unavailable("engine_shutting_down")


async def test_overload_and_a_dead_engine(server: Server) -> None:
    server.engine.overloaded = True
    for streamed in (False, True):
        body = {**CHAT, "stream": streamed}
        response = await server.client.post("/v1/chat/completions", json=body)
        check_error(response, 503, "engine_overloaded")
        assert response.headers["retry-after"] == "2"
    server.engine.overloaded = False
    server.engine.die("the engine process died")
    for streamed in (False, True):
        body = {**CHAT, "stream": streamed}
        response = await server.client.post("/v1/chat/completions", json=body)
        check_error(response, 503, "engine_down")
    check_error(await server.client.get("/health"), 503, "engine_down")
    server.engine.revive()
    assert (await server.client.get("/health")).status_code == 200
    assert (await server.client.post("/v1/completions", json=COMPLETION)).status_code == 200


class LateRefusal(ScriptedEngine):
    """Takes a request and refuses it from the stream: its queue had filled meanwhile, say."""

    def submit(self, request: Request) -> AsyncIterator[Output]:  # type: ignore[override]
        async def outputs() -> AsyncIterator[Output]:
            await asyncio.sleep(0.01)
            raise EngineOverloadedError("the queue is full")
            yield

        return outputs()


@pytest.mark.parametrize("prompt", ["hi", ["hi", "you"]])
async def test_what_fails_before_the_first_token_has_a_status(prompt: str | list[str]) -> None:
    server = Server(LateRefusal()).load()
    async with server.client as client:
        body = {**COMPLETION, "stream": True, "prompt": prompt}
        check_error(await client.post("/v1/completions", json=body), 503, "engine_overloaded")


async def test_a_bug_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def bug(request: object) -> list[int]:
        raise RuntimeError("the secret")

    server = Server(ScriptedEngine(bug)).load()
    async with server.client as client:
        for streamed in (False, True):
            response = await client.post(
                "/v1/completions",
                json={**COMPLETION, "stream": streamed},
                headers={"X-Request-Id": f"bug-{streamed}"},
            )
            error = check_error(response, 500, "internal_error")
            assert "secret" not in error["message"]
            assert response.headers["x-request-id"] == f"bug-{streamed}"
            assert f"bug-{streamed}" in caplog.text
    assert "the secret" in caplog.text


async def test_a_failed_request_is_a_500_of_its_own() -> None:
    server = Server(ScriptedEngine()).load()
    engine = server.engine

    def script(request: Any) -> list[int]:
        engine.request_errors[request.request_id] = "NaN in the logits"
        return [5]

    engine.script = script
    async with server.client as client:
        response = await client.post("/v1/completions", json=COMPLETION)
        error = check_error(response, 500, "engine_error")
        assert error["message"] == "NaN in the logits"
