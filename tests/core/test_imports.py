import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "numpy", "pydantic", "fastapi", "msgspec", "zmq", "tokenizers", "transformers")


@pytest.mark.parametrize("module", ["llmserve", "llmserve.core", "llmserve.core.scheduler"])
def test_importing_stays_light(module):
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
