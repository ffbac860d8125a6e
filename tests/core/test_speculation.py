"""Guesses against a search by hand, and when guessing is worth it, on machines made up here."""

import itertools
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmserve.config import NGramDecodingConfig
from llmserve.core import speculation
from llmserve.core.speculation import Draft, NgramProposer, Speculator, StepCost


def naive_draft(tokens: Sequence[int], max_size: int, length: int) -> tuple[list[int], int] | None:
    """The guess and the length of its match, by looking everywhere."""
    for size in range(min(max_size, len(tokens) - 1), 0, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[len(tokens) - size :]:
                text = list(tokens)
                for i in range(length):
                    text.append(text[end + i])
                while size < min(16, end) and tokens[end - size - 1] == tokens[-size - 1]:
                    size += 1
                return text[len(tokens) :], size
    return None


small_texts = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@settings(deadline=None)
@given(
    texts=st.dictionaries(st.sampled_from("abc"), small_texts, min_size=1),
    max_size=st.integers(1, 5),
    length=st.integers(1, 6),
    data=st.data(),
)
def test_guesses_are_those_of_a_search_by_hand_while_requests_grow(texts, max_size, length, data):
    proposer = NgramProposer(
        NGramDecodingConfig(max_draft_len=length, max_matching_ngram_size=max_size)
    )
    num_tokens = dict.fromkeys(texts, 1)
    while texts:
        drafts = proposer.propose({name: texts[name][: num_tokens[name]] for name in texts})
        for name, text in texts.items():
            expected = naive_draft(text[: num_tokens[name]], max_size, length)
            if expected is None:
                assert name not in drafts
            else:
                assert drafts[name].token_ids == expected[0]
                assert drafts[name].grades[0] == expected[1]
                assert len(drafts[name].grades) == length
        for name in list(texts):
            if num_tokens[name] == len(texts[name]):
                proposer.forget(name)
                del texts[name]
            else:
                left = len(texts[name]) - num_tokens[name]
                num_tokens[name] += data.draw(st.integers(1, left), "tokens more")


def test_a_forgotten_request_leaves_nothing_behind():
    proposer = NgramProposer(NGramDecodingConfig())
    assert proposer.propose({"a": [1, 2, 1]}) != {}
    proposer.forget("a")
    proposer.forget("a")
    assert proposer.propose({"a": [3, 4, 1]}) == {}, "the tokens of another request of that name"


@pytest.mark.parametrize("chunk", [7, 1000])
def test_a_long_text_takes_bounded_memory_and_its_newest_part_is_found(monkeypatch, chunk):
    monkeypatch.setattr(speculation, "_GENERATION_TOKENS", 50)
    proposer = NgramProposer(NGramDecodingConfig(max_draft_len=2, max_matching_ngram_size=3))
    text = list(range(1000))
    for end in range(chunk, len(text) + 1, chunk):
        proposer.propose({"a": text[:end]})
        index = proposer._indexes["a"]
        assert len(index._recent) + len(index._older) <= 2 * (3 * 50 + 3)
    distances = (10, 49, 500)
    found = [proposer.propose({"a": [*text, *text[-d : 3 - d]]}) for d in distances]
    assert [drafts["a"].token_ids if drafts else None for drafts in found] == [
        [993, 994],
        [954, 955],
        None,
    ]


# --- what a step costs ----------------------------------------------------------------------------


def test_the_cost_of_a_row_is_learnt_through_noise_and_followed_when_it_changes():
    rng, cost = random.Random(0), StepCost()

    def run(fixed_s: float, row_s: float) -> None:
        for _ in range(800):
            tokens = rng.randint(1, 40)
            cost.observe(tokens, (fixed_s + row_s * tokens) * rng.uniform(0.9, 1.1))

    run(fixed_s=0.010, row_s=0.0002)
    assert cost.row_s == pytest.approx(0.0002, rel=0.2)
    assert cost.seconds(100) == pytest.approx(0.030, rel=0.15)
    run(fixed_s=0.001, row_s=0.001)
    assert cost.row_s == pytest.approx(0.001, rel=0.1)
    assert cost.seconds(1) == pytest.approx(0.002, abs=0.002)


def test_a_row_costs_at_least_nothing_and_at_most_its_share():
    falling, steep = StepCost(), StepCost()
    for tokens in (1, 2, 3, 4):
        falling.observe(tokens, 1.0 / tokens)
        steep.observe(tokens, float(tokens**3))
    assert falling.row_s == 0.0
    assert 0 < steep.seconds(0.001) < steep.seconds(4)


def test_without_other_sizes_the_cost_of_a_row_is_kept_and_later_forgotten():
    cost = StepCost()
    for tokens in (4, 12) * 20:
        cost.observe(tokens, 1.0 + 0.1 * tokens)
    kept = []
    for _ in range(2000):
        cost.observe(4, 1.4)
        kept.append(cost.row_s)
    assert kept[400] == pytest.approx(0.1)
    assert kept[-1] == 0.0


def test_a_step_that_was_held_up_says_little_about_rows():
    cost = StepCost()
    for _ in range(50):
        cost.observe(1, 1.0)
    cost.observe(9, 1000.0)
    assert cost.row_s <= 0.25
    for _ in range(20):
        cost.observe(9, 1.0)
    assert cost.row_s < 0.05


# --- which guesses are worth their rows -----------------------------------------------------------


class Scripted:
    """A proposer that guesses what it is told to."""

    def __init__(self, drafts: dict[str, Draft]) -> None:
        self.drafts = drafts

    def propose(self, sequences):
        return {name: self.drafts[name] for name in sequences if name in self.drafts}

    def forget(self, request_id):
        pass


def create_speculator(
    drafts: dict[str, Draft], rates: Sequence[float], fixed_s: float, row_s: float
) -> Speculator:
    """One that knows how often guesses of each grade are right, and what steps cost."""
    speculator = Speculator(Scripted(drafts))
    for grade, rate in enumerate(rates):
        speculator._hit_rates[grade] = speculation._HitRate(1000 * rate, 1000)
    for tokens in (1, 33) * 700:  # until what the first, unexpected ones said is forgotten
        speculator.observe_step(tokens, fixed_s + row_s * tokens)
    return speculator


@settings(deadline=None)
@given(
    all_rates=st.lists(
        st.lists(st.floats(0.06, 1.0), min_size=1, max_size=4), min_size=1, max_size=3
    ),
    num_others=st.integers(0, 3),
    row_s=st.floats(0.0, 1.0),
)
@example(all_rates=[[0.4], [1.0, 1.0, 1.0, 1.0]], num_others=0, row_s=0.3)
def test_the_guesses_taken_are_the_best_set_there_is(all_rates, num_others, row_s):
    grades = itertools.count()
    drafts = {
        str(i): Draft([7] * len(rates), [next(grades) for _ in rates])
        for i, rates in enumerate(all_rates)
    }
    speculator = create_speculator(drafts, list(itertools.chain(*all_rates)), 1.0, row_s)
    for i in range(len(all_rates) + num_others):
        speculator.extended(str(i), [1, 2, 3])
    num_rows = len(all_rates) + num_others

    def tokens_per_s(lengths: Sequence[int]) -> float:
        hits = num_rows
        for rates, length in zip(all_rates, lengths, strict=True):
            chance = 1.0
            for rate in rates[:length]:
                chance *= rate
                hits += chance if chance >= 0.05 else 0.0
        return hits / (1.0 + row_s * (num_rows + sum(lengths)))

    taken = tokens_per_s([len(speculator.guesses.get(str(i), ())) for i in range(len(all_rates))])
    none = tokens_per_s([0] * len(all_rates))
    best = max(map(tokens_per_s, itertools.product(*(range(len(r) + 1) for r in all_rates))))
    if best < 1.0499 * none:
        assert speculator.guesses == {}
    elif best > 1.0501 * none:
        assert taken == pytest.approx(best, rel=1e-6)


def test_each_request_is_judged_by_its_own_guesses_too():
    drafts = {name: Draft([7], [0]) for name in ("good", "bad")}
    speculator = create_speculator(drafts, [0.5], 1.0, 0.1)
    good, bad = [0], [0]
    for _ in range(60):
        good.append(7)
        bad.append(8)
        speculator.extended("good", good)
        speculator.extended("bad", bad)
        guesses = speculator.guesses
    assert set(guesses) == {"good"}


def test_behind_a_wrong_guess_nothing_is_learnt():
    speculator = create_speculator({"a": Draft([1, 2, 3, 4], [0, 1, 2, 3])}, (), 1.0, 0.0)
    speculator.extended("a", [0])
    assert speculator.guesses
    speculator.extended("a", [0, 1, 9, 3, 4])
    assert set(speculator._hit_rates) == {0, 1}


def test_nothing_is_guessed_before_a_step_was_timed():
    speculator = Speculator(NgramProposer(NGramDecodingConfig()))
    speculator.extended("a", [1, 2, 3, 1])
    assert speculator.guesses == {}
    speculator.observe_step(1, 1.0)
    speculator.extended("a", [1, 2, 3, 1, 2])
    assert speculator.guesses["a"][0] == 3


def test_a_guess_goes_with_its_request():
    speculator = create_speculator({}, (), 1.0, 0.0)
    speculator._proposer = NgramProposer(NGramDecodingConfig())
    for name in "ab":
        speculator.extended(name, [1, 2, 3, 1])
    assert set(speculator.guesses) == {"a", "b"}
    speculator.forget("a")
    assert set(speculator.guesses) == {"b"}
    speculator.extended("b", [1, 2, 3, 1, 5])
    assert speculator.guesses == {}
    speculator.forget("b")
    assert speculator._sequences == speculator._extended == {}


# --- a machine of its own -------------------------------------------------------------------------

Text = tuple[list[int], list[int]]  # prompt and answer


class Machine:
    """Answers texts that are known beforehand, some at a time, and counts the time it takes."""

    def __init__(self, cost: Callable[[int], float], speculator: Speculator | None) -> None:
        self.cost = cost
        self.speculator = speculator
        self.time_s = 0.0
        self.num_answered_tokens = 0
        self.num_draft_tokens = 0

    def run(self, texts: Sequence[Text], batch: int) -> None:
        waiting = list(enumerate(texts))
        known: dict[str, list[int]] = {}
        answers: dict[str, list[int]] = {}
        while waiting or known:
            while waiting and len(known) < batch:
                number, (prompt, answer) = waiting.pop(0)
                known[str(number)], answers[str(number)] = [*prompt, answer[0]], answer[1:]
                if self.speculator:
                    self.speculator.extended(str(number), known[str(number)])
            self._step(known, answers)

    def _step(self, known: dict[str, list[int]], answers: dict[str, list[int]]) -> None:
        guesses = dict(self.speculator.guesses) if self.speculator else {}
        num_tokens = len(known) + sum(map(len, guesses.values()))
        self.time_s += self.cost(num_tokens)
        for name in list(known):
            guess, answer = guesses.get(name, []), answers[name]
            accepted = 0
            while (
                accepted < min(len(guess), len(answer) - 1) and guess[accepted] == answer[accepted]
            ):
                accepted += 1
            known[name] += answer[: accepted + 1]
            answers[name] = answer[accepted + 1 :]
            self.num_answered_tokens += accepted + 1
            if self.speculator:
                self.num_draft_tokens += len(guess)
                self.speculator.extended(name, known[name])
            if not answers[name]:
                del known[name]
                if self.speculator:
                    self.speculator.forget(name)
        if self.speculator:
            self.speculator.observe_step(num_tokens, self.cost(num_tokens))


def memory_bound(num_tokens: int) -> float:
    return 1.0 + 0.001 * num_tokens


def compute_bound(num_tokens: int) -> float:
    return 0.05 + 0.1 * num_tokens


def create_texts(count: int, copied: float, answer_tokens: int = 100, seed: int = 0) -> list[Text]:
    """Answers that copy so great a part of their prompts, ten tokens at a time."""
    rng, texts = random.Random(seed), []
    for _ in range(count):
        prompt, answer = [rng.randrange(5000) for _ in range(100)], []
        while len(answer) < answer_tokens:
            start = rng.randrange(90)
            fresh = [rng.randrange(5000) for _ in range(10)]
            answer += prompt[start : start + 10] if rng.random() < copied else fresh
        texts.append((prompt, answer[:answer_tokens]))
    return texts


def create_machine(cost: Callable[[int], float]) -> Machine:
    return Machine(cost, Speculator(NgramProposer(NGramDecodingConfig())))


def speedup(cost: Callable[[int], float], texts: Sequence[Text], batch: int) -> float:
    with_guesses, without = create_machine(cost), Machine(cost, None)
    with_guesses.run(texts, batch)
    without.run(texts, batch)
    assert with_guesses.num_answered_tokens == without.num_answered_tokens
    return without.time_s / with_guesses.time_s


@pytest.mark.parametrize("batch", [1, 16])
def test_where_rows_are_cheap_and_text_is_copied_it_is_much_faster(batch):
    assert speedup(memory_bound, create_texts(32, copied=0.8), batch) > 2.0


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("copied", [0.0, 0.8])
def test_where_rows_cost_what_they_bring_next_to_nothing_is_lost(batch, copied):
    texts = create_texts(max(8, 2 * batch), copied, answer_tokens=1500)
    assert speedup(compute_bound, texts, batch) > 0.98


def test_where_nothing_matches_nothing_is_lost():
    assert speedup(memory_bound, create_texts(16, copied=0.0), 4) > 0.99
    # A small vocabulary: matches for each token, and hardly one of them right.
    rng = random.Random(1)
    noise = [[rng.randrange(20) for _ in range(700)] for _ in range(8)]
    texts = [(tokens[:200], tokens[200:]) for tokens in noise]
    assert speedup(lambda n: 1.0 + 0.05 * n, texts, 4) > 0.98


def test_what_is_guessed_in_vain_stops_and_comes_back_with_the_text():
    machine = create_machine(lambda n: 1.0 + 0.05 * n)

    def guessed_per_token(texts: Sequence[Text]) -> float:
        tokens, drafts = machine.num_answered_tokens, machine.num_draft_tokens
        machine.run(texts, 1)
        return (machine.num_draft_tokens - drafts) / (machine.num_answered_tokens - tokens)

    assert guessed_per_token(create_texts(8, copied=0.9, seed=1)) > 0.5
    # Tokens that match all the time, in vain.
    rng = random.Random(2)
    noise = [[rng.randrange(50) for _ in range(1000)] for _ in range(6)]
    texts = [(tokens[:200], tokens[200:]) for tokens in noise]
    machine.run(texts[:4], 1)
    assert guessed_per_token(texts[4:]) < 0.2
    # Nearly nothing was verified meanwhile, and it is known all the same that text is copied again.
    assert guessed_per_token(create_texts(8, copied=0.9, seed=3)) > 0.5


def test_one_request_in_vain_leaves_the_guesses_of_another_alone():
    speculator = create_speculator({}, (), 1.0, 0.05)
    speculator._proposer = NgramProposer(NGramDecodingConfig())
    rng = random.Random(0)
    copied = [rng.randrange(1000) for _ in range(30)]
    good, bad = list(copied), [rng.randrange(4) for _ in range(50)]
    last = {"good": 0, "bad": 0}
    for step in range(300):
        good.append(copied[step % 30])
        bad.append(rng.randrange(4))
        speculator.extended("good", good)
        speculator.extended("bad", bad)
        if step >= 200:
            last["good"] += len(speculator.guesses.get("good", ()))
            last["bad"] += len(speculator.guesses.get("bad", ()))
    assert last["good"] >= 100 * 7
    assert last["bad"] <= 100


def test_it_comes_on_when_rows_become_cheap_though_the_batch_stays_the_same():
    speculator = create_speculator({}, (), 0.05, 1.0)
    speculator._proposer = NgramProposer(NGramDecodingConfig())
    rng = random.Random(0)
    text = list(range(20))

    def steps(count: int, cost: Callable[[int], float]) -> int:
        guessed = 0
        for _ in range(count):
            text.append(text[-20] if rng.random() < 0.7 else rng.randrange(10_000))
            speculator.extended("a", text)
            num_guesses = len(speculator.guesses.get("a", ()))
            speculator.observe_step(1 + num_guesses, cost(1 + num_guesses))
            guessed += num_guesses > 0
        return guessed

    assert steps(400, lambda n: 0.05 + 1.0 * n) < 10
    steps(1500, memory_bound)
    assert steps(100, memory_bound) > 50
