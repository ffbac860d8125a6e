"""Text files -> the token sequences that calibration and quality measurements run on.

A document is a line of a .jsonl file or a paragraph of a .txt file. Every sample begins as a prompt
does, with what the tokenizer puts before a text, and is never padded. It knows tokenizer.json, and
neither models nor chat templates: whoever has one says how messages are written.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from llmserve.convert.tokenizer_model import write_tokenizer_json
from llmserve.errors import CheckpointError, ConfigError

RenderChat = Callable[[Sequence[Mapping[str, Any]]], str]
DefaultText = Literal["calibration", "held_out"]
Document = str | list[int]

_TEXTS = Path(__file__).parent / "texts"
_SUFFIXES = (".jsonl", ".txt")
_BLANK_LINES = re.compile(r"\n[ \t]*\n\s*")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Samples:
    """Token sequences, each run by itself.

    Attributes:
        name: Of the text, without its directory.
        sequences: Token ids; none is empty.
    """

    name: str
    sequences: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))

    @property
    def sha256(self) -> str:
        """A digest of the sequences: two measurements that share it ran on the same tokens."""
        digest = hashlib.sha256()
        for sequence in self.sequences:
            # Token ids end before 2**32, so none can pass for the mark between two sequences.
            digest.update(array("Q", [*sequence, 1 << 63]).tobytes())
        return digest.hexdigest()


def load_samples(
    path: Path | None,
    tokenizer_dir: Path,
    *,
    default: DefaultText,
    samples: int,
    seq_len: int,
    seed: int,
    vocab_size: int,
    render_chat: RenderChat | None = None,
) -> Samples:
    """Choose documents and tokenise them.

    Of more documents than ``samples`` a choice is made by ``seed``, and of each its first
    ``seq_len`` tokens are taken; of fewer, what follows is taken as well, as samples of their own.
    With fewer samples than asked for a warning says how much there is.

    Args:
        path: A .jsonl or .txt file, or a directory of these; None takes a text of llmserve's own. A
            line of .jsonl is an object with one of ``text``, ``prompt``, ``messages`` or
            ``token_ids``; paragraphs of .txt are separated by blank lines.
        tokenizer_dir: Where tokenizer.json is, or what it can be made of. Token ids need none.
        default: Which of llmserve's own.
        samples: Most sequences.
        seq_len: Most tokens of one.
        seed: Of the choice.
        vocab_size: Token ids are below it.
        render_chat: Writes ``messages`` as a text, special tokens included; None joins their
            contents with blank lines.

    Raises:
        ConfigError: There is no text at ``path``, or a line of it is none of these.
        CheckpointError: The tokenizer is missing or damaged.
    """
    source = path.expanduser() if path is not None else _TEXTS / f"{default}.txt"
    name = source.name if path is not None else f"llmserve's {default.replace('_', '-')} text"
    encoder = _Encoder(tokenizer_dir, vocab_size)
    chosen = _choose(_documents(source, render_chat), samples, random.Random(seed))
    # The beginnings of all documents come first, then what follows them, and so on.
    pieces = [encoder.pieces(document, seq_len) for document in chosen]
    rounds = range(max(map(len, pieces), default=0))
    in_turn = (parts[turn] for turn in rounds for parts in pieces if turn < len(parts))
    result = Samples(name, tuple(islice(in_turn, samples)))
    if not result.sequences:
        raise ConfigError(f"{source} holds no text; name a .jsonl or .txt file with some")
    if path is not None and len(result.sequences) < samples:
        logger.warning(
            "%s gives %d samples of at most %d tokens, %d tokens in all; %d samples were asked for",
            *(source, len(result.sequences), seq_len, result.num_tokens, samples),
        )
    return result


def _choose(documents: Iterator[Document], count: int, rng: random.Random) -> list[Document]:
    """``count`` of the documents, in their order: each choice is equally likely (Vitter 1985)."""
    chosen: list[tuple[int, Document]] = []
    for index, document in enumerate(documents):
        if index < count:
            chosen.append((index, document))
        elif (place := rng.randrange(index + 1)) < count:
            chosen[place] = (index, document)
    return [document for _, document in sorted(chosen, key=lambda part: part[0])]


class _Encoder:
    """A checkpoint's tokenizer, loaded when the first text asks for it."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        self._directory, self._vocab_size = directory, vocab_size
        self._tokenizer: Tokenizer | None = None
        self._prefix: list[int] = []

    def pieces(self, document: Document, seq_len: int) -> list[tuple[int, ...]]:
        """A document as sequences of at most ``seq_len`` tokens, each begun as a prompt is."""
        if isinstance(document, str):
            ids = self._encode(document)
            # A rendered chat has its beginning; so has every text where the tokenizer adds it.
            prefix = self._prefix[: seq_len - 1]
            ids = ids[len(prefix) :] if ids[: len(prefix)] == prefix else ids
        else:
            prefix, ids = [], document
        self._check(ids)
        step = seq_len - len(prefix)
        return [(*prefix, *ids[start : start + step]) for start in range(0, len(ids), step)]

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            self._tokenizer = _load_tokenizer(self._directory)
            self._prefix = list(self._tokenizer.encode("").ids)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _check(self, ids: list[int]) -> None:
        if ids and max(ids) >= self._vocab_size:
            raise ConfigError(
                f"token id {max(ids)} is not below the model's vocab_size {self._vocab_size}; "
                "the text must be tokenised with the tokenizer of this model"
            )


