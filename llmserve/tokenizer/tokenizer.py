"""A model's tokenizer, read from the files that travel with every artefact.

``tokenizer.json`` says how text becomes ids; ``tokenizer_config.json`` names the special tokens and
may hold the chat template, which ``chat_template.jinja`` overrides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from llmserve.checkpoint.config_file import read_json_object
from llmserve.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    InvalidRequestError,
    UnsupportedCheckpointError,
)
from llmserve.tokenizer.chat_template import ChatTemplate, Message
from llmserve.tokenizer.detokenizer import IncrementalDetokenizer
from llmserve.tokenizer.token_bytes import TokenBytes

# The names under which Hugging Face's files give special tokens, and templates ask for them.
_SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# More than what the beginning of a text can have in tokens that the whole text has not: those of
# the word that is cut where the beginning ends.
_TOKENS_OF_CUT_WORD = 256
_CHARS_PER_TOKEN = 8  # more than most texts have


class Tokenizer:
    """Text to token ids, chats to token ids, token ids to text.

    Attributes:
        special_tokens: Name such as ``eos_token`` -> the token's string.
        special_token_ids: Ids that ``skip_special_tokens`` leaves out of a text.
        chat_templates: Name -> template; the usual one is called ``default``.
        strip_left: A character that the encoding puts before a text and decoding takes away
            again, and how many of it: (" ", 1) in sentencepiece's manner, ("", 0) for none.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        # A length limit or padding in the file is a matter of training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.special_tokens = dict(special_tokens or {})
        self.special_token_ids = self._register_special_tokens()
        self.chat_templates = {
            name: ChatTemplate(source, self.special_tokens)
            for name, source in (chat_templates or {}).items()
        }
        self._to_bytes = TokenBytes.from_decoder(json.loads(tokenizer.to_str())["decoder"])
        self.strip_left = self._to_bytes.strip_left
        self._bytes_by_id: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read the tokenizer of an HF checkpoint, a TensorRT-LLM checkpoint or an engine.

        Raises:
            CheckpointNotFoundError: There is no tokenizer.json.
            CheckpointError: A file cannot be read.
            UnsupportedCheckpointError: A tokenizer of a kind that is not implemented.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointNotFoundError(
                f"{directory} has no tokenizer.json; save the tokenizer there with "
                "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # The library raises bare Exception for whatever is wrong in the file.
        except Exception as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        config = read_optional_json(directory / "tokenizer_config.json")
        # Older checkpoints name the special tokens in a file of their own.
        special_tokens_map = read_optional_json(directory / "special_tokens_map.json")
        try:
            return cls(
                tokenizer,
                special_tokens=_special_tokens({**special_tokens_map, **config}),
                chat_templates=_chat_templates(directory, config),
            )
        except CheckpointError as error:
            raise type(error)(f"{directory}: {error}") from error

    def _register_special_tokens(self) -> frozenset[int]:
        """Make sure that the named special tokens are ones to the encoder too."""
        known = [
            token
            for token in dict.fromkeys(self.special_tokens.values())
            if self._tokenizer.token_to_id(token) is not None
        ]
        self._tokenizer.add_special_tokens(known)
        added = self._tokenizer.get_added_tokens_decoder()
        return frozenset(
            token_id for token_id, token in added.items() if token.special or token.content in known
        )

    @property
    def vocab_size(self) -> int:
        """Tokens with added ones; a model may have more rows than that in its embedding."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token."""
        return self._named_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token of tokenizer_config.json. Generation ends at those of
        GenerationConfig, which may be more."""
        return self._named_id("eos_token")

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Special tokens written in the text are read as such.

        Args:
            text: Any text.
            add_special_tokens: Let the tokenizer add its own, BOS in most cases. False for a
                rendered chat template, which has written them all.

        Raises:
            InvalidRequestError: The text holds half of a surrogate pair, which is no character.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            if not isinstance(text, str):
                raise
            raise InvalidRequestError(
                "the text holds a lone surrogate, which is no Unicode character", param="prompt"
            ) from error

    def num_tokens_at_least(self, text: str, enough: int) -> int:
        """A number of tokens that a text has at least, told without encoding much more than
        ``enough`` of them: encoding takes seconds and gigabytes for texts of megabytes.

        Args:
            text: Any text.
            enough: Stop counting beyond this.

        Returns:
            More than ``enough`` for a text that certainly has more, else a lower bound, which is 0
            for a text that is short enough to be encoded at once.
        """
        num_chars = _CHARS_PER_TOKEN * (enough + _TOKENS_OF_CUT_WORD)
        at_least = 0
        while at_least <= enough and num_chars < len(text):
            num_tokens = len(self.encode(text[:num_chars], add_special_tokens=False))
            at_least = max(num_tokens - _TOKENS_OF_CUT_WORD, 0)
            num_chars *= 2
        return at_least

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Turn token ids into text.

        The bytes of all tokens, read as UTF-8 with U+FFFD for what is none: what the tokenizers
        library gives too, but for byte-fallback tokens that are no UTF-8, where the library
        gives up the valid characters beside them. Ids that are no tokens (a model may have more)
        give nothing. Spaces are never cleaned up.
        """
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()

    def token_to_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, perhaps part of a character; b"" for no token."""
        cached = self._bytes_by_id.get(token_id)
        if cached is None:
            token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
            cached = b"" if token is None else self._to_bytes(token)
            self._bytes_by_id[token_id] = cached
        return cached

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a chat as text with the model's template; see ``ChatTemplate.render``.

        Of several templates ``tool_use`` is taken where there are tools, else ``default``.

        Raises:
            InvalidRequestError: The model has no template, or the template refuses the messages.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.chat_templates else "default"
        template = self.chat_templates.get(name)
        if template is None:
            raise InvalidRequestError(
                "the model has no chat template; send the whole prompt to /v1/completions",
                param="messages",
            )
        return template.render(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids of ``render_chat``; the template's BOS gets no second one beside it."""
        text = self.render_chat(
            messages,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        try:
            return self.encode(text, add_special_tokens=False)
        except InvalidRequestError as error:
            raise InvalidRequestError(str(error), param="messages") from error


def read_optional_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no file.

    Raises:
        CheckpointError: The file is no JSON object.
    """
    try:
        return read_json_object(path)
    except CheckpointNotFoundError:
        return {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; each is a string, or an object with it under ``content``."""
    tokens = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
        elif value is not None:
            raise CheckpointError(f"tokenizer_config.json: {name} is {value!r}; it must be a token")
    return tokens


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Template sources by name. Files beside tokenizer_config.json win over what is in it."""
    in_config = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(in_config, str):
        templates["default"] = in_config
    elif isinstance(in_config, list):
        templates.update({entry["name"]: entry["template"] for entry in in_config})
    elif in_config is not None:
        raise UnsupportedCheckpointError(
            "tokenizer_config.json: chat_template must be a string or a list of named templates"
        )
    file = directory / "chat_template.jinja"
    if file.is_file():
        templates = {"default": file.read_text(encoding="utf-8")}
        more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        templates.update({path.stem: path.read_text(encoding="utf-8") for path in more})
    return templates
