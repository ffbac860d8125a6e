"""What clients send: the bodies of ``/v1/completions`` and ``/v1/chat/completions``, validated.

Owns names, types and ranges of the fields, and the one table of fields that are known but not
implemented. It knows neither the model (its context, vocabulary and template) nor HTTP.

A field is implemented, or its presence is an error that names it: unknown fields are refused, and
those of ``NOT_IMPLEMENTED`` are refused unless null or neutral. JSON types are strict: ``"0.5"`` is
no number and ``true`` no integer. ``null`` always means "as if it were not there".
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    JsonValue,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from llmserve.core.request import MAX_PRIORITY
from llmserve.core.sampling_params import GuidedDecodingParams
from llmserve.errors import InvalidRequestError

MAX_LOGPROBS = 20
"""Most alternatives per token that a request may ask for: OpenAI's own limit for chat."""
MAX_CHOICES = 2048
"""Most answers of one HTTP request, prompts times n."""
MAX_STOPS = 64
"""Most stop strings, and most stop tokens, of a request."""
MAX_STOP_CHARS = 1024
"""Longest stop string: what each answer has to be searched for costs time and memory."""
MAX_BIASED_TOKENS = 1024
"""Most tokens in ``logit_bias``: they are kept for every answer and applied in every step."""
MAX_CHOICE_STRINGS = 1024
"""Most strings of ``guided_choice``."""
MAX_TIMEOUT_S = 1e9
"""Longest ``timeout``: some thirty years, which every clock can count."""

_INT32 = 2**31 - 1
# How pydantic begins a sentence about a value.
_SUBJECT = re.compile(r"^(?:Input|List|Dictionary|String|Value) should (be|have|match)")
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_SCHEMA_NAME = r"^[a-zA-Z0-9_-]{1,64}$"  # OpenAI's
_PARAM_CHARS = 200  # of a field's path in an error; unknown fields have any length

NOT_IMPLEMENTED: dict[str, tuple[JsonValue, ...]] = {
    # field: the values, besides null, that ask for nothing
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": (),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": (),
}
_NOT_IMPLEMENTED_IN_MESSAGES: dict[str, tuple[JsonValue, ...]] = {
    # What an assistant message of an earlier answer brings back.
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}
_NOT_IMPLEMENTED_IN_STREAM_OPTIONS: dict[str, tuple[JsonValue, ...]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (True, False),  # padding against traffic analysis: a hint, not a result
}


