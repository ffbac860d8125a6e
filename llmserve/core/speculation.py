"""Speculative decoding, the scheduler's side: which tokens to guess, and whether guessing pays.

A step that computes one token of a request reads all weights for it. Computing a few more rows
beside it often costs next to nothing, and a guess that turns out right is a step saved. A
``DraftProposer`` finds guesses; ``NgramProposer`` looks up where the last few tokens stood before,
which is right where an answer repeats its prompt: translating, summarising, editing. The
``Speculator`` learns two things from what it sees anyway and decides by them:

- **How often guesses are right.** A guess need not be verified for that: the tokens that come tell,
  whoever asked. So nothing is spent on finding out when text has begun to repeat itself.
- **What a row costs**: a line through the step times, t(n) = fixed + row * n. Where rows cost what
  they bring, in a large batch on a machine that is short of arithmetic, nothing is guessed. What
  was learnt fades while all steps have the same size; then, after hundreds of steps, a step with
  guesses is tried.

It changes no token: what is drawn at a position depends on the tokens before it alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

from llmserve.config import NGramDecodingConfig

_MAX_MATCH_TOKENS = 16
"""Longer matches are not told apart."""
_GENERATION_TOKENS = 4096
"""An n-gram is found again for at least so many tokens, and for less than three times as many."""

_MIN_CHANCE = 0.05
"""Guesses that are less likely are left alone even where rows cost nothing."""
_MIN_SPEEDUP = 1.05
"""Of the whole batch, as expected. Less is lost again: no step is prepared during another one."""
_FIRST_RATE = 0.5  # of guesses of a grade that were never seen; soon outweighed
_RATE_MEMORY = 0.998  # per guess of a grade: what was seen 500 ago counts for a third
_RATIO_MEMORY = 0.98  # per guess of a request
_RATIO_PRIOR = 2.0  # right guesses, expected and seen, that every request is credited with
_COST_MEMORY = 0.99  # per step
_MAX_SLOWDOWN = 3.0  # one step that was held up counts as at most so much slower than expected


_chance = itemgetter(0)


@dataclass(slots=True)
class Draft:
    """A guess at how a request goes on.

    Attributes:
        token_ids: The next tokens, at least one.
        grades: One per token: any number by which guesses differ in how often they are right, such
            as the length of the match. How often is learnt for each.
    """

    token_ids: list[int]
    grades: Sequence[int]


class DraftProposer(Protocol):
    """Finds guesses for a whole batch at once, as a draft model wants it."""

    def propose(self, sequences: Mapping[str, Sequence[int]]) -> dict[str, Draft]:
        """Guess how requests go on.

        Args:
            sequences: By request id, prompt and answer so far. Between two calls a request's
                tokens are only added to.

        Returns:
            By request id; whoever is missing has no guess.
        """
        ...

    def forget(self, request_id: str) -> None:
        """Drop what is held for a request, if anything is."""
        ...


class NgramProposer:
    """Guesses that what followed the last n tokens before follows them again.

    The longest n with a match wins, down to 1, and the latest match among those of that n. It takes
    constant time per token, and memory for at most about 8,192 tokens of each request, the newest.
    """

    def __init__(self, config: NGramDecodingConfig) -> None:
        self._config = config
        self._indexes: dict[str, _NgramIndex] = {}
        # By length of the match.
        self._grades = [
            [min(size + i, _MAX_MATCH_TOKENS) for i in range(config.max_draft_len)]
            for size in range(_MAX_MATCH_TOKENS + 1)
        ]

    def propose(self, sequences: Mapping[str, Sequence[int]]) -> dict[str, Draft]:
        """See ``DraftProposer``. A guess's grade is the length of its match, 1 to 16."""
        drafts = {}
        for request_id, token_ids in sequences.items():
            index = self._indexes.get(request_id)
            if index is None:
                index = _NgramIndex(self._config.max_matching_ngram_size)
                self._indexes[request_id] = index
            index.extend(token_ids)
            match = index.find(token_ids)
            if match is not None:
                drafts[request_id] = self._draft(token_ids, *match)
        return drafts

    def forget(self, request_id: str) -> None:
        """See ``DraftProposer``."""
        self._indexes.pop(request_id, None)

    def _draft(self, token_ids: Sequence[int], start: int, match_tokens: int) -> Draft:
        length = self._config.max_draft_len
        guess = list(token_ids[start : start + length])
        while len(guess) < length:  # the match overlaps the end: the text goes round in a circle
            guess += guess[: length - len(guess)]
        return Draft(guess, self._grades[match_tokens])


