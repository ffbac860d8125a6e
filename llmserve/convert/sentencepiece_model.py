"""Reads sentencepiece's ``tokenizer.model``.

It is a protobuf of which a dozen fields are needed, in a format that has to stay as it is: reading
them takes the standard library, where the sentencepiece package would need protobuf beside it to
tell them. The format: ``sentencepiece_model.proto`` in google/sentencepiece, and protobuf's wire
encoding.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmserve.errors import CheckpointError, UnsupportedCheckpointError

# ModelProto.SentencePiece.Type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# TrainerSpec.ModelType.
UNIGRAM, BPE = 1, 2


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its id is its place.

    Attributes:
        text: With ``▁`` for a space.
        score: BPE: the higher, the earlier it is merged. Unigram: log probability.
        kind: NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE.
    """

    text: str
    score: float = 0.0
    kind: int = NORMAL


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What a ``tokenizer.model`` says of encoding and decoding. Defaults are those of the format.

    Attributes:
        pieces: The vocabulary.
        algorithm: UNIGRAM or BPE.
        byte_fallback: Characters outside the vocabulary become their UTF-8 bytes, else UNKNOWN.
        bos_piece: The name of the beginning-of-sequence token.
        eos_piece: The name of the end-of-sequence token.
        charsmap: How characters are normalised, compiled; b"" for not at all.
        add_dummy_prefix: A space is put before the text.
        remove_extra_whitespaces: Spaces are trimmed and runs of them made one.
    """

    pieces: tuple[Piece, ...]
    algorithm: int = UNIGRAM
    byte_fallback: bool = False
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Read a sentencepiece ``.model``.

    Raises:
        CheckpointError: The file cannot be read, or is no such model.
        UnsupportedCheckpointError: It is a tokenizer of another format, or uses what tokenizer.json
            cannot say.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if _looks_like_tiktoken(data):
        raise UnsupportedCheckpointError(
            f"{path} is a tiktoken vocabulary, not a sentencepiece model; take tokenizer.json from "
            "the model's repository in Hugging Face's format"
        )
    try:
        model, unsupported = _parse(data)
    # Whatever the bytes are, they can only lead to a value of another kind or past the end.
    except (ValueError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise _damaged(path, str(error)) from error
    _check_vocabulary(path, model)
    for reason in unsupported:
        raise UnsupportedCheckpointError(
            f"{path} cannot be written as tokenizer.json: {reason}; take a checkpoint that has a "
            "tokenizer.json"
        )
    return model


def _parse(data: bytes) -> tuple[SentencePieceModel, list[str]]:
    """The model, and what is in it that is not implemented."""
    pieces: list[Piece] = []
    specs: dict[int, dict[int, Any]] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(dict(_fields(value))))
        elif number in (2, 3, 5):
            specs.setdefault(number, {}).update(_fields(value))
    if not {2, 3} <= specs.keys():
        raise ValueError("its end is missing")
    trainer, normalizer, denormalizer = specs[2], specs[3], specs.get(5, {})
    model = SentencePieceModel(
        pieces=tuple(pieces),
        algorithm=trainer.get(3, UNIGRAM),
        byte_fallback=trainer.get(35, 0) != 0,
        bos_piece=trainer.get(46, b"<s>").decode(),
        eos_piece=trainer.get(47, b"</s>").decode(),
        charsmap=b"".join([normalizer.get(2, b"")]),  # a TypeError for a number
        add_dummy_prefix=normalizer.get(3, 1) != 0,
        remove_extra_whitespaces=normalizer.get(4, 1) != 0,
    )
    unsupported = {
        "treat_whitespace_as_suffix is on": trainer.get(24, 0) != 0,
        "escape_whitespaces is off": normalizer.get(5, 1) == 0,
        "it has a denormalizer": bool(denormalizer.get(2)),
        f"its model_type is {model.algorithm}, neither 1 (Unigram) nor 2 (BPE)": (
            model.algorithm not in (UNIGRAM, BPE)
        ),
        "it has UNUSED pieces": any(piece.kind == UNUSED for piece in pieces),
    }
    return model, [reason for reason, applies in unsupported.items() if applies]


def _piece(fields: dict[int, Any]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    kind = fields.get(3, NORMAL)
    if kind not in range(NORMAL, BYTE + 1) or not math.isfinite(score):
        raise ValueError(f"a piece has type {kind} and score {score}")
    return Piece(fields.get(1, b"").decode(), score, kind)


def _looks_like_tiktoken(data: bytes) -> bool:
    """Lines of a token in base 64 and its rank; the first one has rank 0."""
    first_line, newline, _ = data[:256].partition(b"\n")
    return bool(newline) and first_line.endswith(b" 0") and first_line[:-2].isascii()


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is no sentencepiece model ({reason}); download it again")


def _check_vocabulary(path: Path, model: SentencePieceModel) -> None:
    if not model.pieces:
        raise _damaged(path, "it has no pieces")
    [(text, count)] = Counter(piece.text for piece in model.pieces).most_common(1)
    if count > 1 or not all(piece.text for piece in model.pieces):
        raise _damaged(path, f"the piece {text!r} is in it {count} times, or a piece is empty")
    if [piece.kind for piece in model.pieces].count(UNKNOWN) != 1:
        raise _damaged(path, "it needs exactly one piece for what is unknown")
    if model.byte_fallback:
        missing = {f"<0x{byte:02X}>" for byte in range(256)} - {
            piece.text for piece in model.pieces if piece.kind == BYTE
        }
        if missing:
            raise _damaged(path, f"it has byte_fallback and lacks {min(missing)}")


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: an int for a varint, bytes for any other wire type."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        wire_type = key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + size > len(message):
            raise ValueError(f"a field of {size} bytes goes past the end")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Seven bits a byte, low ones first, the eighth set on all but the last."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
