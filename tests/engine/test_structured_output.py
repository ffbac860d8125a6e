from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.core.sampling_params import GuidedDecodingParams
from llmserve.engine import guided_decoding
from llmserve.engine.guided_decoding import check_guided_decoding
from llmserve.engine.structured_output import StructuredOutput
from llmserve.errors import EngineError, InvalidRequestError
from llmserve.tokenizer.detokenizer import IncrementalDetokenizer
from llmserve.tokenizer.tokenizer import Tokenizer
from tests.engine.random_answers import SCHEMAS, is_valid
from tests.tokenizer_files import write_metaspace_tokenizer, write_tokenizer

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"


@dataclass
class Vocabulary:
    """A tokenizer and a model's vocabulary, which may be larger."""

    tokenizer: Tokenizer
    structured_output: StructuredOutput
    vocab_size: int
    eos: tuple[int, ...]

    def __post_init__(self) -> None:
        special = self.tokenizer.special_token_ids
        self.text = {
            token_id: text
            for token_id in range(self.vocab_size)
            if token_id not in special and (text := self.tokenizer.token_to_bytes(token_id))
        }

    def compile(self, eos: Collection[int] | None = None, **guided: object):
        params = GuidedDecodingParams(**guided)
        return self.structured_output.compile(params, self.eos if eos is None else eos)

    def allowed(self, *grammars) -> list[set[int]]:
        """What the masks of several grammars at once allow."""
        masks = self.structured_output.masks({str(i): g for i, g in enumerate(grammars)})
        rows = [masks[str(i)] for i in range(len(grammars))]
        assert all(row.shape == (-(-self.vocab_size // 32),) for row in rows)
        assert all(row.dtype == np.int32 for row in rows)
        bits = [np.unpackbits(row.view(np.uint8), bitorder="little") for row in rows]
        return [set(np.flatnonzero(row).tolist()) for row in bits]

    def decode(self, token_ids: list[int]) -> str:
        """The text of an answer to a prompt."""
        prompt = next(iter(self.text))
        detokenizer = IncrementalDetokenizer(self.tokenizer, prompt_token_ids=(prompt,))
        return "".join(map(detokenizer.feed, token_ids)) + detokenizer.flush()

    def tokens_of(self, text: str) -> list[int]:
        """One token a byte, which every vocabulary here has."""
        by_bytes = {text: token_id for token_id, text in self.text.items()}
        return [by_bytes[bytes([byte])] for byte in text.encode()]


def _vocabulary(directory: Path, padding: int, eos: tuple[int, ...], **options) -> Vocabulary:
    tokenizer = Tokenizer.from_directory(directory)
    vocab_size = tokenizer.vocab_size + padding
    structured_output = StructuredOutput(directory / "tokenizer.json", vocab_size, **options)
    return Vocabulary(tokenizer, structured_output, vocab_size, eos)


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Vocabulary]:
    tmp_path = tmp_path_factory.mktemp("tokenizers")
    byte_level = write_tokenizer(tmp_path / "byte-level")
    metaspace = write_metaspace_tokenizer(tmp_path / "metaspace")
    return {
        "demo": _vocabulary(DEMO, 0, (2,)),
        "byte-level, padded, several ends": _vocabulary(byte_level, 45, (0, 2), num_threads=2),
        "metaspace": _vocabulary(metaspace, 3, (2,)),
    }


@pytest.fixture(params=["demo", "byte-level, padded, several ends", "metaspace"])
def vocabulary(request: pytest.FixtureRequest, vocabularies: dict[str, Vocabulary]) -> Vocabulary:
    return vocabularies[request.param]


def _walk(vocabulary: Vocabulary, language: set[str], rng: random.Random, **guided: object) -> str:
    """Play one random answer, and hold each mask against the list of all answers there are."""
    grammar = vocabulary.compile(**guided)
    answers = {answer.encode() for answer in language}
    so_far, tokens, complete = b"", [], False
    while not complete:
        rests = [a[len(so_far) :] for a in answers if a.startswith(so_far)]
        fits = {i for i, text in vocabulary.text.items() if any(r.startswith(text) for r in rests)}
        if b"" in rests:
            fits |= set(vocabulary.eos)
        (allowed,) = vocabulary.allowed(grammar)
        if len({rest[:1] for rest in rests}) > 1:
            assert allowed == fits
        else:  # one way on: its own tokens alone
            assert allowed
            assert allowed <= fits
        token_id = rng.choice(sorted(allowed))
        if token_id in vocabulary.eos:
            break
        tokens.append(token_id)
        so_far += vocabulary.text[token_id]
        complete = grammar.accept(token_id)
        assert complete == (
            so_far in answers and not any(a != so_far and a.startswith(so_far) for a in answers)
        )
    assert so_far in answers
    return vocabulary.decode(tokens)


def _matches(pattern: str, alphabet: str, most: int) -> set[str]:
    words = ("".join(w) for n in range(1, most + 1) for w in itertools.product(alphabet, repeat=n))
    return {word for word in words if re.fullmatch(pattern, word)}


LANGUAGES = {
    "choice": (
        {"the", "they", "they ", "the quick fox", " the", 'she said "é\\/"\n', "中文"},
        lambda language: {"choice": sorted(language)},
    ),
    "regex": (
        _matches(r"(ab|a)?[b-d]{0,3}(é|e)", "abcdeé", 6),
        lambda language: {"regex": r"(ab|a)?[b-d]{0,3}(é|e)"},
    ),
    "json": (
        {
            f'{{{a}"n"{b}:{c}{n}{d}}}'
            for a, b, c, d in itertools.product(("", " "), repeat=4)
            for n in (9, 10, 11)
        },
        lambda language: {
            "json": {
                "type": "object",
                "properties": {"n": {"type": "integer", "minimum": 9, "maximum": 11}},
                "required": ["n"],
                "additionalProperties": False,
            }
        },
    ),
    "lark": (
        {"aXb", "aaXbb", "aaaXbbb"} | {"Y", "YY"},
        lambda language: {
            "grammar": 'start: one | "Y" "Y"?\none: "a" two "b"\n'
            'two: "X" | "a" three "b"\nthree: "X" | "aXb"'
        },
    ),
    "gbnf": (
        {f"{a}{sign}{b}" for a in "01" for b in ("0", "1", "(1)") for sign in "+-"},
        lambda language: {"grammar": 'root ::= [01] [-+] term\nterm ::= [01] | "(" "1" ")"'},
    ),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_masks_allow_exactly_what_fits(vocabulary: Vocabulary, language: str):
    answers, guided = LANGUAGES[language]
    rng = random.Random(0)
    played = {_walk(vocabulary, answers, rng, **guided(answers)) for _ in range(40)}
    assert played <= answers
    assert len(played) >= min(3, len(answers))


@settings(max_examples=60, deadline=None)
@given(
    choices=st.sets(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1
    ),
    seed=st.integers(0, 2**32),
)
def test_any_choices(vocabularies: dict[str, Vocabulary], choices: set[str], seed: int):
    for vocabulary in vocabularies.values():
        played = _walk(vocabulary, choices, random.Random(seed), choice=sorted(choices))
        assert played in choices


def test_neither_special_tokens_nor_padding_are_text(vocabulary: Vocabulary):
    (allowed,) = vocabulary.allowed(vocabulary.compile(regex=r"(.|\n)*"))
    assert allowed - set(vocabulary.eos) <= set(vocabulary.text)
    # Of two tokens for one byte, or bytes that no character begins with, not all are there.
    assert len(allowed) > len(vocabulary.text) // 2


def test_only_the_requests_own_tokens_end_it(vocabulary: Vocabulary):
    a = vocabulary.tokens_of("a")[0]
    for eos in [(), (vocabulary.eos[-1],), vocabulary.eos]:
        grammar = vocabulary.compile(eos, regex="a+")
        (before,) = vocabulary.allowed(grammar)
        assert not grammar.accept(a)
        (after,) = vocabulary.allowed(grammar)
        assert before.isdisjoint(vocabulary.eos)
        assert after - set(vocabulary.text) == set(eos)


def test_a_text_token_that_ends_a_request_is_none_of_its_text(vocabulary: Vocabulary):
    a, b = vocabulary.tokens_of("ab")
    grammar = vocabulary.compile((b,), regex="a[ab]*")
    (allowed,) = vocabulary.allowed(grammar)
    assert b not in allowed
    grammar.accept(a)
    assert b in vocabulary.allowed(grammar)[0]


def test_many_answers_at_once(vocabulary: Vocabulary):
    choices = ["the fox", "dog", "lazy", "quick"]
    grammars = [vocabulary.compile(choice=[choice, "!"]) for choice in choices]
    alone = [vocabulary.allowed(grammar)[0] for grammar in grammars]
    assert vocabulary.allowed(*grammars) == alone
    assert len(set(map(frozenset, alone))) == len(choices)
    assert vocabulary.structured_output.masks({}) == {}


def test_answers_to_one_schema_do_not_touch_each_other(vocabulary: Vocabulary):
    first, second = (vocabulary.compile(choice=["ab", "ac", "x"]) for _ in range(2))
    first.accept(vocabulary.tokens_of("a")[0])
    begins = [{vocabulary.text[i][:1] for i in ids} for ids in vocabulary.allowed(first, second)]
    assert begins == [{b"b", b"c"}, {b"a", b"x"}]


def test_a_token_that_is_not_allowed_fails_its_request(vocabulary: Vocabulary):
    good, bad = (vocabulary.compile(regex="[ab]{3}") for _ in range(2))
    with pytest.raises(InvalidRequestError) as caught:
        bad.accept(vocabulary.tokens_of("c")[0])
    assert caught.value.param == "guided_decoding"
    # A step that is under way still asks for its mask: it must not end in an empty one.
    allowed_good, allowed_bad = vocabulary.allowed(good, bad)
    assert allowed_good < allowed_bad == set(vocabulary.text) & allowed_bad


def test_an_answer_that_no_token_goes_on_with_fails_its_request(vocabularies):
    vocabulary = vocabularies["metaspace"]
    bos = vocabulary.tokenizer.bos_token_id
    grammar = vocabulary.compile(grammar=f'start: "a" <[{bos}]>')
    assert not grammar.accept(vocabulary.tokens_of("a")[0])
    (allowed,) = vocabulary.allowed(grammar)
    assert allowed
    with pytest.raises(InvalidRequestError, match="no token of the model"):
        grammar.accept(min(allowed))


def _random_answer(vocabulary: Vocabulary, rng: np.random.Generator, **guided: object):
    """An answer of a model that knows nothing, by its text; None for one without an end."""
    grammar = vocabulary.compile(**guided)
    tokens: list[int] = []
    for _ in range(1024):
        (allowed,) = vocabulary.allowed(grammar)
        candidates = np.array(sorted(allowed))
        weights = np.exp(rng.normal(size=len(candidates)))
        tokens.append(int(rng.choice(candidates, p=weights / weights.sum())))
        if tokens[-1] in vocabulary.eos or grammar.accept(tokens[-1]):
            return vocabulary.decode(tokens)
    return None


def _play(vocabulary: Vocabulary, num_answers: int) -> None:
    rng = np.random.default_rng(0)
    schemas = itertools.islice(itertools.cycle(SCHEMAS.values()), num_answers)
    answers = [(schema, _random_answer(vocabulary, rng, json=schema)) for schema in schemas]
    ended = [(schema, answer) for schema, answer in answers if answer is not None]
    assert len(ended) >= 0.95 * num_answers
    assert [answer for schema, answer in ended if not is_valid(answer, schema)] == []
    assert len({answer for _, answer in ended}) > num_answers // 2


def test_random_answers_are_valid(vocabulary: Vocabulary):
    _play(vocabulary, 64)


@pytest.mark.full
def test_many_random_answers_are_valid(vocabulary: Vocabulary):
    _play(vocabulary, 504)


def test_any_json_object(vocabulary: Vocabulary):
    rng = np.random.default_rng(1)
    answers = [_random_answer(vocabulary, rng, json_object=True) for _ in range(20)]
    ended = [answer for answer in answers if answer is not None]
    assert ended
    assert all(isinstance(json.loads(answer), dict) for answer in ended)


def test_blanks_come_one_at_a_time(vocabulary: Vocabulary):
    grammar = vocabulary.compile(json=SCHEMAS["recursion"])
    for token_id in vocabulary.tokens_of("{ "):
        grammar.accept(token_id)
    (allowed,) = vocabulary.allowed(grammar)
    assert {vocabulary.text[token_id][:1] for token_id in allowed} == {b'"'}


def test_other_threads_run_while_a_grammar_is_compiled(vocabularies):
    vocabulary = vocabularies["demo"]
    ticks, ended = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not ended.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        vocabulary.structured_output.warm_up()
        before, started_s = ticks, time.monotonic()
        vocabulary.compile(regex="a?" * 2500)
        # Held throughout, the interpreter would let the other thread run at the ends alone.
        assert time.monotonic() - started_s > 0.05
        assert ticks - before > 5
    finally:
        ended.set()
        thread.join()


ACCEPTED = {
    "json": {"json": SCHEMAS["recursion"]},
    "disjoint oneOf": {"json": {"oneOf": [{"type": "string"}, {"type": "integer"}]}},
    "many enum values": {"json": {"enum": [f"value {i}" for i in range(5000)]}},
    "many choices": {"choice": [f"choice {i}" for i in range(5000)]},
    "quotes and slashes": {"choice": ['a"\\/\n\té\u2028', "/a/", "${x}"]},
    "many fields": {"json": {"properties": {f"p{i}": {"type": "integer"} for i in range(200)}}},
    "long counts": {"regex": "((a|b)*c){1000}"},
    "gbnf": {"grammar": 'root ::= "a" [0-9]+ ("b" | "c")*'},
}


@pytest.mark.parametrize("guided", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(guided: dict[str, object]):
    check_guided_decoding(GuidedDecodingParams(**guided))


def _chain(num_rules: int) -> str:
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(num_rules))
    return f'start: r0\n{rules}r{num_rules}: "e"'


REFUSED = {
    "no json": ({"json": '{"a":'}, "EOF"),
    "no schema": ({"json": "true"}, "object schema"),
    "not implemented": ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    "not lenient by request": (
        {"json": {"x-guidance": {"lenient": True}, "uniqueItems": True}},
        "uniqueItems",
    ),
    "overlapping oneOf": ({"json": {"oneOf": [{"type": "object"}, {"type": "object"}]}}, "oneOf"),
    "unknown format": ({"json": {"type": "string", "format": "colour"}}, "colour"),
    "a schema elsewhere": ({"json": {"$ref": "http://example.com/x.json"}}, "example.com"),
    "itself": ({"json": {"$ref": "#"}}, "no answer matches"),
    "bad regex": ({"regex": "(a"}, "unclosed group"),
    "look-around": ({"regex": "(?=a)b"}, "look-around"),
    "only nothing": ({"regex": ""}, "the empty one"),
    "nothing at all": ({"regex": r"[^\s\S]"}, "no answer matches"),
    "bad grammar": ({"grammar": "start: nowhere"}, "nowhere"),
    "bad gbnf": ({"grammar": 'root := "a"'}, "::="),
    "special token": ({"grammar": "start: <|im_end|>"}, "special token"),
    "too long": ({"choice": ["x" * 200_000]}, "200000 characters"),
    # From here on: minutes, gigabytes or a stack overflow, had they been let.
    "huge multiple": ({"json": {"type": "integer", "multipleOf": 999_983}}, "too complex"),
    "huge common multiple": (
        {"json": {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949)]}},
        "",
    ),
    "long chain": ({"grammar": _chain(8000)}, "too complex"),
    "deep json": ({"json": '{"items":' * 10_000 + "{}" + "}" * 10_000}, "recursion limit"),
    "deep gbnf": ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "recursion"),
    "counts of counts": ({"regex": "((((a{100}){100}){100}){100}){100}"}, "too complex"),
    "optional letters": ({"regex": "a?" * 20_000}, "too complex"),
    "wide": ({"json": {"properties": {f"p{i}": {} for i in range(3000)}}}, ""),
}


