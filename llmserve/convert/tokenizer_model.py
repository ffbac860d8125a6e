"""Writes tokenizer.json for checkpoints that have only a ``tokenizer.model`` (sentencepiece), or
only ``vocab.json`` and ``merges.txt`` (byte-level BPE).

Text between added tokens becomes the ids that sentencepiece gives for it, leading and repeated
spaces included. What is around it is transformers': control tokens are read in text, other added
tokens too, the configuration names BOS and EOS, and ``legacy`` says whether the space that
sentencepiece puts before a text is put behind added tokens as well. Where the configuration says
nothing of ``legacy``, it is older than that flag and means true, as in transformers 4;
transformers 5 takes it for false. In two more ways transformers 5 differs: it drops one of the
spaces that a text begins with, where sentencepiece keeps them, and takes no BOS where the
configuration has no add_bos_token, against its documentation.

What the tokenizers library cannot do as sentencepiece does: order pairs of pieces that have one
score (a warning tells of such vocabularies); round sums of Unigram's scores to 32 bits, which
decides between ways of the same probability; normalise a decomposed character of more than five
bytes as a whole. A user-defined piece gets no space before it where a text begins with it, as in
transformers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from llmserve.checkpoint.config_file import CONFIG_FILE, read_json_object
from llmserve.convert.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    SentencePieceModel,
    read_sentencepiece,
)
from llmserve.errors import CheckpointError, CheckpointNotFoundError

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
VOCAB_JSON, MERGES_TXT = "vocab.json", "merges.txt"
TOKENIZER_CONFIG = "tokenizer_config.json"

_SPACE = "▁"
# Below any sum of scores: a piece that is not NORMAL never wins in a text.
_NEVER = -1e6
# The classes whose .model needs nothing beyond what is in it and in the configuration.
_SENTENCEPIECE_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")
_GENERIC_CLASSES = ("PreTrainedTokenizer", "TokenizersBackend", "SentencePieceBackend")
# transformers takes these for special in Gemma's .model, which calls them user-defined.
_SPECIAL_USER_DEFINED = ("<start_of_turn>", "<end_of_turn>")
# How Qwen2 cuts text before BPE: its published pattern.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# config.json's model_type says the class where tokenizer_config.json does not.
_BYTE_LEVEL_MODEL_TYPES = {
    "gpt2": "GPT2Tokenizer",
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
}
_BYTE_LEVEL_DEFAULT_TOKEN = "<|endoftext|>"

logger = logging.getLogger(__name__)


def write_tokenizer_json(source: Path, out_dir: Path) -> bool:
    """Write ``out_dir``/tokenizer.json, durably, if the source has none but the means to make it.

    Args:
        source: A Hugging Face checkpoint directory. Of tokenizer.model, vocab.json with merges.txt,
            tokenizer_config.json, added_tokens.json, special_tokens_map.json and config.json those
            that are there are read.
        out_dir: An existing directory; may be the source.

    Returns:
        Whether it was written. False where the source has a tokenizer.json or nothing to make one
        of, and, with a warning, for a byte-level BPE whose way to cut text is not known here.

    Raises:
        CheckpointError: A file is damaged, or the files contradict each other.
        UnsupportedCheckpointError: A tokenizer.model of a kind that is not implemented.
    """
    if (source / TOKENIZER_JSON).is_file():
        return False
    settings = _Settings.read(source)
    if (source / TOKENIZER_MODEL).is_file():
        tokenizer = _from_sentencepiece(source / TOKENIZER_MODEL, settings)
    elif (source / VOCAB_JSON).is_file() and (source / MERGES_TXT).is_file():
        byte_level = _from_vocab_and_merges(source, settings)
        if byte_level is None:
            return False
        tokenizer = byte_level
    else:
        return False
    with (out_dir / TOKENIZER_JSON).open("w", encoding="utf-8") as file:
        file.write(tokenizer.to_str())
        file.flush()
        os.fsync(file.fileno())
    return True


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the files beside the vocabulary say.

    Attributes:
        path: The directory, for errors.
        config: tokenizer_config.json.
        tokenizer_class: Without ``Fast``; None where nothing tells it.
        named: Name such as ``bos_token`` -> token; None for one that there shall not be.
        extra: More special tokens.
        added: Id -> token, of those whose id is told.
    """

    path: Path
    config: Mapping[str, Any]
    tokenizer_class: str | None
    named: Mapping[str, AddedToken | None]
    extra: tuple[AddedToken, ...] = ()
    added: Mapping[int, AddedToken] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Path) -> _Settings:
        """Read them as transformers does: added_tokens_decoder stands for two older files."""
        path = source / TOKENIZER_CONFIG
        config = _optional_json(path)
        tokenizer_class = config.get("tokenizer_class")
        if tokenizer_class is None:
            model_type = _optional_json(source / CONFIG_FILE).get("model_type")
            tokenizer_class = _BYTE_LEVEL_MODEL_TYPES.get(str(model_type))
        tokens = dict(config)
        added: dict[int, AddedToken] = {}
        try:
            if "added_tokens_decoder" in config:
                for token_id, token in config["added_tokens_decoder"].items():
                    added[int(token_id)] = _added_token(token, special=False)
            else:
                path = source / "special_tokens_map.json"
                tokens |= _optional_json(path)
            named = {
                name: None if value is None else _added_token(value, special=True)
                for name, value in tokens.items()
                if name.endswith("_token") and not isinstance(value, bool)
            }
            key = "extra_special_tokens" if tokens.get("extra_special_tokens") else None
            extra = tokens.get(key or "additional_special_tokens") or []
            values = extra.values() if isinstance(extra, Mapping) else extra
            more = tuple(_added_token(value, special=True) for value in values)
            if "added_tokens_decoder" not in config:
                special = {token.content for token in (*named.values(), *more) if token}
                path = source / "added_tokens.json"
                for content, token_id in _optional_json(path).items():
                    added[int(token_id)] = AddedToken(
                        content, special=content in special, normalized=content not in special
                    )
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} has no well-formed added tokens: {error}") from error
        tokenizer_class = tokenizer_class and str(tokenizer_class).removesuffix("Fast")
        return cls(source, config, tokenizer_class, named, more, added)

    def flag(self, name: str, default: bool) -> bool:
        """A true or false of tokenizer_config.json; null counts as absent."""
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(
                f"{self.path / TOKENIZER_CONFIG}: {name} is {value!r}; it must be true or false"
            )
        return value


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except CheckpointNotFoundError:
        return {}