class _NgramIndex:
    """Where each n-gram of a growing sequence ended last, if a token stands behind it."""

    def __init__(self, max_ngram_size: int) -> None:
        self._max_ngram_size = max_ngram_size
        self._max_entries = _GENERATION_TOKENS * max_ngram_size
        self._recent: dict[tuple[int, ...], int] = {}
        self._older: dict[tuple[int, ...], int] = {}
        self._next_end = 1

    def extend(self, token_ids: Sequence[int]) -> None:
        """Take in the n-grams that end before the last token and are not in yet."""
        first = max(self._next_end, len(token_ids) - 2 * _GENERATION_TOKENS)
        for end in range(first, len(token_ids)):
            if len(self._recent) >= self._max_entries:
                self._older, self._recent = self._recent, {}
            for size in range(1, min(self._max_ngram_size, end) + 1):
                self._recent[tuple(token_ids[end - size : end])] = end
        self._next_end = max(self._next_end, len(token_ids))

    def find(self, token_ids: Sequence[int]) -> tuple[int, int] | None:
        """Where the longest n-gram at the end stood before: its end there, and how many tokens
        agree in all."""
        end = size = 0
        # Upwards: where a longer one stood a shorter one stood as well.
        while size < min(self._max_ngram_size, len(token_ids) - 1):
            ngram = tuple(token_ids[len(token_ids) - size - 1 :])
            found = self._recent.get(ngram) or self._older.get(ngram)
            if found is None:
                break
            end, size = found, size + 1
        if not size:
            return None
        while (
            size < min(_MAX_MATCH_TOKENS, end) and token_ids[end - size - 1] == token_ids[-size - 1]
        ):
            size += 1
        return end, size


@dataclass(slots=True)
class _HitRate:
    """How often guesses of a grade are right."""

    hits: float = 2.0 * _FIRST_RATE
    trials: float = 2.0

    @property
    def value(self) -> float:
        return self.hits / self.trials

    def observe(self, hit: bool) -> None:
        self.hits = _RATE_MEMORY * self.hits + hit
        self.trials = _RATE_MEMORY * self.trials + 1.0


@dataclass(slots=True)
class _Sequence:
    """A running request: its guess, and how its guesses do beside those of all others."""

    num_tokens: int = 0
    draft: Draft | None = None
    hits: float = _RATIO_PRIOR
    expected_hits: float = _RATIO_PRIOR

    def observe(self, hit: bool, rate: float) -> None:
        self.hits += (1.0 - _RATIO_MEMORY) * (_RATIO_PRIOR - self.hits) + hit
        self.expected_hits += (1.0 - _RATIO_MEMORY) * (_RATIO_PRIOR - self.expected_hits) + rate


