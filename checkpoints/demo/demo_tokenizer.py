"""The demo model's tokenizer: byte-level BPE with single-character codes, and its chat template.

This module owns tokenizer.json, tokenizer_config.json and chat_template.jinja.  Digits and
capital letters that do not begin a lower-case word are always tokens of their own, so copying a
code such as KX-4821 means copying eight single tokens.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import demo_data
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 1_024
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, BEGIN, END, *(f"<|{role}|>" for role in ROLES))
MAX_POSITIONS = 2_048

# The seams of German numbers, which are written as one word: without them BPE would merge across
# ("hundert|achtzehn" into "hunder|tach|t|zehn") and cut the same number word in many ways.
SEAMS = r"hundert|tausend|und(?=(?:zwan|drei|vier|fünf|sech|sieb|acht|neun)(?:zig|ßig))"

# In order: one digit; one capital that starts no word; a word with its leading space; one other
# sign with its leading space; white space.
PIECES = (
    r"\p{N}|\p{Lu}(?!\p{Ll})| ?\p{L}[\p{Ll}\p{Lo}\p{Lm}\p{M}]+| ?[\p{Ll}\p{Lo}\p{Lm}]"
    r"| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s"
)

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{- raise_exception('Unknown role: ' + message['role']) }}
{%- endif %}
{{- '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""


def _corpus(seed: int) -> Iterator[str]:
    """Yields the texts that the BPE merges are learned from."""
    rng = random.Random(seed)
    for _ in range(12_000):
        category = rng.choice(("date", "time", "notice", "number", "number", "number"))
        example = demo_data.make_example(rng, "train", category)
        yield example.prompt
        yield example.answer


def train_tokenizer(seed: int = 0) -> Tokenizer:
    """Learns and returns the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SEAMS), behavior="isolated"),
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
