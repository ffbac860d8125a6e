"""Trains the demo model from nothing on generated data and writes the checkpoint beside itself.

This module owns the training recipe: packing chats into sequences, the optimizers, the schedule
(which ends at a time limit), and the held-out check during training.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import demo_data
import torch
import torch.nn.functional as F
from demo_model import DemoModel, ModelShape, save_checkpoint
from demo_tokenizer import BEGIN, END, MAX_POSITIONS, PAD, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

# How often each category is drawn, and how often a chat is a lone exchange (what is asked most).
CATEGORY_WEIGHTS = {
    "number": 0.28,
    "digits": 0.12,
    "date": 0.16,
    "time": 0.10,
    "notice": 0.24,
    demo_data.LEXICON: 0.10,
}
LONE_CHATS = 0.6
SYSTEM_CHATS = 0.25
SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are a translator.",
    "Translate exactly. Answer with the translation only.",
    "Be brief.",
)
GREETINGS = ("Hello", "Hello!", "Hi", "Hi!", "Hello, who are you?", "Who are you?", "Help")
GREETING_ANSWER = (
    "Hello! I translate numbers, dates, times and order notices between English, French, German "
    "and Spanish."
)


@dataclass
class Packer:
    """Draws chats and packs them back to back into sequences without padding between them.

    Attributes:
        tokenizer: The tokenizer.
        length: Tokens in a sequence.
        rng: Source of all draws.
        prompt_weight: Loss weight of user and system tokens; assistant tokens have weight 1.
    """

    tokenizer: Tokenizer
    length: int
    rng: random.Random
    prompt_weight: float = 0.05
    drawn: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._ids = {t: self.tokenizer.token_to_id(t) for t in self.tokenizer.get_vocab()}
        self._waiting: list[tuple[list[int], list[float]]] = []

    def _exchange(self) -> tuple[str, str]:
        if self.rng.random() < 0.004:
            return self.rng.choice(GREETINGS), GREETING_ANSWER
        names, weights = zip(*CATEGORY_WEIGHTS.items(), strict=True)
        category = self.rng.choices(names, weights=weights)[0]
        self.drawn[category] += 1
        example = demo_data.make_example(self.rng, "train", category)
        prompt = example.prompt
        if self.rng.random() < 0.08:
            prompt = prompt.replace("Translate to", self.rng.choice(("Translate into", "To")), 1)
        return prompt, example.answer

    def chat(self) -> tuple[list[int], list[float]]:
        """Returns the token ids of one chat and the loss weight of each as a target."""
        rng, ids, low = self.rng, self._ids, self.prompt_weight
        turns: list[tuple[str, str]] = []
        if rng.random() < SYSTEM_CHATS:
            turns.append(("system", rng.choice(SYSTEM_TEXTS)))
        for _ in range(1 if rng.random() < LONE_CHATS else rng.randint(2, 6)):
            prompt, answer = self._exchange()
            turns += [("user", prompt), ("assistant", answer)]
        tokens, weights = [ids[BEGIN]], [0.0]
        encoded = self.tokenizer.encode_batch([text for _, text in turns])
        for (role, _), encoding in zip(turns, encoded, strict=True):
            piece = [ids[f"<|{role}|>"], *encoding.ids, ids[END]]
            if len(tokens) + len(piece) > self.length:
                break
            weight = 1.0 if role == "assistant" else low
            tokens += piece
            # The role token is given by the chat template, never generated.
            weights += [0.0] + [weight] * (len(piece) - 1)
        return tokens, weights

    def sequence(self) -> tuple[list[int], list[float], list[int], list[int]]:
        """Returns tokens, weights, chat numbers and positions of one packed sequence."""
        tokens: list[int] = []
        weights: list[float] = []
        chats: list[int] = []
        positions: list[int] = []
        number = 0
        while True:
            while len(self._waiting) < 32:
                self._waiting.append(self.chat())
            # The oldest chat that fits, so that long chats are used as often as they are drawn.
            room = self.length - len(tokens)
            fits = next((i for i, c in enumerate(self._waiting) if len(c[0]) <= room), None)
            if fits is None:
                break
            chat, weight = self._waiting.pop(fits)
            far = self.rng.random() < 0.3
            start = self.rng.randint(0, MAX_POSITIONS - len(chat)) if far else 0
            tokens += chat
            weights += weight
            chats += [number] * len(chat)
            positions += range(start, start + len(chat))
            number += 1
        rest = self.length - len(tokens)
        tokens += [self._ids[PAD]] * rest
        weights += [0.0] * rest
        chats += [-1] * rest
        positions += [0] * rest
        return tokens, weights, chats, positions

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns tokens, weights, positions and the attention mask of ``size`` sequences."""
        tokens, weights, chats, positions = (
            torch.tensor(column)
            for column in zip(*(self.sequence() for _ in range(size)), strict=True)
        )
        same = chats[:, None, :, None] == chats[:, None, None, :]
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        return tokens, weights, positions, same & causal


def learning_rate_scale(progress: float, warmup: float = 0.01, decay_from: float = 0.15) -> float:
    """Returns the trapezoid schedule: warm up, hold, then fall linearly to zero at 1."""
    if progress < warmup:
        return max(progress / warmup, 0.02)
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - decay_from)))


