"""What a checkpoint says about generation: where an answer ends, and how its authors sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import CheckpointError, InvalidRequestError
from llmserve.tokenizer.tokenizer import Tokenizer, read_optional_json


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """``generation_config.json``, as far as serving needs it.

    The sampling fields are defaults for clients of the HTTP API who leave them out; None where the
    file has none. They carry SamplingParams' names and meaning.

    Attributes:
        eos_token_ids: Tokens that end an answer, in ascending order.
        temperature: 0 (greedy) if the file has ``do_sample: false``.
        top_p: Nucleus sampling.
        top_k: 0 for all tokens.
        min_p: Relative threshold.
        repetition_penalty: 1 for none.
    """

    eos_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def from_directory(cls, directory: str | Path, tokenizer: Tokenizer) -> GenerationConfig:
        """Read a directory's generation_config.json.

        An answer ends at each of its ``eos_token_id`` (config.json's, if it has none) and at the
        tokenizer's own end-of-sequence token: chat fine-tunes often name the end of a turn in
        only one of the files.

        Raises:
            CheckpointError: A file cannot be read or holds a value outside its range.
        """
        directory = Path(directory)
        path = directory / "generation_config.json"
        data = read_optional_json(path)
        eos = data.get("eos_token_id")
        if eos is None:
            eos = read_optional_json(directory / "config.json").get("eos_token_id")
        eos_token_ids = set(_token_ids(path, eos))
        if tokenizer.eos_token_id is not None:
            eos_token_ids.add(tokenizer.eos_token_id)
        defaults = _sampling_defaults(path, data)
        return cls(eos_token_ids=tuple(sorted(eos_token_ids)), **defaults)

    def sampling_defaults(self) -> dict[str, Any]:
        """The sampling fields that the file sets, as keyword arguments of SamplingParams."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def _token_ids(path: Path, value: object) -> list[int]:
    ids: list[int] = []
    for token_id in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(token_id, int):
            raise CheckpointError(f"{path}: eos_token_id is {value!r}; it must be an id or a list")
        ids.append(token_id)
    return ids


def _sampling_defaults(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    names: tuple[str, ...] = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    defaults: dict[str, Any] = {}
    if data.get("do_sample") is False:
        # Files often keep sampling values beside do_sample: false; they have no effect then.
        names = ("repetition_penalty",)
        defaults["temperature"] = 0.0
    defaults |= {name: data[name] for name in names if data.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except (InvalidRequestError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return defaults
