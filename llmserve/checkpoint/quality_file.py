"""quality.json: what a conversion cost, beside the weights it is about.

Its keys are written by two steps, each leaving the other's alone: ``convert`` tells of digests and
of each tensor's quantisation error, and whoever runs both models adds ``measurement``, which is a
``Measurement``. It travels with the checkpoint into the engine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from llmserve.checkpoint.companions import QUALITY_FILE
from llmserve.checkpoint.config_file import read_json_object, write_json
from llmserve.checkpoint.typed_json import json_object, typed
from llmserve.errors import CheckpointError, CheckpointNotFoundError

_MEASUREMENT = "measurement"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """A model against the one it was made from, on the same held-out tokens.

    Attributes:
        reference: What the reference's weights are: a quant_algo, or the dtype of plain ones.
        candidate: Likewise of the model that is judged; 'W8A16 + INT8 KV' with a quantised cache.
        text: Name of the text, without its directory.
        tokens_sha256: Digest of the sequences of token ids.
        num_samples: Sequences.
        num_tokens: Predicted tokens, over all of which the figures below are taken: all but the
            first of each sequence.
        reference_perplexity: exp of the mean negative log-likelihood of the tokens.
        perplexity: Likewise of the candidate.
        mean_kl: KL(reference || candidate) of the next token's distribution, in nats a token.
        max_kl: The largest of these.
        top1_agreement: Share of positions at which both have the same likeliest token.
    """

    reference: str
    candidate: str
    text: str
    tokens_sha256: str
    num_samples: int
    num_tokens: int
    reference_perplexity: float
    perplexity: float
    mean_kl: float
    max_kl: float
    top1_agreement: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What quality.json says, without the digests of single tensors.

    Attributes:
        measurement: None where the models were not run.
        digest_algorithm: Of the digests, e.g. 'blake3'; None without any.
        source: Digests of the files that were converted, by name.
        result: Digests of the files that came of it, by name.
        quantization_error: Of each quantised weight, relative.
    """

    measurement: Measurement | None = None
    digest_algorithm: str | None = None
    source: dict[str, str] = field(default_factory=dict)
    result: dict[str, str] = field(default_factory=dict)
    quantization_error: dict[str, float] = field(default_factory=dict)


def read_quality(directory: Path) -> Quality | None:
    """What an artefact's quality.json says, None where there is none.

    Raises:
        CheckpointError: It is damaged.
    """
    path = directory / QUALITY_FILE
    data = _read(directory)
    if data is None:
        return None
    try:
        errors = json_object(data.get("quantization_error"), "quantization_error")
        return Quality(
            measurement=_measurement(data.get(_MEASUREMENT)),
            digest_algorithm=data.get("digest_algorithm"),
            source=_file_digests(data, "source"),
            result=_file_digests(data, "result"),
            quantization_error={str(name): float(error) for name, error in errors.items()},
        )
    except (CheckpointError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def write_measurement(directory: Path, measurement: Measurement) -> None:
    """Put a measurement into an artefact's quality.json in place of an earlier one.

    The file is whole at every moment, and everything else in it stays.

    Raises:
        CheckpointError: There is a quality.json that is no JSON object, or it cannot be written.
    """
    data = (_read(directory) or {}) | {_MEASUREMENT: asdict(measurement)}
    draft = directory / f".{QUALITY_FILE}.tmp"
    try:
        write_json(draft, data)
        os.replace(draft, directory / QUALITY_FILE)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise CheckpointError(
            f"{directory / QUALITY_FILE} cannot be written: {error.strerror}"
        ) from error


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        return read_json_object(directory / QUALITY_FILE)
    except CheckpointNotFoundError:
        return None


def _measurement(data: Any) -> Measurement | None:
    if data is None:
        return None
    data = json_object(data, _MEASUREMENT)
    names = [spec.name for spec in fields(Measurement)]
    if missing := [name for name in names if data.get(name) is None]:
        raise CheckpointError(f"{_MEASUREMENT} lacks {', '.join(missing)}")
    return Measurement(**typed(Measurement, data, f"{_MEASUREMENT}."))


def _file_digests(data: Mapping[str, Any], key: str) -> dict[str, str]:
    files = json_object(data.get(key), key)
    return {
        name: str(json_object(file, f"{key}.{name}").get("digest")) for name, file in files.items()
    }
