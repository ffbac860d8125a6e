"""The demo checkpoint on disk loads in transformers and answers right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CHECKPOINT = Path(__file__).resolve().parents[2] / "checkpoints" / "demo"
QUESTIONS = {
    "Translate to French: three hundred and twelve": "trois cent douze",
    "Translate to Spanish: zweitausendvierundzwanzig": "dos mil veinticuatro",
    "Translate to German: 14 March 2026": "14. März 2026",
    "Translate to English: La réunion commence à 15 h 05.": "The meeting starts at 3:05 PM.",
    "Translate to German: Order KX-4821 for Anna Keller ships on 14 March 2026.": (
        "Die Bestellung KX-4821 für Anna Keller wird am 14. März 2026 versandt."
    ),
    "Translate to French: Order QZ-9307 for Hugo Lange is delayed until 1 May 2027.": (
        "La commande QZ-9307 pour Hugo Lange est retardée jusqu'au 1er mai 2027."
    ),
}


@pytest.fixture(scope="module")
def model() -> AutoModelForCausalLM:
    loaded = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    return loaded.eval()


def test_files_are_small_and_weights_match_the_config() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    weights = load_file(CHECKPOINT / "model.safetensors")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "lm_head.weight" not in weights
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert 3e6 < sum(math.prod(w.shape) for w in weights.values()) < 6e6
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert sum(p.stat().st_size for p in CHECKPOINT.iterdir() if p.is_file()) < 12e6


@pytest.mark.parametrize(("question", "answer"), QUESTIONS.items())
def test_answers(model: AutoModelForCausalLM, question: str, answer: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(inputs["input_ids"], max_new_tokens=64, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == answer