def _added_token(value: object, *, special: bool) -> AddedToken:
    """A token from its string, or from an object with ``content`` and flags.

    Raises:
        TypeError: It is neither, or a flag is none.
    """
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise TypeError(f"{value!r} is no token")
    flags = {
        name: value[name]
        for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
        if name in value
    }
    return AddedToken(value["content"], **({"special": special} | flags))


def _from_sentencepiece(path: Path, settings: _Settings) -> Tokenizer:
    if settings.tokenizer_class not in (None, *_SENTENCEPIECE_CLASSES, *_GENERIC_CLASSES):
        logger.warning(
            "%s: tokenizer_class %s is not known; tokenizer.json follows %s alone",
            settings.path,
            settings.tokenizer_class,
            TOKENIZER_MODEL,
        )
    model = read_sentencepiece(path)
    added = _added_tokens(model, settings)
    model = replace(model, pieces=_named_by_configuration(model.pieces, added))
    try:
        tokenizer = Tokenizer(_bpe(path, model) if model.algorithm == BPE else _unigram(model))
        _set_text_pipeline(tokenizer, model, settings)
    except CheckpointError:
        raise
    # The library raises bare Exception for whatever is wrong in what it is given.
    except Exception as error:
        raise CheckpointError(f"{path} makes no tokenizer: {error}") from error
    named = {
        "bos_token": _existing(model, model.bos_piece),
        "eos_token": _existing(model, model.eos_piece),
        **settings.named,
    }
    settings = replace(settings, named=named)
    _add_tokens(tokenizer, settings, added)
    _set_post_processor(tokenizer, settings, add_bos_default=True)
    return tokenizer


def _existing(model: SentencePieceModel, text: str) -> AddedToken | None:
    found = any(piece.text == text and piece.kind == CONTROL for piece in model.pieces)
    return AddedToken(text, special=True, normalized=False) if found else None


