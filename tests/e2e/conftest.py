from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.serving import DEMO, Server, llmserve, serve

# Name -> options of convert. float32 is where equal requests get equal tokens, whatever else is in
# the batch: in bfloat16 a near-tie may fall either way.
FORMATS = {
    "none": ("--quant", "none"),
    "w8a16": ("--quant", "w8a16"),
    "fp8_rowwise": ("--quant", "fp8_rowwise"),
    "float32": ("--quant", "none", "--dtype", "float32"),
}


@pytest.fixture(scope="session")
def demo_engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo model's engine in every format, made by the commands that a user types."""
    root = tmp_path_factory.mktemp("demo")
    engines = {}
    for name, options in FORMATS.items():
        checkpoint, engine = root / f"{name}-checkpoint", root / f"{name}-engine"
        for result in (
            llmserve("convert", DEMO, checkpoint, *options),
            llmserve("build", checkpoint, engine),
        ):
            assert result.returncode == 0, result.stderr
        engines[name] = engine
    return engines


@pytest.fixture(scope="module")
def server(
    demo_engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The demo model in W8A16, as `make demo` serves it."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with serve(demo_engines["w8a16"], log, "--served-model-name", "demo") as running:
        yield running


@pytest.fixture(scope="module")
def float32_server(
    demo_engines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The demo model in float32."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with serve(demo_engines["float32"], log, "--served-model-name", "demo") as running:
        yield running
