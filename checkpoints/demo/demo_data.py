"""Generated translation data for the demo model: values, phrasings, and the held-out split.

This module owns what the demo model is asked and what counts as the right answer.  Number words
come from num2words, dates and decimal amounts from Babel; the sentences around them are the fixed
phrasings in ``TIME_SENTENCES`` and ``NOTICES``.  Every value (a number, date, time, name or code)
belongs to exactly one split, decided by a hash of the value itself, so a held-out value never
occurs in training, in whatever language or sentence.
"""

from __future__ import annotations

import datetime as dt
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from babel.dates import format_date, format_time
from babel.numbers import format_decimal
from num2words import num2words

Split = Literal["train", "held_out"]
T = TypeVar("T")

LANGUAGES: dict[str, str] = {"en": "English", "fr": "French", "de": "German", "es": "Spanish"}
LOCALES: dict[str, str] = {"en": "en_GB", "fr": "fr_FR", "de": "de_DE", "es": "es_ES"}
CATEGORIES: tuple[str, ...] = ("number", "digits", "date", "time", "notice")
# Trained beside the categories, never held out: single words and day-and-month pairs.  Without
# them the model long writes the right sentence with the wrong month.
LEXICON = "lexicon"
MAX_NUMBER = 9_999
FIRST_DAY = dt.date(1990, 1, 1)
LAST_DAY = dt.date(2049, 12, 31)
HELD_OUT_PERCENT = 8


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FIRST_NAMES = _words(
    "Anna Ben Clara David Elena Felix Greta Hugo Ines Jonas Karin Liam Marta Nora Oscar Paula "
    "Quentin Rosa Simon Tara Ulrich Vera Walter Yann Zoe Amelie Bruno Camille Diego Emma Fabian "
    "Gloria Henri Isabel Julia Karl Laura Manuel Nina Olivier Pilar Robert Sofia Thomas Victor "
    "Lucie Mateo Jean Louise Peter Sarah Michael Alice George Helen José Jürgen Chloé Sebastián "
    "Björn Noémie Íñigo André Mónica Günter"
)
LAST_NAMES = _words(
    "Keller Martin Dubois Garcia Schmidt Lopez Weber Moreau Fischer Torres Wagner Laurent Becker "
    "Ruiz Hoffmann Bernard Schulz Navarro Koch Petit Richter Romero Klein Durand Wolf Molina "
    "Neumann Leroy Schwarz Ortega Zimmermann Roux Braun Castro Hartmann Girard Lange Vidal Krause "
    "Fontaine Lehmann Blanco Walsh Carter Hughes Bennett Cooper Murphy Turner Parker Morgan Reed "
    "Foster Brooks Hayes Grant Müller Núñez Lefèvre Gómez Schäfer Pérez Björk Legrand"
)
_ONSETS = _words("b br c ch d dr f g gr h j k kl l m n p qu r s sch st t tr v w z")
_VOWELS = _words("a e i o u a e i o ai ei ie ou au ö é")
_CODAS = ["", "", "", "n", "r", "l", "s", "t", "nd", "ck", "rt", "ss", "m"]

ITEMS: tuple[dict[str, str], ...] = (
    {"en": "boxes", "fr": "cartons", "de": "Kartons", "es": "cajas"},
    {"en": "bottles", "fr": "bouteilles", "de": "Flaschen", "es": "botellas"},
    {"en": "books", "fr": "livres", "de": "Bücher", "es": "libros"},
    {"en": "chairs", "fr": "chaises", "de": "Stühle", "es": "sillas"},
    {"en": "lamps", "fr": "lampes", "de": "Lampen", "es": "lámparas"},
    {"en": "tables", "fr": "tables", "de": "Tische", "es": "mesas"},
    {"en": "keys", "fr": "clés", "de": "Schlüssel", "es": "llaves"},
    {"en": "cups", "fr": "tasses", "de": "Tassen", "es": "tazas"},
    {"en": "shirts", "fr": "chemises", "de": "Hemden", "es": "camisas"},
    {"en": "batteries", "fr": "piles", "de": "Batterien", "es": "pilas"},
)

# "{a_time}" is the time with its Spanish article ("las 15:05", but "la 1:05"); in the other
# languages it is the time alone.
TIME_SENTENCES: dict[str, dict[str, str]] = {
    "bare": {"en": "{time}", "fr": "{time}", "de": "{time}", "es": "{time}"},
    "meeting": {
        "en": "The meeting starts at {a_time}.",
        "fr": "La réunion commence à {a_time}.",
        "de": "Die Besprechung beginnt um {a_time}.",
        "es": "La reunión empieza a {a_time}.",
    },
    "opening": {
        "en": "The shop is open from {time} to {time2}.",
        "fr": "Le magasin est ouvert de {time} à {time2}.",
        "de": "Das Geschäft ist von {time} bis {time2} geöffnet.",
        "es": "La tienda está abierta de {time} a {time2}.",
    },
}