def _encodable(text: str) -> str:
    """Refuse lone surrogates: JSON can spell them, no tokenizer can read them."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it must be valid Unicode, without lone surrogates") from None
    return text


def _plain_json(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # UnicodeEncodeError is one
        raise ValueError("it must hold finite numbers and valid Unicode alone") from None
    return value


def _parse_logit_bias(value: object) -> dict[int, float]:
    """JSON has strings alone for keys: ``{"1234": -100}``."""
    if not isinstance(value, dict):
        raise ValueError("it must be an object of token ids and what is added to their logits")
    if len(value) > MAX_BIASED_TOKENS:
        raise ValueError(f"it must have at most {MAX_BIASED_TOKENS} token ids, not {len(value)}")
    biases = {}
    for key, bias in value.items():
        if _TOKEN_ID.fullmatch(key) is None or int(key) > _INT32:
            raise ValueError(f"its keys must be token ids, and {_quote(key)} is none")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:  # NaN is not either
            raise ValueError(f"the bias of {key} is {_quote(bias)}; it must be in [-100, 100]")
        biases[int(key)] = float(bias)
    return biases


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_encodable)]
_Stop = Annotated[str, Field(max_length=MAX_STOP_CHARS), AfterValidator(_encodable)]
_TokenId = Annotated[int, Field(ge=0, le=_INT32)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_JsonObject = Annotated[dict[str, JsonValue], AfterValidator(_plain_json)]
_Metadata = Annotated[
    # OpenAI's limits.
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
TokenIds = list[int]
_Choice = Annotated[Text, Field(min_length=1)]
_GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


def _as_schema_text(value: object) -> str:
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, dict):
        return json.dumps(_plain_json(value))
    raise ValueError("it must be a JSON schema: an object, or its text")


def _parse_prompts(value: object) -> list[str | TokenIds]:
    """Bring the four forms of ``prompt`` into one: a list of strings and token-id lists.

    The error that pydantic gives for a union lists the failures of all its members; this one
    says what is wrong.
    """
    if isinstance(value, str):
        prompts: list[object] = [value]
    elif isinstance(value, list) and value and type(value[0]) is int:
        prompts = [value]
    elif isinstance(value, list):
        prompts = value
    else:
        raise ValueError("it must be a string, a list of strings, token ids or lists of token ids")
    if not 1 <= len(prompts) <= MAX_CHOICES:
        raise ValueError(f"it must hold between 1 and {MAX_CHOICES} prompts, not {len(prompts)}")
    return [_parse_prompt(prompt, index) for index, prompt in enumerate(prompts)]


def _parse_prompt(prompt: object, index: int) -> str | TokenIds:
    if isinstance(prompt, str):
        return _encodable(prompt)
    if not isinstance(prompt, list):
        raise ValueError(f"prompt {index} must be a string or a list of token ids")
    if not prompt:
        raise ValueError(f"prompt {index} must have at least one token")
    for token_id in prompt:
        if type(token_id) is not int or not 0 <= token_id <= _INT32:
            raise ValueError(f"prompt {index} must hold token ids alone, not {_quote(token_id)}")
    return prompt


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    """How a stream is sent.

    Attributes:
        include_usage: One more chunk at the end, with the token counts.
    """

    include_usage: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: object) -> object:
        return _without_neutral(value, _NOT_IMPLEMENTED_IN_STREAM_OPTIONS)


class JsonSchemaFormat(_Body):
    """The schema of a ``response_format``.

    Attributes:
        name: The client's name for it; nothing depends on it.
        description: Likewise.
        schema_: ``schema`` in JSON.
        strict: An answer always matches, so that false, "try to", asks for no less.
    """

    name: Annotated[str, Field(pattern=_SCHEMA_NAME)]
    description: Text | None = None
    schema_: Annotated[_JsonObject, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(_Body):
    """What an answer has to be.

    Attributes:
        type: Any text, any JSON object, or JSON that matches a schema.
        json_schema: Only with that type, and then required.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            message = "response_format.json_schema is required with type 'json_schema'"
            raise _fault("json_schema", message, "missing_field")
        if self.type != "json_schema" and self.json_schema is not None:
            message = f"response_format.json_schema is not allowed with type {self.type!r}"
            raise _fault("json_schema", message)
        return self


