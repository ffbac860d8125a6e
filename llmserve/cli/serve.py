"""``llmserve serve``: a model behind an OpenAI-compatible API."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmserve.cli import COMMANDS, Subparsers
from llmserve.cli.engine_options import (
    add_backend_options,
    add_engine_options,
    default_model_name,
    engine_config,
)
from llmserve.cli.progress import ProgressReport
from llmserve.errors import ConfigError

if TYPE_CHECKING:
    from llmserve.engine.engine import EngineInfo
    from llmserve.server.settings import ServerSettings

API_KEY_VARIABLE = "LLMSERVE_API_KEY"

logger = logging.getLogger(__name__)


def add_parser(subparsers: Subparsers) -> None:
    """Add ``serve MODEL``."""
    parser = subparsers.add_parser("serve", help=COMMANDS["serve"])
    parser.add_argument(
        "model",
        help="engine, TensorRT-LLM checkpoint or Hugging Face checkpoint, or a Hub id",
    )
    _add_server_options(parser)
    add_engine_options(parser)
    add_backend_options(parser)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    group.add_argument(
        "--port", type=int, default=8000, help="port; 0 takes a free one (default: %(default)s)"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"ask clients for this key; may be repeated (also: ${API_KEY_VARIABLE})",
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="name for clients (default: the directory's)"
    )
    group.add_argument(
        "--request-timeout",
        type=float,
        metavar="SECONDS",
        help="most that a request may take, if it sets no shorter timeout (default: no limit)",
    )


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    import asyncio

    from llmserve.artifacts import ensure_engine
    from llmserve.llm import AsyncLLM
    from llmserve.llm.async_llm import open_engine
    from llmserve.server.run import bind, run_server
    from llmserve.server.settings import ServerSettings

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("llmserve").setLevel(logging.INFO)
    settings = ServerSettings(
        host=args.host,
        port=args.port,
        api_keys=_api_keys(args.api_key),
        request_timeout_s=args.request_timeout,
    )
    config = engine_config(args)
    name = args.served_model_name or default_model_name(args.model)
    with bind(settings.host, settings.port) as sock:
        url = _url(settings.host, sock.getsockname()[1])
        _warn_if_open(settings)
        # Here and not while serving: conversion is a matter of minutes and cannot be interrupted
        # from an event loop.
        with ProgressReport() as report:
            engine_dir = ensure_engine(
                args.model,
                dtype=args.dtype,
                quant=args.quant,
                kv_cache_dtype=args.kv_cache_dtype,
                tp_size=args.tp,
                backend=args.backend,
                report=report,
            )

        async def load() -> AsyncLLM:
            logger.info("loading %s; %s answers 503 until that is done", engine_dir, url)
            return await open_engine(
                engine_dir,
                engine_config=config,
                backend=args.backend,
                gather_generation_logits=args.gather_generation_logits,
            )

        def announce(llm: AsyncLLM) -> None:
            print(f"serving {name} on {url}: {describe_capacity(llm.engine.info)}")
            print(f"try: {_curl(url, name, with_key=bool(settings.api_keys))}", flush=True)

        asyncio.run(run_server(load, name, settings, sock, on_ready=announce))
    return 0


def describe_capacity(info: EngineInfo) -> str:
    """One sentence on how much an engine holds at once."""
    return (
        f"the KV cache holds {info.kv_cache_tokens:,} tokens "
        f"({info.kv_cache_bytes / 2**20:,.0f} MiB), "
        f"{info.max_concurrent_full_requests:,} requests of the full {info.max_seq_len:,} tokens "
        f"at once; a step takes up to {info.max_batch_size:,} requests and "
        f"{info.max_num_tokens:,} tokens; {info.quant_algo or info.dtype} weights of "
        f"{info.weights_bytes / 2**20:,.0f} MiB on {info.device}, loaded in {info.load_s:.1f} s"
    )


def _curl(url: str, name: str, *, with_key: bool) -> str:
    """A command that asks this server something."""
    message = {"role": "user", "content": "Hello"}
    body = json.dumps({"model": name, "stream": True, "messages": [message]})
    headers = ["content-type: application/json"]
    if with_key:
        headers.append(f"authorization: Bearer ${API_KEY_VARIABLE}")
    options = " ".join(f'-H "{header}"' for header in headers)
    return f"curl -N {url}/v1/chat/completions {options} -d {shlex.quote(body)}"


def _api_keys(given: Sequence[str]) -> tuple[str, ...]:
    keys = [*given, *filter(None, [os.environ.get(API_KEY_VARIABLE)])]
    for key in keys:
        if not key.strip() or not key.isascii():
            raise ConfigError("an API key must be ASCII and not empty")
    return tuple(key.strip() for key in keys)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _warn_if_open(settings: ServerSettings) -> None:
    if not settings.api_keys and settings.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning(
            "anyone who reaches %s may use the model: no --api-key is set", settings.host
        )
