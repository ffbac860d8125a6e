"""Random tiny models on disk, made through transformers, for every test that needs a checkpoint.

The values are meant to make mistakes visible: matrices with a standard deviation of 0.1 instead
of 0.02, so that attention and MLP matter; norm weights uniform in [0.5, 1.5] and biases that are
not zero, so that one left out shows.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

INITIALIZER_RANGE = 0.1
SPECIAL_TOKENS = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
BOS_TOKEN_ID, EOS_TOKEN_ID, END_TOKEN_ID = 0, 1, 4
VOCAB_SIZE = 320  # 5 special tokens, 256 bytes, 59 merges: the tokenizer fills the embedding
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0}

_CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other dog jumps over the fox",
    "twenty-three, quarante-deux, achtundneunzig, cincuenta y cinco: numbers in four languages",
    "please send three boxes of type AB-12 to the warehouse on Monday the 4th of March at 10:30",
)


def llama_config(**overrides: Any) -> LlamaConfig:
    """A tiny Llama: two layers, grouped-query attention, untied; ``overrides`` as HF names them."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "initializer_range": INITIALIZER_RANGE,
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "attn_implementation": "eager",
    }
    # transformers writes into the dicts it is given.
    return LlamaConfig(**(settings | deepcopy(overrides)))


def make_llama(
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    tokenizer: bool = True,
    generation_config: dict[str, Any] | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a random Llama checkpoint with tokenizer and generation_config.json, as HF has it.

    Args:
        path: The directory to make.
        seed: Of all weights. The same seed and config give the same values in any dtype, rounded.
        dtype: Of the tensors on disk.
        max_shard_size: e.g. '50KB' for several files and an index.
        tokenizer: Write the tokenizer files; its ids need a vocab_size of at least VOCAB_SIZE.
        generation_config: Replaces generation_config.json's content, which is else the BOS id
            and a list of two EOS ids.
        config_overrides: LlamaConfig's names, e.g. ``head_dim=32``, ``attention_bias=True``,
            ``rope_scaling=LLAMA3_ROPE``, ``tie_word_embeddings=True``.

    Returns:
        ``path``.
    """
    transformers_logging.disable_progress_bar()
    model = LlamaForCausalLM(llama_config(**config_overrides))
    randomize(model, seed)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    generation = generation_config or {
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": [EOS_TOKEN_ID, END_TOKEN_ID],
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        if model.config.vocab_size < VOCAB_SIZE:
            raise ValueError(f"the tokenizer has {VOCAB_SIZE} ids: pass tokenizer=False")
        make_tokenizer(path)
    return path


def load_llama(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """The checkpoint in transformers, eager attention, in ``dtype``: the oracle."""
    model = LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")
    return model.to(dtype).eval()


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter, by name and not by transformers' order of creation."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0.0, INITIALIZER_RANGE, generator=generator)


@cache
def byte_level_bpe() -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE ids that adds <s>, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        _CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS_TOKEN_ID)]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def make_tokenizer(path: Path) -> Path:
    """Write tokenizer.json, tokenizer_config.json (with a chat template), special_tokens_map.json.

    Returns:
        ``path``.
    """
    path.mkdir(parents=True, exist_ok=True)
    byte_level_bpe().save(str(path / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    config = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "special_tokens_map.json").write_text(json.dumps(special))
    return path
