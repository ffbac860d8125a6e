"""``llmserve inspect``: what a directory is."""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmserve.cli import COMMANDS, Subparsers
from llmserve.cli.sizes import count, size
from llmserve.errors import ConfigError

if TYPE_CHECKING:
    from llmserve.inspection import Description, TensorEntry


def add_parser(subparsers: Subparsers) -> None:
    """Add ``inspect DIR``."""
    parser = subparsers.add_parser("inspect", help=COMMANDS["inspect"])
    parser.add_argument(
        "directory",
        type=Path,
        help="Hugging Face checkpoint, TensorRT-LLM checkpoint or engine",
    )
    parser.add_argument(
        "--tensors",
        nargs="?",
        const="*",
        metavar="PATTERN",
        help="list the tensors too; with a pattern such as '*.layers.0.*', those that match",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from llmserve.inspection import describe

    description = describe(args.directory.expanduser())
    tensors = []
    if args.tensors is not None:
        tensors = [t for t in description.tensors if fnmatchcase(t.name, args.tensors)]
        if not tensors:
            raise ConfigError(f"--tensors {args.tensors!r} matches none of the tensors' names")
    if args.json:
        print(json.dumps(_object(description, tensors), indent=2))
        return 0
    for name, value in _summary(description):
        print(f"{name:<16}{value}")
    if tensors:
        print()
        _print_tensors(tensors)
    return 0


def _summary(description: Description) -> list[tuple[str, str]]:
    from llmserve.checkpoint.config_file import KIND_NAMES

    config, build = description.config, description.build
    parameters = count(description.num_parameters)
    if description.num_active_parameters != description.num_parameters:
        parameters += f", {count(description.num_active_parameters)} active for a token"
    attention = (
        f"{config.num_attention_heads} heads of {config.head_size}, {config.num_key_value_heads} "
        "of K and V"
    )
    if config.sliding_window is not None:
        sliding = sum(config.window(i) is not None for i in range(config.num_hidden_layers))
        attention += f", a window of {config.sliding_window:,} tokens in {sliding} layers"
    rows = [
        ("what", KIND_NAMES[description.kind]),
        ("architecture", config.architecture),
        ("parameters", parameters),
        ("layers", f"{config.num_hidden_layers}, hidden {config.hidden_size:,}"),
        ("attention", attention),
        ("vocabulary", f"{config.vocab_size:,} tokens{_tied(description)}"),
        ("positions", f"{config.max_position_embeddings:,} tokens"),
        ("dtype", config.dtype),
        ("weights", config.quantization.quant_algo or "not quantised"),
        ("KV cache", config.quantization.kv_cache_quant_algo or config.dtype),
        ("ranks", str(config.tp_size)),
        ("on disk", f"{size(description.stored_bytes)} in {_files(description)} files"),
    ]
    if config.moe is not None:
        experts = f"{config.moe.num_experts}, {config.moe.top_k} for a token"
        rows.insert(4, ("experts", experts))
    if build is not None:
        rows.append(
            (
                "built for",
                f"{build.max_batch_size:,} requests and {build.max_num_tokens:,} tokens a step, "
                f"{build.max_seq_len:,} tokens a request, blocks of {build.tokens_per_block}",
            )
        )
    tokenizer = (description.path / "tokenizer.json").is_file()
    rows.append(("tokenizer", "tokenizer.json" if tokenizer else "none: takes token ids only"))
    return rows


def _tied(description: Description) -> str:
    return ", lm_head is the embedding" if description.config.share_embedding_table else ""


def _files(description: Description) -> int:
    return len({entry.file for entry in description.tensors})


def _print_tensors(tensors: list[TensorEntry]) -> None:
    width = max(len(entry.name) for entry in tensors)
    file = None
    for entry in tensors:
        if entry.file != file:
            file = entry.file
            print(file)
        print(f"  {entry.name:<{width}}  {entry.spec}  {size(entry.spec.nbytes)}")


def _object(description: Description, tensors: list[TensorEntry]) -> dict[str, Any]:
    import dataclasses

    return {
        "path": str(description.path),
        "kind": description.kind,
        "num_parameters": description.num_parameters,
        "num_active_parameters": description.num_active_parameters,
        "stored_bytes": description.stored_bytes,
        "pretrained_config": description.config.to_dict(),
        "build_config": dataclasses.asdict(description.build) if description.build else None,
        "tensors": [
            {
                "file": entry.file,
                "name": entry.name,
                "dtype": str(entry.spec.dtype).removeprefix("torch."),
                "shape": list(entry.spec.shape),
            }
            for entry in tensors
        ],
    }
