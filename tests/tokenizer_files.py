"""Small tokenizers on disk, made in milliseconds with ``tokenizers`` alone."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Ids of the special tokens, in this order.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|bos|>")
EOS_ID, IM_START_ID, IM_END_ID, BOS_ID = range(4)

_CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "user assistant system: hello world, how are you today? I am fine, thank you.",
    "one two three four five six seven eight nine ten",
]


def write_tokenizer(
    directory: Path,
    *,
    chat_template: str | list[dict[str, str]] | None = CHATML,
    generation_config: dict[str, Any] | None = None,
    add_bos: bool = False,
    **tokenizer_config: Any,
) -> Path:
    """Write the files of a byte-level BPE tokenizer of 320 tokens into ``directory``.

    Args:
        directory: Made if it is not there.
        chat_template: Goes into tokenizer_config.json; None for none.
        generation_config: Replaces the default one, which has the eos_token_id list
            [EOS_ID, IM_END_ID] and do_sample false.
        add_bos: Let encoding with special tokens put <|bos|> in front.
        **tokenizer_config: More keys of tokenizer_config.json, or other values for them.

    Returns:
        The directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_byte_level_json(add_bos), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|bos|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    config.update(tokenizer_config)
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(
        directory / "generation_config.json",
        generation_config
        if generation_config is not None
        else {"eos_token_id": [EOS_ID, IM_END_ID], "bos_token_id": BOS_ID, "do_sample": False},
    )
    return directory


def write_metaspace_tokenizer(directory: Path) -> Path:
    """Write a sentencepiece-like tokenizer: metaspace, byte fallback, Llama 2's decoder."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(_metaspace_json(), encoding="utf-8")
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
        },
    )
    _write_json(directory / "generation_config.json", {"eos_token_id": 2})
    return directory


@cache
def _byte_level_json(add_bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    if add_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", BOS_ID)]
        )
    return tokenizer.to_str()


@cache
def _metaspace_json() -> str:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyz,.é", "▁t", "he", "▁the", "▁a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in ("<unk>", "<s>", "</s>")]
    )
    return tokenizer.to_str()


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