def make_optimizers(
    model: DemoModel, muon_rate: float, adam_rate: float
) -> list[torch.optim.Optimizer]:
    """Returns Muon for the layers' matrices and AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=muon_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def batch_loss(model: DemoModel, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Returns the weighted mean cross-entropy of the next tokens."""
    tokens, weights, positions, mask = batch
    target_weights = F.pad(weights[:, 1:], (0, 1)).flatten()
    rows = target_weights.nonzero().squeeze(1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, positions, mask, rows)
    targets = F.pad(tokens[:, 1:], (0, 1)).flatten()[rows]
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    chosen = target_weights[rows]
    return (losses * chosen).sum() / chosen.sum()


def greedy_accuracy(
    directory: Path,
    examples: list[demo_data.Example],
    batch_size: int = 100,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, tuple[int, int]], list[tuple[demo_data.Example, str]]]:
    """Answers ``examples`` greedily with the saved checkpoint through transformers.

    Args:
        directory: The checkpoint.
        examples: What to ask.
        batch_size: How many to answer at once.
        dtype: What to compute in.

    Returns:
        Right answers and questions by category and by language pair, and the wrong answers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    wrong: list[tuple[demo_data.Example, str]] = []
    ordered = sorted(examples, key=lambda e: len(e.prompt))
    for start in range(0, len(ordered), batch_size):
        group = ordered[start : start + batch_size]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": e.prompt}], tokenize=False, add_generation_prompt=True
            )
            for e in group
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
        inputs.pop("token_type_ids", None)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=72, do_sample=False)
        answers = tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for example, answer in zip(group, answers, strict=True):
            correct = answer == example.answer
            for key in ("total", example.category, f"{example.source}>{example.target}"):
                asked[key] += 1
                right[key] += correct
            if not correct:
                wrong.append((example, answer))
    return {key: (right[key], asked[key]) for key in sorted(asked)}, wrong


def report(line: dict[str, object], log: Path) -> None:
    """Prints one JSON line and appends it to the log."""
    text = json.dumps(line, ensure_ascii=False)
    print(text, flush=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(text + "\n")


def check_held_out(
    directory: Path, log: Path, count: int, show: int = 6, dtype: torch.dtype = torch.float32
) -> None:
    """Measures the saved checkpoint on held-out examples and logs the result."""
    started = time.monotonic()
    table, wrong = greedy_accuracy(directory, demo_data.held_out_examples(count), dtype=dtype)
    shown = [f"{e.prompt} => {answer} (right: {e.answer})" for e, answer in wrong[:show]]
    percent = {key: round(100 * right / asked, 2) for key, (right, asked) in table.items()}
    seconds = round(time.monotonic() - started, 1)
    report({"held_out": count, "percent": percent, "wrong": shown, "seconds": seconds}, log)


def train(args: argparse.Namespace) -> None:
    """Runs the training until the time limit and writes checkpoints on the way."""
    torch.manual_seed(args.seed)
    directory: Path = args.out
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.seed)
    save_tokenizer(tokenizer, directory)
    ids = {k: tokenizer.token_to_id(t) for k, t in (("bos", BEGIN), ("eos", END), ("pad", PAD))}
    packer = Packer(tokenizer, args.length, random.Random(args.seed))
    model = DemoModel(ModelShape(vocab_size=tokenizer.get_vocab_size()))
    optimizers = make_optimizers(model, args.muon_rate, args.adam_rate)
    parameters = sum(p.numel() for p in model.parameters())
    report({"parameters": parameters, "args": {k: str(v) for k, v in vars(args).items()}}, args.log)

    started = last_save = time.monotonic()
    step, answer_tokens, mean_loss = 0, 0, 0.0
    while (progress := (time.monotonic() - started) / (60 * args.minutes)) < 1.0:
        batch = packer.batch(args.batch_size)
        loss = batch_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = learning_rate_scale(progress)
        for optimizer, rate in zip(optimizers, (args.muon_rate, args.adam_rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        answer_tokens += int((batch[1] == 1.0).sum())
        mean_loss = loss.item() if step == 1 else 0.98 * mean_loss + 0.02 * loss.item()
        if step % args.log_every == 0:
            seconds = time.monotonic() - started
            line = {"step": step, "minutes": round(seconds / 60, 2), "loss": round(mean_loss, 4)}
            tokens = step * args.batch_size * args.length
            line |= {"tokens": tokens, "answer_tokens": answer_tokens}
            report(line | {"tokens_per_s": round(tokens / seconds), "scale": scale}, args.log)
        if time.monotonic() - last_save > 60 * args.save_minutes:
            save_checkpoint(model, directory, ids)
            if args.check:
                check_held_out(directory, args.log, args.check)
            last_save = time.monotonic()
    save_checkpoint(model, directory, ids)
    if args.final_check:
        check_held_out(directory, args.log, args.final_check)


def main() -> None:
    """Reads the command line and trains."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=here, help="checkpoint directory")
    parser.add_argument("--log", type=Path, default=Path("demo-training.jsonl"))
    parser.add_argument("--minutes", type=float, default=70.0, help="time limit of the training")
    parser.add_argument("--save-minutes", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=16, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--muon-rate", type=float, default=3e-3)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--check", type=int, default=320, help="held-out examples at each save")
    parser.add_argument("--final-check", type=int, default=2_400)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument(
        "--only-check",
        choices=("float32", "bfloat16"),
        help="train nothing: measure the checkpoint on --final-check held-out examples",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only_check:
        dtype = getattr(torch, args.only_check)
        check_held_out(args.out, args.log, args.final_check, show=100, dtype=dtype)
    else:
        train(args)


if __name__ == "__main__":
    main()
