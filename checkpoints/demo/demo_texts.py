"""Writes calib.jsonl and heldout.jsonl: chats of the demo model's own kind, as it was trained on.

Such a small model knows nothing but its task, so that its activations, and what quantisation costs,
are best measured on that. Calibration draws from what the model was trained on; the held-out chats
have values that it has never seen.

    python checkpoints/demo/demo_texts.py
    llmserve convert checkpoints/demo OUT --quant fp8 --calib checkpoints/demo/calib.jsonl \
        --quality --quality-text checkpoints/demo/heldout.jsonl
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from demo_data import CATEGORIES, Example, held_out_examples, make_example

HERE = Path(__file__).parent
CALIBRATION_CHATS = 512
HELD_OUT_CHATS = 256
_SEED = 1234


def calibration_examples() -> list[Example]:
    """Examples of every category in turn, of values that the model was trained on."""
    rng = random.Random(_SEED)
    categories = (CATEGORIES[i % len(CATEGORIES)] for i in range(CALIBRATION_CHATS))
    return [make_example(rng, "train", category) for category in categories]


def write(path: Path, examples: Iterable[Example]) -> None:
    """Write a line for each example, with the special tokens that the chat template would write."""
    lines = (f"<|begin|><|user|>{e.prompt}<|end|><|assistant|>{e.answer}<|end|>" for e in examples)
    text = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Write both files beside this one."""
    write(HERE / "calib.jsonl", calibration_examples())
    write(HERE / "heldout.jsonl", held_out_examples(HELD_OUT_CHATS))


if __name__ == "__main__":
    main()