NOTICES: dict[str, dict[str, str]] = {
    "ordered": {
        "en": "{name} placed order {code} on {date}.",
        "fr": "{name} a passé la commande {code} le {date}.",
        "de": "{name} hat die Bestellung {code} am {date} aufgegeben.",
        "es": "{name} realizó el pedido {code} el {date}.",
    },
    "shipped": {
        "en": "Order {code} for {name} ships on {date}.",
        "fr": "La commande {code} pour {name} sera expédiée le {date}.",
        "de": "Die Bestellung {code} für {name} wird am {date} versandt.",
        "es": "El pedido {code} para {name} se enviará el {date}.",
    },
    "delayed": {
        "en": "Order {code} for {name} is delayed until {date}.",
        "fr": "La commande {code} pour {name} est retardée jusqu'au {date}.",
        "de": "Die Bestellung {code} für {name} verzögert sich bis zum {date}.",
        "es": "El pedido {code} para {name} se retrasa hasta el {date}.",
    },
    "collection": {
        "en": "Order {code} for {name} is ready for collection from {a_time}.",
        "fr": "La commande {code} pour {name} est prête à être retirée à partir de {a_time}.",
        "de": "Die Bestellung {code} für {name} ist ab {a_time} abholbereit.",
        "es": "El pedido {code} para {name} está listo para recoger a partir de {a_time}.",
    },
    "delivery": {
        "en": "Order {code} for {name} will be delivered on {date} at {a_time}.",
        "fr": "La commande {code} pour {name} sera livrée le {date} à {a_time}.",
        "de": "Die Bestellung {code} für {name} wird am {date} um {a_time} geliefert.",
        "es": "El pedido {code} para {name} se entregará el {date} a {a_time}.",
    },
    "cancelled": {
        "en": "Order {code} for {name} was cancelled on {date}.",
        "fr": "La commande {code} pour {name} a été annulée le {date}.",
        "de": "Die Bestellung {code} für {name} wurde am {date} storniert.",
        "es": "El pedido {code} para {name} se canceló el {date}.",
    },
    "invoice_due": {
        "en": "Invoice {code} for {name} is due on {date}.",
        "fr": "La facture {code} pour {name} est à régler le {date}.",
        "de": "Die Rechnung {code} für {name} ist am {date} fällig.",
        "es": "La factura {code} para {name} vence el {date}.",
    },
    "invoice_total": {
        "en": "Invoice {code} for {name} totals {amount} euros.",
        "fr": "La facture {code} pour {name} s'élève à {amount} euros.",
        "de": "Die Rechnung {code} für {name} beträgt {amount} Euro.",
        "es": "La factura {code} para {name} asciende a {amount} euros.",
    },
    "quantity": {
        "en": "Order {code} for {name} contains {quantity} {item}.",
        "fr": "La commande {code} pour {name} contient {quantity} {item}.",
        "de": "Die Bestellung {code} für {name} enthält {quantity} {item}.",
        "es": "El pedido {code} para {name} contiene {quantity} {item}.",
    },
}


@dataclass(frozen=True)
class Example:
    """One question with its single right answer.

    Attributes:
        category: One of ``CATEGORIES``.
        source: Source language code, or "iso"/"digits" where the input has no language.
        target: Target language code.
        prompt: The whole user message.
        answer: The expected assistant message.
        values: The keys (``kind:value``) the split was decided on.
    """

    category: str
    source: str
    target: str
    prompt: str
    answer: str
    values: tuple[str, ...]


def split_of(key: str) -> Split:
    """Returns the split that the value ``key`` (``kind:value``) belongs to.

    Args:
        key: Such as "number:312", "date:2026-03-14", "time:15:05", "name:Anna Keller" or
            "code:KX-4821".

    Returns:
        "held_out" for about ``HELD_OUT_PERCENT`` percent of all keys, otherwise "train".
    """
    kind, _, value = key.partition(":")
    if kind == "number" and (int(value) <= 100 or int(value) % 100 == 0):
        # The number words themselves: nothing else in the data could teach "seven" or "cinq cents".
        return "train"
    digest = hashlib.sha256(key.encode()).digest()
    return "held_out" if int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT else "train"


@functools.cache
def number_words(number: int, language: str) -> str:
    """Returns the cardinal ``number`` in words, as num2words writes it."""
    return str(num2words(number, lang=language))


@functools.cache
def date_text(date: dt.date, language: str, style: str = "long") -> str:
    """Returns the date as Babel writes it, with the French "1er" for the first of a month.

    Args:
        date: The day.
        language: Language code.
        style: Babel's "long" (14 March 2026) or "full" (with the weekday).
    """
    text = format_date(date, format=style, locale=LOCALES[language])
    if language == "fr" and date.day == 1:
        # CLDR has no ordinal day, but French writes the first of a month as an ordinal.
        text = text.replace("1 ", "1er ", 1)
    return text