class GenerationRequest(_Body):
    """The fields that both kinds of request have. None takes the model's or OpenAI's default.

    Attributes:
        model: A name that ``/v1/models`` lists.
        stream: Answer with server-sent events.
        stream_options: Only with ``stream``.
        n: How many answers.
        stop: Strings that end an answer.
        stop_token_ids: Tokens that end an answer, besides the model's own.
        include_stop_str_in_output: Leave the stop string in the text.
        seed: Makes the answer repeatable.
        temperature, top_p, top_k, min_p: Sampling; top_k 0 and -1 mean off.
        frequency_penalty, presence_penalty, repetition_penalty: As SamplingParams has them.
        max_tokens: Most tokens of an answer.
        min_tokens: Fewest, as SamplingParams has it.
        logit_bias: Token id -> what is added to its logit.
        prompt_logprobs: How many of the likeliest tokens to report per token of the prompt.
        response_format: What an answer has to be.
        guided_json, guided_regex, guided_choice, guided_grammar: At most one of them: a schema, as
            an object or as text, a regular expression, strings or a grammar that it must match.
        cache_salt: Prompts share their KV cache under the same salt only.
        priority: Lower starts earlier.
        timeout: Seconds after which the request fails.
        ignore_eos: Go on past the model's end-of-sequence tokens.
        skip_special_tokens: Leave special tokens out of the text.
        truncate_prompt_tokens: Keep this many last tokens of a prompt.
        return_token_ids: Send the token ids of prompt and answer along.
        user, metadata: Not interpreted; they go to the log.
        store, service_tier, prompt_cache_key, safety_identifier: Sent by OpenAI's SDKs; advisory.
    """

    model: Text
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Annotated[list[_Stop], BeforeValidator(_as_list), Field(max_length=MAX_STOPS)] | None = (
        None
    )
    stop_token_ids: Annotated[list[_TokenId], Field(max_length=MAX_STOPS)] | None = None
    include_stop_str_in_output: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    logit_bias: Annotated[dict[int, float], PlainValidator(_parse_logit_bias)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    guided_json: Annotated[str, BeforeValidator(_as_schema_text)] | None = None
    guided_regex: Text | None = None
    guided_choice: Annotated[list[_Choice], Field(min_length=1, max_length=MAX_CHOICE_STRINGS)] | (
        None
    ) = None
    guided_grammar: Text | None = None
    cache_salt: Annotated[Text, Field(min_length=1, max_length=1024)] | None = None
    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    return_token_ids: bool | None = None
    user: Text | None = None
    metadata: _Metadata | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def guided_decoding(self) -> tuple[str, GuidedDecodingParams] | None:
        """The field that says what an answer must match, and what that is; None for anything."""
        if self.guided_json is not None:
            return "guided_json", GuidedDecodingParams(json=self.guided_json)
        if self.guided_regex is not None:
            return "guided_regex", GuidedDecodingParams(regex=self.guided_regex)
        if self.guided_choice is not None:
            return "guided_choice", GuidedDecodingParams(choice=tuple(self.guided_choice))
        if self.guided_grammar is not None:
            return "guided_grammar", GuidedDecodingParams(grammar=self.guided_grammar)
        if self.response_format is None or self.response_format.type == "text":
            return None
        if (asked := self.response_format.json_schema) is not None:
            return "response_format", GuidedDecodingParams(json=json.dumps(asked.schema_))
        return "response_format", GuidedDecodingParams(json_object=True)

    @model_validator(mode="after")
    def _check_together(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise _fault("stream_options", "stream_options is only allowed with stream")
        if self.prompt_logprobs is not None and self.stream:
            raise _fault("prompt_logprobs", "prompt_logprobs is not allowed with stream")
        guides = [name for name in _GUIDES if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            guides.append("response_format")
        if len(guides) > 1:
            raise _fault(guides[0], f"{' and '.join(guides)} exclude each other; give one of them")
        return self


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``.

    Attributes:
        prompt: One or several texts or token-id lists; whatever form came in, a list of prompts.
        logprobs: How many of the likeliest tokens to report per position, besides the drawn one.
        echo: Begin each answer with its prompt; with ``logprobs``, with the prompt's too.
        best_of: Only ``n`` of it: no ranking is implemented.
        add_special_tokens: Let the tokenizer add its own (BOS) to prompts given as text.
    """

    prompt: Annotated[list[str | TokenIds], PlainValidator(_parse_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        n = self.n or 1
        if self.best_of is not None and self.best_of != n:
            raise _fault(
                "best_of", f"best_of is {self.best_of}; only n ({n}) is implemented", "unsupported"
            )
        if len(self.prompt) * n > MAX_CHOICES:
            raise _fault(
                "n",
                f"{len(self.prompt)} prompts with n {n} make {len(self.prompt) * n} answers; "
                f"the limit is {MAX_CHOICES}",
            )
        return self


def _join_parts(content: object) -> object:
    """Content parts become one text, a line each, as templates for plain text expect."""
    if not isinstance(content, list):
        return content
    texts = []
    for index, part in enumerate(content):
        match part:
            case {"type": "text", "text": str(text)} if len(part) == 2:
                texts.append(text)
            case _:
                raise ValueError(
                    f'part {index} must be {{"type": "text", "text": "..."}}; '
                    "other kinds of content are not implemented yet"
                )
    return "\n".join(texts)


class ChatMessage(_Body):
    """One message.

    Attributes:
        role: Who speaks.
        content: Text. Text parts arrive joined by line ends; null is allowed for the assistant.
        name: The speaker's name, for templates that use it.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text | None, BeforeValidator(_join_parts)] = None
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: object) -> object:
        return _without_neutral(value, _NOT_IMPLEMENTED_IN_MESSAGES)

    @model_validator(mode="after")
    def _check(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise _fault("content", f"a {self.role} message must have content")
        return self

    def for_template(self) -> dict[str, str]:
        """The message as chat templates see it."""
        message = {"role": self.role, "content": self.content or ""}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatCompletionRequest(GenerationRequest):
    """The body of ``/v1/chat/completions``.

    Attributes:
        messages: The conversation.
        logprobs: Report the log-probability of each token.
        top_logprobs: And of so many likeliest ones; only with ``logprobs``.
        max_completion_tokens: OpenAI's newer name of max_tokens.
        add_generation_prompt: End the prompt with the assistant's header. Default true.
        continue_final_message: Leave the last message open, so that the answer continues it.
        chat_template_kwargs: More variables for the template.
    """

    messages: Annotated[list[ChatMessage], FailFast(), Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: _JsonObject | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise _fault("top_logprobs", "top_logprobs is only allowed with logprobs: true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise _fault(
                "max_tokens",
                f"max_tokens is {self.max_tokens} and max_completion_tokens "
                f"{self.max_completion_tokens}; give one of them",
            )
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise _fault(
                    "continue_final_message",
                    "continue_final_message and add_generation_prompt exclude each other",
                )
            if self.messages[-1].role != "assistant":
                raise _fault(
                    "continue_final_message",
                    "continue_final_message needs an assistant message at the end of messages",
                )
        return self


BodyT = TypeVar("BodyT", bound=BaseModel)


def parse_request(model: type[BodyT], body: object) -> BodyT:
    """Validate a decoded JSON body.

    Raises:
        InvalidRequestError: Names the first field at fault, its value and what is allowed.
    """
    try:
        return model.model_validate(_without_neutral(body, NOT_IMPLEMENTED))
    except ValidationError as error:
        raise _first_fault(error.errors(include_url=False)[0]) from None


def _first_fault(fault: ErrorDetails) -> InvalidRequestError:
    kind, message = fault["type"], fault["msg"]
    param = _path(fault["loc"])
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):  # pydantic wraps what its validators raise
        inner = cause.param or ""
        return InvalidRequestError(
            str(cause), param=f"{param}.{inner}" if param else inner, code=cause.code
        )
    name = param or "the body"
    if kind == "extra_forbidden":
        return InvalidRequestError(
            f"{name} is not a field of this request", param=param, code="unknown_field"
        )
    if kind == "missing":
        return InvalidRequestError(f"{name} is required", param=param, code="missing_field")
    if kind == "model_type" and not param:
        return InvalidRequestError("the body must be a JSON object", code="invalid_value")
    if kind == "model_type":
        message = "it must be an object"
    message = _SUBJECT.sub(r"it must \1", message.removeprefix("Value error, "))
    message = message.replace(" after validation", "")
    return InvalidRequestError(
        f"{name} is {_quote(fault['input'])}; {message}",
        param=param or None,
        code="invalid_value",
    )


def _path(loc: tuple[str | int, ...]) -> str:
    """``('messages', 0, 'content')`` as ``messages[0].content``."""
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path if len(path) <= _PARAM_CHARS else f"{path[:_PARAM_CHARS]}..."


def _without_neutral(value: object, not_implemented: Mapping[str, tuple[JsonValue, ...]]) -> object:
    """Drop the fields of the table that ask for nothing, refuse those that ask for something."""
    if not isinstance(value, dict) or not_implemented.keys().isdisjoint(value):
        return value
    kept = {}
    for name, given in value.items():
        if name not in not_implemented:
            kept[name] = given
        elif given is not None and not any(
            # 0 == False in Python, not in JSON
            type(given) is type(neutral) and given == neutral
            for neutral in not_implemented[name]
        ):
            raise _fault(
                name, f"{name} is {_quote(given)}; it is not implemented yet", "unsupported"
            )
    return kept


def _fault(param: str, message: str, code: str = "invalid_value") -> InvalidRequestError:
    return InvalidRequestError(message, param=param, code=code)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def _quote(value: object) -> str:
    """A client's value for an error message, cut to a bounded length."""
    return _repr.repr(value)