class StepCost:
    """What a step of n tokens takes, learnt as it goes: t(n) = fixed + row * n.

    Least squares with weights that fall by 1 % a step. While the sizes don't vary the slope is
    kept, and when evidence for it has faded rows are taken to be free again.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean_tokens = self._mean_s = 0.0
        self._squares = self._products = 0.0  # weighted sums about the means

    def observe(self, num_tokens: int, step_s: float) -> None:
        """Take in that a step of ``num_tokens`` took ``step_s`` seconds."""
        if self._weight:
            step_s = min(step_s, _MAX_SLOWDOWN * self.seconds(num_tokens))
        self._weight = _COST_MEMORY * self._weight + 1.0
        share = 1.0 / self._weight
        tokens_off, s_off = num_tokens - self._mean_tokens, step_s - self._mean_s
        self._mean_tokens += share * tokens_off
        self._mean_s += share * s_off
        self._squares = _COST_MEMORY * self._squares + (1.0 - share) * tokens_off * tokens_off
        self._products = _COST_MEMORY * self._products + (1.0 - share) * tokens_off * s_off

    @property
    def row_s(self) -> float:
        """Seconds that one more token adds, between none and its equal share of the step."""
        if self._squares < 0.01:
            return 0.0
        slope = self._products / self._squares
        return min(max(0.0, slope), self._mean_s / self._mean_tokens)

    def seconds(self, num_tokens: float) -> float:
        """What a step of so many tokens should take."""
        return self._mean_s + self.row_s * (num_tokens - self._mean_tokens)


class Speculator:
    """Decides which guesses the next step verifies.

    A batch of R requests brings R tokens in t(R). With K guessed tokens, of which E are expected to
    be right, it brings R + E in t(R + K). One more guess, right with chance p, raises tokens per
    second exactly if::

        (R + E + p) / t(R + K + 1) > (R + E) / t(R + K)     <=>     p > row * (R + E) / t(R + K)

    as t(n + 1) = t(n) + row. So guesses of all requests are taken in the order of their chances
    for as long as that holds: the best set there is, for each one taken raises what the next must
    bring. A guess counts only if all before it were right, so its chance is the product of theirs,
    and chances fall along a draft: what is taken of each is a beginning. The chance that a token is
    right given those before it is the rate of its grade, over all requests, times how this
    request's guesses do beside that.
    """

    def __init__(self, proposer: DraftProposer) -> None:
        self._proposer = proposer
        self._cost = StepCost()
        self._hit_rates: dict[int, _HitRate] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._extended: dict[str, Sequence[int]] = {}  # since guesses were asked for
        self._guesses: dict[str, list[int]] | None = {}  # None: to be chosen

    @property
    def guesses(self) -> Mapping[str, list[int]]:
        """By request id, what to verify in the next step. Empty: the next step needs no guess, and
        may be prepared while this one runs."""
        if self._guesses is None:
            drafts = self._proposer.propose(self._extended)
            for request_id in self._extended:
                self._sequences[request_id].draft = drafts.get(request_id)
            self._extended = {}
            self._guesses = self._choose()
        return self._guesses

    def extended(self, request_id: str, token_ids: Sequence[int]) -> None:
        """A running request got tokens, its first or further ones.

        Args:
            request_id: The request.
            token_ids: Its prompt and all of its answer; read again by ``guesses``.
        """
        sequence = self._sequences.setdefault(request_id, _Sequence())
        if sequence.draft is not None:
            self._score(sequence, sequence.draft, token_ids[sequence.num_tokens :])
            sequence.draft = None
        sequence.num_tokens = len(token_ids)
        self._extended[request_id] = token_ids
        self._guesses = None

    def forget(self, request_id: str) -> None:
        """A request does not run any more: it ended or was paused."""
        if self._sequences.pop(request_id, None) is not None:
            self._extended.pop(request_id, None)
            self._guesses = None
            self._proposer.forget(request_id)

    def observe_step(self, num_tokens: int, step_s: float) -> None:
        """Learn what a step costs, from one that held no prefill.

        Args:
            num_tokens: What it computed, guesses included.
            step_s: Seconds from the result of the step before to its own, without a rest between:
                that nothing is prepared ahead of a step with guesses is part of what they cost.
        """
        self._cost.observe(num_tokens, step_s)

    def _score(self, sequence: _Sequence, draft: Draft, token_ids: Sequence[int]) -> None:
        """Compare a guess with what came, as far as all before it was right."""
        for guess, grade, token_id in zip(draft.token_ids, draft.grades, token_ids, strict=False):
            hit = guess == token_id
            rate = self._hit_rate(grade)
            sequence.observe(hit, rate.value)
            rate.observe(hit)
            if not hit:
                break

    def _choose(self) -> dict[str, list[int]]:
        num_rows = len(self._sequences)
        row_s, step_s = self._cost.row_s, self._cost.seconds(num_rows)
        lengths: dict[str, int] = {}
        num_guesses, expected_hits = 0, 0.0
        for chance, request_id in self._candidates(row_s * num_rows, step_s):
            needed = row_s * (num_rows + expected_hits)
            if chance * (step_s + row_s * num_guesses) <= needed:
                break
            lengths[request_id] = lengths.get(request_id, 0) + 1
            num_guesses += 1
            expected_hits += chance
        with_guesses_s = step_s + row_s * num_guesses
        if (num_rows + expected_hits) * step_s < _MIN_SPEEDUP * num_rows * with_guesses_s:
            return {}
        return {
            request_id: draft.token_ids[:length]
            for request_id, length in lengths.items()
            if (draft := self._sequences[request_id].draft) is not None
        }

    def _candidates(self, rows_s: float, step_s: float) -> list[tuple[float, str]]:
        """All guesses worth a row beside no others, by falling chance; a request's in their order.

        Args:
            rows_s: What the rows without guesses add to a step, in seconds.
            step_s: What a step without guesses takes, in seconds.
        """
        if not step_s:  # nothing is known yet
            return []
        least = max(_MIN_CHANCE, rows_s / step_s)
        rates = {grade: rate.value for grade, rate in self._hit_rates.items()}
        candidates = []
        for request_id, sequence in self._sequences.items():
            if sequence.draft is None:
                continue
            ratio, chance = sequence.hits / sequence.expected_hits, 1.0
            for grade in sequence.draft.grades:
                chance *= min(1.0, ratio * rates.get(grade, _FIRST_RATE))
                if chance <= least:
                    break
                candidates.append((chance, request_id))
        # By chance alone: sorting is stable, so equal ones stay in their order.
        candidates.sort(key=_chance, reverse=True)
        return candidates

    def _hit_rate(self, grade: int) -> _HitRate:
        rate = self._hit_rates.get(grade)
        if rate is None:
            rate = self._hit_rates[grade] = _HitRate()
        return rate
