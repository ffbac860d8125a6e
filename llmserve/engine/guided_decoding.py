"""What an answer may be, as llguidance compiles it, and whether a client's wish for it is sound.

A schema, regex or grammar is a program that a client sends. llguidance bounds what a compiled one
costs for each token, but not what compiling it costs: some hundred characters take minutes or
gigabytes, or overflow the stack. ``check_guided_decoding`` therefore compiles each new one in a
process of its own first, with its time, memory and stack limited; this module run as a program is
that process. An engine compiles what has passed.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from llmserve.core.sampling_params import GuidedDecodingParams
from llmserve.errors import EngineError, InvalidRequestError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

MAX_TEXT_CHARS = 128 * 1024
"""Longest schema, regex, grammar, or list of choices."""

# At most one blank between the tokens of JSON: a model that likes blanks can't go on for ever, and
# both ways of writing on one line, '{"a":1}' and '{"a": 1}', are there.
_JSON_OPTIONS: JsonCompileOptions = {
    "whitespace_flexible": True,
    "whitespace_pattern": " ?",
    "item_separator": ",",
    "key_separator": ":",
    # A keyword that llguidance does not implement is an error and never passed over.
    "lenient": False,
    "coerce_one_of": False,
}
_MAX_LEXER_STATES = 20_000  # of 1 to 2 kB each
_MAX_COMPILE_S = 0.5
_MAX_CHECK_CPU_S = 2
_MAX_CHECK_WALL_S = 60  # of a machine that has little time for the check
_MAX_CHECK_BYTES = 2**30
# Half of what threads have by default, and for masks a quarter of what llguidance's own have.
_COMPILE_STACK_BYTES = 4 * 2**20
_MASK_STACK_BYTES = 2**19
_MAX_REASON_CHARS = 400
_TOO_COMPLEX = "it is too complex to compile"


def check_guided_decoding(params: GuidedDecodingParams) -> None:
    """Refuse what cannot be compiled, or only at a price that other requests would feel.

    Needs no model. One that is new takes about 0.2 seconds, in a process of its own; the last 1,024
    are remembered. Blocks meanwhile, and may be called from any thread.

    Raises:
        InvalidRequestError: ``guided_decoding`` cannot be used, with llguidance's reason.
        EngineError: The check itself did not work.
    """
    num_chars = sum(map(len, params.choice or ())) + sum(
        len(text) for text in (params.json, params.regex, params.grammar) if text is not None
    )
    if num_chars > MAX_TEXT_CHARS:
        raise refusal(f"it has {num_chars} characters; at most {MAX_TEXT_CHARS} are accepted")
    # One at a time: the same schema often comes with many requests at once.
    with _check_lock:
        verdict = _check_in_process(params)
    if verdict:
        raise InvalidRequestError(verdict, param="guided_decoding")


def compile_matcher(tokenizer: LLTokenizer, params: GuidedDecodingParams) -> LLMatcher:
    """Compile for one tokenizer.

    Args:
        tokenizer: Whose tokens the answer is made of.
        params: Has passed ``check_guided_decoding`` where a client sent it.

    Returns:
        A matcher at the beginning of the answer. Other threads run meanwhile.

    Raises:
        InvalidRequestError: It cannot be compiled, or allows nothing but the empty answer.
    """
    from llguidance import LLMatcher, LLParserLimits

    try:
        grammar = _to_llguidance(params)
    # The converter of GBNF raises whatever it comes across, JSON's parser ValueError.
    except Exception as error:
        raise refusal(str(error) or type(error).__name__) from error
    limits = LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES, step_max_items=10_000, verbose_errors=False
    )
    matcher = LLMatcher(tokenizer, grammar, limits=limits, log_level=0)
    first = int.from_bytes(matcher.compute_bitmask(), "little")
    if matcher.is_error():
        raise refusal(matcher.get_error())
    if first == 1 << tokenizer.eos_token:
        raise refusal("no answer matches it but the empty one")
    return matcher


def refusal(reason: str) -> InvalidRequestError:
    """The error of a request whose grammar does not work, with the reason cut to what is useful."""
    reason = " ".join(reason.partition("<non-verbose/>")[0].split())
    if reason.startswith("NoExtension"):
        reason = "no answer matches it"
    if len(reason) > _MAX_REASON_CHARS:
        reason = f"{reason[: _MAX_REASON_CHARS // 2]} ... {reason[-_MAX_REASON_CHARS // 2 :]}"
    return InvalidRequestError(f"guided_decoding cannot be used: {reason}", param="guided_decoding")


def _to_llguidance(params: GuidedDecodingParams) -> str:
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if params.json is not None:
        return LLMatcher.grammar_from_json_schema(params.json, overrides=_JSON_OPTIONS)
    if params.json_object:
        return LLMatcher.grammar_from_json_schema({"type": "object"}, overrides=_JSON_OPTIONS)
    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.grammar is not None:
        return LLMatcher.grammar_from_lark(any_to_lark(params.grammar))
    assert params.choice is not None
    # A regex and no rule: a rule's alternatives are followed side by side, at most 2,000 of them.
    return LLMatcher.grammar_from_regex("|".join(map(_escaped, params.choice)))


def _escaped(text: str) -> str:
    """A regex that matches this text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