@functools.cache
def time_text(time: dt.time, language: str) -> str:
    """Returns the time of day: 12-hour clock in English, 24-hour clock elsewhere."""
    pattern = {"en": "h:mm a", "fr": "H 'h' mm", "de": "HH:mm 'Uhr'", "es": "H:mm"}[language]
    locale = "en_US" if language == "en" else LOCALES[language]
    return format_time(time, format=pattern, locale=locale)


def time_with_article(time: dt.time, language: str) -> str:
    """Returns the time as it stands after a preposition (Spanish needs "la" or "las")."""
    if language != "es":
        return time_text(time, language)
    return ("la " if time.hour == 1 else "las ") + time_text(time, language)


def amount_text(cents: int, language: str) -> str:
    """Returns an amount below 1,000 with two decimals in the language's notation."""
    return format_decimal(cents / 100, format="0.00", locale=LOCALES[language])


def _draw(split: Split, kind: str, make: Callable[[], T]) -> tuple[T, str]:
    """Calls ``make`` until its value lies in ``split``; returns the value and its key."""
    while True:
        value = make()
        text = f"{value:%H:%M}" if isinstance(value, dt.time) else str(value)
        key = f"{kind}:{text}"
        if split_of(key) == split:
            return value, key


def draw_number(rng: random.Random, split: Split) -> tuple[int, str]:
    """Draws a number; the short ones, which are few, more often than their share."""

    def make() -> int:
        band = rng.random()
        if band < 0.12:
            return rng.randint(0, 100)
        return rng.randint(0, 999) if band < 0.35 else rng.randint(0, MAX_NUMBER)

    return _draw(split, "number", make)


def draw_date(rng: random.Random, split: Split) -> tuple[dt.date, str]:
    """Draws a day between ``FIRST_DAY`` and ``LAST_DAY``."""
    days = (LAST_DAY - FIRST_DAY).days
    return _draw(split, "date", lambda: FIRST_DAY + dt.timedelta(days=rng.randint(0, days)))


def draw_time(rng: random.Random, split: Split) -> tuple[dt.time, str]:
    """Draws a minute of the day, the full five minutes more often than the others."""

    def make() -> dt.time:
        minute = rng.randint(0, 59) if rng.random() < 0.6 else 5 * rng.randint(0, 11)
        return dt.time(rng.randint(0, 23), minute)

    return _draw(split, "time", make)


def _invented(rng: random.Random) -> str:
    syllables = rng.randint(1, 3)
    word = "".join(
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables)
    )
    return word.capitalize()


def draw_name(rng: random.Random, split: Split) -> tuple[str, str]:
    """Draws a first and last name; in training a third have invented parts, to teach copying."""
    invent = 0.35 if split == "train" else 0.0

    def make() -> str:
        first = _invented(rng) if rng.random() < invent else rng.choice(FIRST_NAMES)
        last = _invented(rng) if rng.random() < invent else rng.choice(LAST_NAMES)
        return f"{first} {last}"

    return _draw(split, "name", make)


def draw_code(rng: random.Random, split: Split) -> tuple[str, str]:
    """Draws an order code: most often like KX-4821, sometimes ABC-123, K-48210 or KX-482-B."""

    def letters(count: int) -> str:
        return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(count))

    def digits(count: int) -> str:
        return "".join(rng.choice("0123456789") for _ in range(count))

    def make() -> str:
        form = rng.random()
        if form < 0.7:
            return f"{letters(2)}-{digits(4)}"
        if form < 0.8:
            return f"{letters(3)}-{digits(3)}"
        if form < 0.9:
            return f"{letters(1)}-{digits(5)}"
        return f"{letters(2)}-{digits(3)}-{letters(1)}"

    return _draw(split, "code", make)


def _pair(rng: random.Random) -> tuple[str, str]:
    source, target = rng.sample(list(LANGUAGES), 2)
    return source, target


def instruct(target: str, text: str) -> str:
    """Returns the user message that asks for ``text`` in the target language."""
    return f"Translate to {LANGUAGES[target]}: {text}"


def _number(rng: random.Random, split: Split) -> Example:
    number, key = draw_number(rng, split)
    source, target = _pair(rng)
    prompt = instruct(target, number_words(number, source))
    return Example("number", source, target, prompt, number_words(number, target), (key,))


def _digits(rng: random.Random, split: Split) -> Example:
    number, key = draw_number(rng, split)
    target = rng.choice(list(LANGUAGES))
    prompt = instruct(target, str(number))
    return Example("digits", "digits", target, prompt, number_words(number, target), (key,))


