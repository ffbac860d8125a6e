"""How one request wants its tokens drawn, under TensorRT-LLM's names.

Stop *strings* and everything else about text are honoured above the engine, by ``llmserve.llm``;
the engine sees token ids alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmserve.errors import InvalidRequestError

# Penalties beyond it, or a repetition penalty below one over it, could make infinity or NaN of a
# logit in float32.
_MAX_PENALTY = 1e6


def _check(ok: bool, param: str, value: object, limit: str) -> None:
    if not ok:
        raise InvalidRequestError(f"{param} is {value!r}; it must be {limit}", param=param)


def _as_tuple(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    # A lone string, a list or None is what callers write; what is kept is a tuple.
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


@dataclass(frozen=True, slots=True, kw_only=True)
class GuidedDecodingParams:
    """What the text of an answer must match. Exactly one field is set.

    Attributes:
        json: A JSON schema: its text, or the decoded schema.
        regex: A regular expression that the whole answer matches.
        grammar: A context-free grammar, in Lark's notation or as GBNF.
        choice: The answer is one of these strings.
        json_object: The answer is any JSON object.
    """

    json: str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: tuple[str, ...] | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        schema: Any = self.json
        if schema is not None and not isinstance(schema, str):
            object.__setattr__(self, "json", json.dumps(schema))
        if self.choice is not None:
            object.__setattr__(self, "choice", tuple(self.choice))
        given = [
            name
            for name in ("json", "regex", "grammar", "choice", "json_object")
            if getattr(self, name) not in (None, False)
        ]
        _check(len(given) == 1, "guided_decoding", given, "exactly one of its fields")
        choices = ("any",) if self.choice is None else self.choice
        _check(bool(choices) and all(choices), "choice", choices, "strings, none of them empty")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request. Greedy if temperature, top_p and top_k are all None, or
    temperature is 0, or top_k is 1, or top_p is 0: TensorRT-LLM's rule.

    Attributes:
        max_tokens: Most tokens to generate; None fills the context.
        min_tokens: No end-of-sequence token and none of ``stop_token_ids`` is drawn before so many
            tokens; a stop string that ends sooner is passed over.
        temperature: Divides the logits. None counts as 1 where something else asks for sampling.
        top_k: Keep the k likeliest tokens; 0 or None keeps all.
        top_p: Keep the smallest set of likeliest tokens whose probability reaches p.
        min_p: Drop tokens with less than min_p times the likeliest one's probability.
        seed: 64-bit seed of this request's random numbers; None draws one at submission.
        repetition_penalty: Divides positive and multiplies negative logits of tokens already in
            the prompt or the answer (Keskar et al. 2019, CTRL); 1e-6 to 1e6.
        presence_penalty: Subtracted once from the logit of each token in the answer so far;
            -1e6 to 1e6.
        frequency_penalty: Subtracted from it once per occurrence in the answer; -1e6 to 1e6.
        logit_bias: Pairs of token id and what is added to its logit, -100 to 100, before penalties;
            -100 all but bans a token. A mapping may be given.
        logprobs: None for none; k >= 0 for the sampled token's log-probability and the k likeliest.
            They are log-softmax in float32 of the model's logits, before penalties and temperature.
        prompt_logprobs: The same for each token of the prompt but the first, given those before
            it. Such a request does not read the prefix cache, which holds no logits.
        guided_decoding: What the answer must match; None for anything.
        n: How many answers; each is a request of its own to the engine.
        stop: Strings that end the answer; cut from it unless include_stop_str_in_output.
        stop_token_ids: Tokens that end the answer besides the model's end-of-sequence tokens.
        include_stop_str_in_output: Leave the stop string in the text.
        ignore_eos: Go on past end-of-sequence tokens.
        skip_special_tokens: Leave special tokens out of the text.
        add_special_tokens: Let the tokenizer add its own (BOS) to a prompt given as text.
        detokenize: False leaves ``text`` empty.
        truncate_prompt_tokens: Keep this many last prompt tokens; None keeps all.
    """

    max_tokens: int | None = 32
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guided_decoding: GuidedDecodingParams | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    add_special_tokens: bool = True
    detokenize: bool = True
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        stop = _as_tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        bias: Any = self.logit_bias
        bias = bias.items() if isinstance(bias, Mapping) else bias or ()
        object.__setattr__(self, "logit_bias", tuple((int(t), float(b)) for t, b in bias))
        finite, most = math.isfinite, _MAX_PENALTY
        t, p, m = self.temperature, self.top_p, self.min_p
        _check(
            self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, ">= 1"
        )
        most_tokens = math.inf if self.max_tokens is None else self.max_tokens
        _check(
            0 <= self.min_tokens <= most_tokens, "min_tokens", self.min_tokens, "in [0, max_tokens]"
        )
        _check(t is None or (finite(t) and t >= 0), "temperature", t, ">= 0")
        _check(self.top_k is None or self.top_k >= 0, "top_k", self.top_k, ">= 0")
        _check(p is None or 0 <= p <= 1, "top_p", p, "in [0, 1]")
        _check(m is None or 0 <= m <= 1, "min_p", m, "in [0, 1]")
        r = self.repetition_penalty
        _check(1 / most <= r <= most, "repetition_penalty", r, f"in [{1 / most:g}, {most:g}]")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(-most <= value <= most, name, value, f"in [-{most:g}, {most:g}]")
        for token_id, value in self.logit_bias:
            _check(token_id >= 0, "logit_bias", token_id, "a token id, >= 0")
            _check(-100 <= value <= 100, "logit_bias", value, "in [-100, 100]")
        for name in ("logprobs", "prompt_logprobs"):
            k = getattr(self, name)
            _check(k is None or k >= 0, name, k, ">= 0")
        _check(self.n >= 1, "n", self.n, ">= 1")
        _check(all(stop), "stop", list(stop), "without empty strings")
        s = self.seed
        _check(s is None or -(2**63) <= s < 2**64, "seed", s, "a 64-bit integer")
        k = self.truncate_prompt_tokens
        _check(k is None or k >= 1, "truncate_prompt_tokens", k, ">= 1")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        if self.temperature is None and self.top_p is None and self.top_k is None:
            return self.min_p is None
        return self.temperature == 0 or self.top_k == 1 or self.top_p == 0