def _added_tokens(model: SentencePieceModel, settings: _Settings) -> dict[int, AddedToken]:
    """The configuration's tokens, and the pieces that are no text: added tokens to transformers.

    Sentencepiece finds user-defined pieces in the normalised text, where a space is ``▁``. So do
    these, whatever the configuration says.
    """
    tokens = dict(settings.added)
    for token_id, piece in enumerate(model.pieces):
        told = tokens.get(token_id)
        if piece.kind == USER_DEFINED:
            # Where runs of spaces are made one, there is nothing to find.
            spaces = (
                _SPACE in piece.text
                and not model.remove_extra_whitespaces
                and (told is None or told.content == piece.text)
            )
            if told is None or spaces:
                special = piece.text in _SPECIAL_USER_DEFINED
                tokens[token_id] = AddedToken(piece.text, special=special, normalized=spaces)
        elif piece.kind in (UNKNOWN, CONTROL) and told is None:
            tokens[token_id] = AddedToken(piece.text, special=True, normalized=False)
    return tokens


def _named_by_configuration(
    pieces: tuple[Piece, ...], added: Mapping[int, AddedToken]
) -> tuple[Piece, ...]:
    """The vocabulary in which an added token has taken over the id of another piece."""
    return tuple(
        Piece(
            added[token_id].content,
            piece.score,
            USER_DEFINED if piece.kind == NORMAL else piece.kind,
        )
        if token_id in added and added[token_id].content != piece.text
        else piece
        for token_id, piece in enumerate(pieces)
    )


def _bpe(path: Path, model: SentencePieceModel) -> models.BPE:
    pieces = _with_reachable_characters(path, model)
    normal = {piece.text for piece in pieces if piece.kind == NORMAL}
    (unknown,) = (piece.text for piece in model.pieces if piece.kind == UNKNOWN)
    return models.BPE(
        vocab={piece.text: token_id for token_id, piece in enumerate(pieces)},
        merges=_merges(path, pieces, normal),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=model.byte_fallback,
    )


def _with_reachable_characters(path: Path, model: SentencePieceModel) -> list[Piece]:
    """Pieces in which a character that only longer pieces have stands for its byte.

    Sentencepiece merges any characters, the tokenizers library only those of the vocabulary. Gemma
    1 has pieces of several tabs and none of one: a tab is the byte piece ``<0x09>`` there.
    """
    pieces = list(model.pieces)
    normal = [piece.text for piece in pieces if piece.kind == NORMAL]
    known = {piece.text for piece in pieces if len(piece.text) == 1}
    lacking = {char for text in normal for char in text} - known
    places = {piece.text: token_id for token_id, piece in enumerate(pieces)}
    for char in sorted(lacking):
        place = places.get(f"<0x{ord(char):02X}>") if char.isascii() else None
        if place is not None and model.byte_fallback:
            pieces[place] = Piece(char)
            lacking.discard(char)
    if lacking:
        logger.warning(
            "%s has pieces with characters that are no pieces (%r first): tokenizer.json will not "
            "produce them",
            path,
            min(lacking),
        )
    return pieces