def _date(rng: random.Random, split: Split) -> Example:
    date, key = draw_date(rng, split)
    source, target = _pair(rng)
    form = rng.random()
    if form < 0.2:
        prompt = instruct(target, date.isoformat())
        return Example("date", "iso", target, prompt, date_text(date, target), (key,))
    style = "long" if form < 0.6 else "full"
    prompt = instruct(target, date_text(date, source, style))
    return Example("date", source, target, prompt, date_text(date, target, style), (key,))


def _fill(template: str, language: str, slots: dict[str, object]) -> str:
    """Writes the slot values into ``template`` in the given language."""
    texts: dict[str, str] = {}
    for slot, value in slots.items():
        if isinstance(value, dt.time):
            texts[slot] = time_text(value, language)
            texts[f"a_{slot}"] = time_with_article(value, language)
        elif isinstance(value, dt.date):
            texts[slot] = date_text(value, language)
        elif slot == "item":
            texts[slot] = ITEMS[int(str(value))][language]
        elif slot == "amount":
            texts[slot] = amount_text(int(str(value)), language)
        else:
            texts[slot] = str(value)
    return template.format(**texts)


def _time(rng: random.Random, split: Split) -> Example:
    source, target = _pair(rng)
    form = rng.choices(list(TIME_SENTENCES), weights=(4, 3, 3))[0]
    (time, key), (time2, key2) = draw_time(rng, split), draw_time(rng, split)
    slots: dict[str, object] = {"time": time, "time2": time2}
    sentence = TIME_SENTENCES[form]
    prompt = instruct(target, _fill(sentence[source], source, slots))
    answer = _fill(sentence[target], target, slots)
    return Example(
        "time", source, target, prompt, answer, (key, key2) if form == "opening" else (key,)
    )


def _notice(rng: random.Random, split: Split) -> Example:
    source, target = _pair(rng)
    form = rng.choice(list(NOTICES))
    draws = {
        "name": draw_name(rng, split),
        "code": draw_code(rng, split),
        "date": draw_date(rng, split),
        "time": draw_time(rng, split),
    }
    sentence = NOTICES[form]
    used = [slot for slot in draws if f"{slot}}}" in sentence["en"]]
    slots: dict[str, object] = {slot: draws[slot][0] for slot in used}
    # Quantities and amounts are copied digits; the code and the name beside them carry the split.
    slots |= {
        "quantity": rng.randint(2, 99),
        "item": rng.randrange(len(ITEMS)),
        "amount": rng.randint(100, 99_999),
    }
    prompt = instruct(target, _fill(sentence[source], source, slots))
    answer = _fill(sentence[target], target, slots)
    keys = tuple(draws[slot][1] for slot in used)
    return Example("notice", source, target, prompt, answer, keys)


def _lexicon(rng: random.Random, split: Split) -> Example:
    """Draws a month, a weekday, an item, a day with its month, or an item with its count."""
    source, target = _pair(rng)
    date, _ = draw_date(rng, split)
    form = rng.choice(("month", "month", "weekday", "item", "day", "count"))
    item = rng.choice(ITEMS)

    def write(language: str) -> str:
        locale = LOCALES[language]
        if form == "month":
            return format_date(date, "LLLL", locale=locale)
        if form == "weekday":
            return format_date(date, "cccc", locale=locale)
        if form == "day":
            return (
                date_text(date, language).removesuffix(str(date.year)).removesuffix(" de ").strip()
            )
        return item[language] if form == "item" else f"{date.day + 1} {item[language]}"

    return Example(LEXICON, source, target, instruct(target, write(source)), write(target), ())


_MAKERS: dict[str, Callable[[random.Random, Split], Example]] = {
    "number": _number,
    "digits": _digits,
    "date": _date,
    "time": _time,
    "notice": _notice,
    LEXICON: _lexicon,
}


def make_example(rng: random.Random, split: Split, category: str) -> Example:
    """Returns one random example of ``category`` whose values all lie in ``split``."""
    return _MAKERS[category](rng, split)


def held_out_examples(count: int = 2_400, seed: int = 2026) -> list[Example]:
    """Returns the deterministic held-out test set: distinct prompts, categories interleaved.

    Args:
        count: How many examples.
        seed: Seed of the draw; the set is the same for the same count and seed.
    """
    rng = random.Random(seed)
    # Eight slots: words and notices count three and two times, as they are the main use.
    cycle: Sequence[str] = (
        "number", "notice", "date", "digits", "number", "notice", "time", "notice",
    )  # fmt: skip
    examples: list[Example] = []
    seen: set[str] = set()
    while len(examples) < count:
        example = make_example(rng, "held_out", cycle[len(examples) % len(cycle)])
        if example.prompt not in seen:
            seen.add(example.prompt)
            examples.append(example)
    return examples
