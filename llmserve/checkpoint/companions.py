"""The files that travel with the weights: the tokenizer's, the chat template, generation_config,
and what the conversion cost in quality.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llmserve.checkpoint.config_file import artifact_kind

GENERATION_CONFIG = "generation_config.json"
QUALITY_FILE = "quality.json"
COMPANION_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    GENERATION_CONFIG,
)
COMPANION_DIRECTORIES = ("additional_chat_templates",)


def companions(source: Path) -> list[Path]:
    """Those that are in a directory, relative to it.

    quality.json travels with weights that stay what they are. A Hugging Face checkpoint's is about
    itself, and a conversion writes one of its own.
    """
    found = [Path(name) for name in COMPANION_FILES if (source / name).is_file()]
    if (source / QUALITY_FILE).is_file() and artifact_kind(source) != "huggingface":
        found.append(Path(QUALITY_FILE))
    for name in COMPANION_DIRECTORIES:
        files = sorted(path for path in (source / name).rglob("*") if path.is_file())
        found += [path.relative_to(source) for path in files]
    return found


def companions_bytes(source: Path) -> int:
    """Their size together."""
    return sum((source / path).stat().st_size for path in companions(source))


def copy_companions(source: Path, target: Path) -> None:
    """Copy them, byte for byte, and make the copies durable."""
    for path in companions(source):
        copy = target / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