def _merges(path: Path, pieces: Iterable[Piece], normal: set[str]) -> list[tuple[str, str]]:
    """All ways to make a piece of two, the best score first.

    Sentencepiece merges the pair whose piece has the best score, of equal ones the leftmost; the
    tokenizers library goes by the order of pairs. That is the same where no two pieces have the
    same score.
    """
    ordered = sorted(
        (piece for piece in pieces if piece.kind == NORMAL and len(piece.text) > 1),
        key=lambda piece: -piece.score,
    )
    ties = len(ordered) - len({piece.score for piece in ordered})
    if ties:
        logger.warning(
            "%s has %d pieces with the score of another: where such pieces overlap in a text, "
            "tokenizer.json may choose differently from sentencepiece",
            path,
            ties,
        )
    merges = []
    for piece in ordered:
        text = piece.text
        pairs = ((text[:i], text[i:]) for i in range(1, len(text)))
        merges += [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
    return merges


def _unigram(model: SentencePieceModel) -> models.Unigram:
    vocab = [
        (piece.text, piece.score if piece.kind == NORMAL else _NEVER) for piece in model.pieces
    ]
    unknown = [piece.kind for piece in model.pieces].index(UNKNOWN)
    return models.Unigram(vocab, unknown, model.byte_fallback)


def _set_text_pipeline(
    tokenizer: Tokenizer, model: SentencePieceModel, settings: _Settings
) -> None:
    """Normaliser, prefix and decoder."""
    prefix = settings.flag("add_prefix_space", model.add_dummy_prefix)
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        steps.append(normalizers.Precompiled(model.charsmap))
    inner_space: str | Regex = " "
    if model.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"[ {_SPACE}]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
        if prefix:
            inner_space = Regex(r"(?!\A) ")  # one at the start of the text is the prefix
        else:
            steps.append(normalizers.Replace(Regex(r"\A "), ""))
    steps.append(normalizers.Replace(inner_space, _SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    if prefix:
        # Metaspace puts its character only before a text that does not begin with it. The
        # normaliser has made ▁ of the text's own spaces: this way the prefix comes before them.
        scheme = "always" if settings.flag("legacy", True) else "first"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
                pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False),
            ]
        )
    decoding: list[decoders.Decoder] = [decoders.Replace(_SPACE, " ")]
    if model.byte_fallback:
        decoding.append(decoders.ByteFallback())
    decoding.append(decoders.Fuse())
    if prefix:
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)


def _from_vocab_and_merges(source: Path, settings: _Settings) -> Tokenizer | None:
    if settings.tokenizer_class not in _BYTE_LEVEL_MODEL_TYPES.values():
        logger.warning(
            "%s has %s and %s, but tokenizer_class %s does not say how text is cut: no "
            "tokenizer.json is written; save one with transformers' save_pretrained",
            source,
            VOCAB_JSON,
            MERGES_TXT,
            settings.tokenizer_class,
        )
        return None
    try:
        tokenizer = Tokenizer(
            models.BPE.from_file(str(source / VOCAB_JSON), str(source / MERGES_TXT))
        )
    # The library raises bare Exception for whatever is wrong in the files.
    except Exception as error:
        raise CheckpointError(f"{source / VOCAB_JSON} or {MERGES_TXT}: {error}") from error
    prefix = settings.flag("add_prefix_space", False)
    if settings.tokenizer_class == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN2_PATTERN), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    default = AddedToken(_BYTE_LEVEL_DEFAULT_TOKEN, special=True, normalized=False)
    defaults = dict.fromkeys(("unk_token", "eos_token"), default)
    if settings.tokenizer_class == "GPT2Tokenizer":
        defaults["bos_token"] = default
    settings = replace(settings, named={**defaults, **settings.named})
    _add_tokens(tokenizer, settings, dict(settings.added))
    _set_post_processor(tokenizer, settings, add_bos_default=False)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, settings: _Settings, added: dict[int, AddedToken]) -> None:
    """Add the tokens with their ids, and behind them special ones that are named without an id."""
    by_content = {token.content: token for token in added.values()}
    new = []
    for token in (*settings.named.values(), *settings.extra):
        if token is None:
            continue
        if token.content not in by_content:
            by_content[token.content] = token
            new.append(token)
        by_content[token.content].special = True
    tokenizer.add_tokens([token for _, token in sorted(added.items(), key=lambda item: item[0])])
    tokenizer.add_tokens(new)
    for token_id, token in added.items():
        if (got := tokenizer.token_to_id(token.content)) != token_id:
            raise CheckpointError(
                f"{settings.path}: the added token {token.content!r} has id {token_id}, where the "
                f"vocabulary gives it {got}: ids of added tokens must follow the vocabulary's"
            )


def _set_post_processor(
    tokenizer: Tokenizer, settings: _Settings, *, add_bos_default: bool
) -> None:
    """Put BOS before and EOS behind a text, where the configuration asks for them."""
    sides = []
    for side, default in (("bos", add_bos_default), ("eos", False)):
        token = settings.named.get(f"{side}_token")
        wanted = settings.flag(f"add_{side}_token", default)
        sides.append([token.content] if wanted and token is not None else [])
    before, behind = sides
    if not before and not behind:
        return
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *behind],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *behind}],
    )
