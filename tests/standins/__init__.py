"""Stand-ins for packages that tests cannot install, and how a test gets one.

They behave as the API's description says, and refuse what it does not have. What is tested with
them has not been run on the real thing.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizer_files import write_tokenizer

STANDINS = Path(__file__).parent


def install_tensorrt_llm(
    monkeypatch: pytest.MonkeyPatch, directory: Path, version: str
) -> list[str]:
    """Let this process find the stand-in as TensorRT-LLM of a version.

    Args:
        monkeypatch: Takes it away again.
        directory: An empty one, for its metadata and programs.
        version: Of its metadata, such as '1.2.1'.

    Returns:
        The directories that a child's PYTHONPATH needs for the same.
    """
    forget_tensorrt_llm()
    metadata = directory / f"tensorrt_llm-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n"
    )
    paths = [str(directory), str(STANDINS)]
    for path in paths:
        monkeypatch.syspath_prepend(path)
    return paths


def install_trtllm_build(monkeypatch: pytest.MonkeyPatch, directory: Path) -> Path:
    """Put the stand-in trtllm-build on PATH."""
    directory.mkdir(parents=True, exist_ok=True)
    program = directory / "trtllm-build"
    shutil.copyfile(STANDINS / "bin" / "trtllm-build", program)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return program


def behaviour() -> Any:
    """What the installed stand-in is to do wrong, and what it has seen."""
    return importlib.import_module("tensorrt_llm._behaviour").behaviour


def forget_tensorrt_llm() -> None:
    """Drop what was imported of the stand-in."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


def make_checkpoint(path: Path, *, world_size: int = 1, **config: Any) -> Path:
    """Write what trtllm-build reads of a TensorRT-LLM checkpoint, with the tests' tokenizer."""
    write_tokenizer(path)
    for rank in range(world_size):
        (path / f"rank{rank}.safetensors").write_bytes(f"weights of rank {rank}".encode())
    (path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "LlamaForCausalLM",
                "dtype": "bfloat16",
                "vocab_size": 320,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
                "mapping": {"world_size": world_size, "tp_size": world_size},
                **config,
            }
        )
    )
    return path


def make_huggingface(path: Path) -> Path:
    """Write what is read of a Hugging Face checkpoint that ModelOpt has quantised."""
    write_tokenizer(path)
    (path / "model.safetensors").write_bytes(b"weights")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": 320,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }
    (path / "config.json").write_text(json.dumps(config))
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None}
    (path / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    return path
