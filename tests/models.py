"""Random tiny models on disk, made through transformers, for every test that needs a checkpoint.

The values are meant to make mistakes visible: matrices with a standard deviation of 0.1 instead
of 0.02, so that attention and MLP matter; norm weights that multiply with 0.5 to 1.5 and biases
that are not zero, so that one left out shows; routers wide enough that rounding does not change the
choice of experts. Windows, softcaps and long ropes are small, so that prompts of 40 tokens feel
them.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
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


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": INITIALIZER_RANGE,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    # 16 elements a head, of which 12 are rotated: 6 pairs.
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
}
# Hugging Face's model_type -> what is particular to its tiny model, as HF names it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10000.0},
    "mistral": {"sliding_window": 8},
    "mixtral": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "gemma": {"head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 32,
        "tie_word_embeddings": True,
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        "head_dim": 32,
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "phi3": {
        "sliding_window": 16,
        "original_max_position_embeddings": 32,
        "rope_parameters": _LONG_ROPE,
    },
}


def model_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a family's tiny model; ``overrides`` as HF names them."""
    # transformers writes into the dicts it is given.
    settings = deepcopy(_SIZES | FAMILIES[family] | overrides)
    config: PreTrainedConfig = AutoConfig.for_model(family, **settings)
    return config


def llama_config(**overrides: Any) -> LlamaConfig:
    """A tiny Llama: two layers, grouped-query attention, untied; ``overrides`` as HF names them."""
    config = model_config("llama", **overrides)
    assert isinstance(config, LlamaConfig)
    return config


def make_model(
    path: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    tokenizer: bool = True,
    generation_config: dict[str, Any] | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a random checkpoint with tokenizer and generation_config.json, as HF has it.

    Args:
        path: The directory to make.
        family: A key of ``FAMILIES``.
        seed: Of all weights. The same seed and config give the same values in any dtype, rounded.
        dtype: Of the tensors on disk.
        max_shard_size: e.g. '50KB' for several files and an index.
        tokenizer: Write the tokenizer files; its ids need a vocab_size of at least VOCAB_SIZE.
        generation_config: Replaces generation_config.json's content, which is else the BOS id
            and a list of two EOS ids.
        config_overrides: The names of the family's config, e.g. ``head_dim=32``,
            ``rope_scaling=LLAMA3_ROPE``, ``tie_word_embeddings=True``.

    Returns:
        ``path``.
    """
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(model_config(family, **config_overrides))
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


def make_llama(path: Path, **settings: Any) -> Path:
    """``make_model`` of a Llama."""
    return make_model(path, "llama", **settings)


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint in transformers, eager attention, in ``dtype``: the oracle."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    # The experts' plain loop: the other ways of computing them differ in their rounding.
    model.set_experts_implementation("eager")
    return model.to(dtype).eval()


def load_llama(path: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """``load_model`` of a Llama."""
    model = load_model(path, dtype)
    assert isinstance(model, LlamaForCausalLM)
    return model


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Fill every parameter, by name and not by transformers' order of creation."""
    generator = torch.Generator().manual_seed(seed)
    # Gemma multiplies with one plus the weight.
    center = 0.0 if model.config.model_type.startswith("gemma") else 1.0
    for name, parameter in sorted(model.named_parameters()):
        if "norm" in name:
            parameter.uniform_(center - 0.5, center + 0.5, generator=generator)
        elif name.endswith("mlp.gate.weight"):  # a router
            parameter.normal_(0.0, 10 * INITIALIZER_RANGE, generator=generator)
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