_check_lock = threading.Lock()


@lru_cache(maxsize=1024)
def _check_in_process(params: GuidedDecodingParams) -> str:
    """The sentence that refuses it; empty if it can be used."""
    try:
        process = subprocess.run(
            # -P: the current directory is nowhere to import from, unless it is for the parent.
            [sys.executable, "-P", "-m", "llmserve.engine.guided_decoding"],
            input=json.dumps(dataclasses.asdict(params)),
            capture_output=True,
            text=True,
            timeout=_MAX_CHECK_WALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return str(refusal(_TOO_COMPLEX))
    if process.returncode < 0:  # out of time, memory or stack
        return str(refusal(_TOO_COMPLEX))
    if process.returncode > 0:
        raise EngineError(f"guided_decoding cannot be checked: {process.stderr[-500:].strip()}")
    return process.stdout


class _ByteTokens:
    """A vocabulary of the 256 bytes and an end, in the shape that llguidance asks for."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (eos_token_id,)
    text_bits = (1 << 256) - 1

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _check(params: GuidedDecodingParams) -> None:
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    tokenizer = LLTokenizer(TokenizerWrapper(_ByteTokens()), slices=[])
    matchers: list[LLMatcher] = []

    def compile_in_time() -> None:
        started_s = time.thread_time()
        matchers.append(compile_matcher(tokenizer, params))
        if time.thread_time() - started_s > _MAX_COMPILE_S:
            raise refusal(_TOO_COMPLEX)

    _run_with_stack(_COMPILE_STACK_BYTES, compile_in_time)
    _run_with_stack(_MASK_STACK_BYTES, lambda: _try_out(matchers.pop().deep_copy()))


def _try_out(matcher: LLMatcher) -> None:
    """Take some tokens: what is too wide to follow shows with the first few."""
    for _ in range(8):
        allowed = int.from_bytes(matcher.compute_bitmask(), "little") & _ByteTokens.text_bits
        if not matcher.is_error() and allowed:
            matcher.consume_token(allowed.bit_length() - 1)
        if matcher.is_error():
            raise refusal(matcher.get_error())


def _run_with_stack(stack_bytes: int, work: Callable[[], object]) -> None:
    """Run ``work`` in a thread with a stack of this size, and raise what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    threading.stack_size(stack_bytes)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _main() -> None:
    for limit, value in (
        (resource.RLIMIT_CPU, _MAX_CHECK_CPU_S),
        (resource.RLIMIT_AS, _MAX_CHECK_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    given: dict[str, Any] = json.load(sys.stdin)
    try:
        _check(GuidedDecodingParams(**given))
    except InvalidRequestError as error:
        print(error, end="")
    except MemoryError:
        print(refusal(_TOO_COMPLEX), end="")


if __name__ == "__main__":
    _main()
