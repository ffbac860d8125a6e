"""Chat templates: messages to the text of a prompt, as Hugging Face's ``apply_chat_template``.

Templates come with checkpoints and messages from clients, so they run in Jinja's sandbox and see
nothing but JSON values. The sandbox keeps a template from reading or calling what is outside; it
does not limit time or memory: serve templates whose authors you trust with those.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from llmserve.errors import CheckpointError, InvalidRequestError

# What a JSON body holds.
Message = Mapping[str, Any]

# Marks where the text to continue ends in the rendered prompt. The space at its end tells whether
# the template trims messages: it is gone then. The words are those of Hugging Face, so that
# templates which look for them work.
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
# Names under which a message's reasoning is sent; templates read the first one or the second.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja, as in ``chat_template.jinja`` or tokenizer_config.json.
        special_tokens: Names and strings that the template may use, such as ``bos_token``.

    Raises:
        CheckpointError: The source is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(
                f"the chat template has an error in line {error.lineno}: {error.message}"
            ) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Write messages as one prompt.

        Args:
            messages: Objects with a ``role``; keys whose value is None count as absent.
            tools: JSON schemas of functions the model may call.
            documents: Objects with ``title`` and ``text`` for retrieval.
            add_generation_prompt: End with the header of an assistant's message.
            continue_final_message: Leave the last message open, so that the model goes on with it.
            template_kwargs: More variables for the template; they win over special tokens.

        Returns:
            The text, with all special tokens in it: encode it with add_special_tokens=False.

        Raises:
            InvalidRequestError: The template refuses these messages or fails on them, or the
                arguments exclude each other.
        """
        if not messages:
            raise InvalidRequestError("messages is empty", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                param="continue_final_message",
            )
        chat = [_normalise(message) for message in messages]
        final_text = _mark_final_message(chat) if continue_final_message else ""
        variables = {
            **self._special_tokens,
            **_without_reserved(template_kwargs or {}),
            "messages": chat,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text = self._template.render(variables)
        except SecurityError as error:
            raise InvalidRequestError(
                f"the chat template tried what the sandbox forbids: {error}", param="messages"
            ) from error
        except jinja2.TemplateError as error:
            raise InvalidRequestError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from error
        # The template is a program fed with the client's data: whatever else it raises (a
        # TypeError over content of another kind, deep recursion) is this request's error too.
        except Exception as error:
            raise InvalidRequestError(
                f"the chat template fails on these messages: {type(error).__name__}: {error}",
                param="messages",
            ) from error
        return _cut_at_mark(text, final_text) if continue_final_message else text


def _without_reserved(template_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        if name in template_kwargs:
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {name}; it has a field of its own",
                param="chat_template_kwargs",
            )
    return template_kwargs


def _normalise(message: Message) -> dict[str, Any]:
    """A copy without null fields (``content: null`` would be written out as None by many
    templates), with reasoning under every name that templates read."""
    chat_message = {key: value for key, value in message.items() if value is not None}
    for key in _REASONING_KEYS:
        if key in chat_message:
            reasoning = chat_message[key]
            return {"thinking": reasoning, **chat_message, "reasoning_content": reasoning}
    return chat_message


def _mark_final_message(chat: list[dict[str, Any]]) -> str:
    """Put the mark behind the last text of the last message; return that text."""
    content = chat[-1].get("content")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_MARK
        return content
    if isinstance(content, list):
        for i in reversed(range(len(content))):
            if isinstance(content[i], Mapping) and isinstance(content[i].get("text"), str):
                text: str = content[i]["text"]
                part = {**content[i], "text": text + _CONTINUE_MARK}
                chat[-1]["content"] = [*content[:i], part, *content[i + 1 :]]
                return text
    raise InvalidRequestError(
        "continue_final_message needs a final message with text", param="continue_final_message"
    )


def _cut_at_mark(text: str, final_text: str) -> str:
    mark = _CONTINUE_MARK.rstrip()
    position = text.rfind(mark)
    if position < 0 or final_text.strip() not in text:
        raise InvalidRequestError(
            "continue_final_message: the chat template leaves the final message out",
            param="continue_final_message",
        )
    if text.startswith(_CONTINUE_MARK, position):
        return text[:position]
    return text[:position].rstrip()


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it an instance variable)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_render_body")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _render_body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's ``namespace`` without names that reach into Python's objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No name for self, so that a template may set an attribute of that name.
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _check_public(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: it begins with an underscore")


class _DictFunction:
    """``dict(...)`` and ``dict.fromkeys(...)``, without the rest of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes <, > and & for web pages."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    environment.globals["dict"] = _DictFunction()
    return environment