def _load_tokenizer(directory: Path) -> Tokenizer:
    path = directory / "tokenizer.json"
    with tempfile.TemporaryDirectory() as made:
        if not path.is_file():
            if not write_tokenizer_json(directory, Path(made)):
                raise CheckpointError(
                    f"{directory} has no tokenizer, which text needs; give token ids instead: a "
                    '.jsonl file with {"token_ids": [...]} in every line'
                )
            path = Path(made) / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        # The library raises bare Exception for whatever is wrong in the file.
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    # A length limit or padding in the file is a matter of training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _documents(path: Path, render_chat: RenderChat | None) -> Iterator[Document]:
    """Every document of a file or directory, in order."""
    for file in _files(path):
        try:
            with file.open(encoding="utf-8") as lines:
                if file.suffix == ".jsonl":
                    yield from _jsonl(file, lines, render_chat)
                else:
                    yield from filter(str.strip, _BLANK_LINES.split(lines.read()))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}") from error


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"there is no text {path}; name a .jsonl or .txt file or a directory")
    if path.is_dir():
        if files := sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES):
            return files
        raise ConfigError(f"{path} holds no .jsonl and no .txt file")
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path} is neither a .jsonl nor a .txt file")
    return [path]


def _jsonl(file: Path, lines: Iterator[str], render_chat: RenderChat | None) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = _document(json.loads(line), render_chat)
            if isinstance(document, str):
                document.encode()  # JSON can escape half a character, which is no text
            yield document
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{file} line {number}: {error}") from None


def _document(data: object, render_chat: RenderChat | None) -> Document:
    """The document of one line.

    Raises:
        ValueError: It is none; says why.
    """
    if not isinstance(data, dict):
        raise ValueError("it must be a JSON object")
    for key in ("text", "prompt"):
        if isinstance(text := data.get(key), str):
            return text
    if isinstance(ids := data.get("token_ids"), list):
        if not all(type(token) is int and token >= 0 for token in ids):
            raise ValueError("token_ids must be whole numbers, none below 0")
        return ids
    if isinstance(messages := data.get("messages"), list):
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("messages must be objects")
        if render_chat is not None:
            return render_chat(messages)
        contents = [message.get("content") for message in messages]
        return "\n\n".join(content for content in contents if isinstance(content, str))
    raise ValueError(
        "it must have one of text or prompt (a string), messages (a list) or token_ids (a list)"
    )