@pytest.mark.parametrize(("guided", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(guided: dict[str, object], reason: str):
    with pytest.raises(InvalidRequestError, match=f"cannot be used: .*{reason}") as caught:
        check_guided_decoding(GuidedDecodingParams(**guided))
    assert caught.value.param == "guided_decoding"
    assert len(str(caught.value)) < 600


@pytest.fixture
def num_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    run, calls = subprocess.run, []

    def counting(*args, **kwargs):
        calls.append(args)
        return run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", counting)
    guided_decoding._check_in_process.cache_clear()
    yield lambda: len(calls)
    guided_decoding._check_in_process.cache_clear()


def test_each_is_checked_once(num_checks: Callable[[], int]):
    good, bad = GuidedDecodingParams(regex="a+b"), GuidedDecodingParams(regex="(a+b")
    outcomes: list[bool] = []

    def check(params: GuidedDecodingParams) -> None:
        try:
            check_guided_decoding(params)
            outcomes.append(True)
        except InvalidRequestError:
            outcomes.append(False)

    threads = [threading.Thread(target=check, args=(p,)) for p in (good, bad) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [False] * 4 + [True] * 4
    assert num_checks() == 2


def test_a_check_that_does_not_work_is_nobodys_fault(num_checks, monkeypatch):
    monkeypatch.setattr(guided_decoding.sys, "executable", "/bin/false")
    with pytest.raises(EngineError):
        check_guided_decoding(GuidedDecodingParams(regex="a+c"))
    monkeypatch.undo()
    check_guided_decoding(GuidedDecodingParams(regex="a+c"))
