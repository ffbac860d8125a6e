"""A request's SamplingParams as TensorRT-LLM's: field by field, or refused by name.

Its defaults differ from ours (a temperature alone leaves its C++ runtime greedy), so nothing that
matters is left to them. ``n`` is taken apart above, stop strings and text are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmserve.core.request import DEFAULT_RETENTION_PRIORITY, INTERACTIVE_PRIORITY, Request
from llmserve.core.sampling_params import SamplingParams
from llmserve.errors import InvalidRequestError
from llmserve.runtime.tensorrt_llm_release import TensorRTLLMRelease

# What its executor takes for "no token ends it". ``ignore_eos`` would do the same and, in 1.3, drop
# the stop tokens as well.
NO_END_ID = -1
_MAX_ENGINE_TOP_K = 1024  # its kernels' limit, to which more is cut without an error
_UINT64 = 2**64
_GOLDEN_RATIO = 0x9E3779B97F4A7C15  # 2^64 / phi: seeds of neighbouring sequences lie far apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What a loaded LLM can do for a request.

    Attributes:
        release: Which it is.
        is_engine: It runs a TensorRT engine.
        vocab_size: Of its logits.
        logprobs: It can give log-probabilities.
        prompt_logprobs: It can give the logits of a prompt.
        prompt_ignore_length: Its SamplingParams has this field; without it, presence and frequency
            penalties count the prompt's tokens too.
    """

    release: TensorRTLLMRelease
    is_engine: bool
    vocab_size: int
    logprobs: bool
    prompt_logprobs: bool
    prompt_ignore_length: bool


def sampling_arguments(request: Request, abilities: Abilities) -> dict[str, Any]:
    """The keyword arguments of TensorRT-LLM's SamplingParams for a request.

    Raises:
        InvalidRequestError: A parameter that it cannot honour with our meaning.
    """
    _refuse(request)
    params = request.sampling_params
    end_id, stop_token_ids = end_tokens(request)
    arguments: dict[str, Any] = {
        "max_tokens": params.max_tokens,
        "end_id": end_id,
        "pad_id": max(end_id, 0),
        "stop_token_ids": stop_token_ids or None,
        # Else it would take a stop token off the tokens again.
        "include_stop_str_in_output": True,
        "detokenize": False,
    }
    if params.greedy:
        arguments["top_k"] = 1
    else:
        arguments |= _sampling(request, abilities)
    arguments |= _penalties(request, abilities)
    if params.min_tokens:
        if stop_token_ids:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}; TensorRT-LLM holds back one end-of-sequence "
                f"token alone, and tokens {stop_token_ids} end this answer as well: leave it out",
                param="min_tokens",
            )
        arguments["min_tokens"] = params.min_tokens
    if params.logit_bias:
        arguments["embedding_bias"] = _embedding_bias(params, abilities)
    if params.prompt_logprobs is not None:
        if not abilities.prompt_logprobs:
            raise InvalidRequestError(
                "prompt_logprobs is set, and this engine does not keep the logits for them; build "
                "it with --gather_context_logits",
                param="prompt_logprobs",
            )
        # Its own log-probabilities of a prompt leave out those of the tokens that stand there.
        arguments["return_context_logits"] = True
    if params.logprobs is not None:
        if not abilities.logprobs:
            raise InvalidRequestError(
                "logprobs is set, and this engine does not keep the logits for them; start the "
                "server with --gather-generation-logits",
                param="logprobs",
            )
        # It takes 0 for none; the sampled token's is among those of one.
        arguments["logprobs"] = max(params.logprobs, 1)
    return arguments


def end_tokens(request: Request) -> tuple[int, list[int]]:
    """Its ``end_id``, of which there is one, and the other tokens that end the answer."""
    eos = () if request.sampling_params.ignore_eos else request.eos_token_ids
    end_id = eos[0] if eos else NO_END_ID
    others = dict.fromkeys((*eos, *request.sampling_params.stop_token_ids))
    return end_id, [token_id for token_id in others if token_id != end_id]


def _refuse(request: Request) -> None:
    """Raise for what it has no words for."""
    if request.sampling_params.guided_decoding is not None:
        raise InvalidRequestError(
            "guided_decoding is set; TensorRT-LLM needs a tokenizer of its own for it and is run "
            "without one: use the native backend",
            param="guided_decoding",
        )
    for name, neutral in (
        ("priority", INTERACTIVE_PRIORITY),
        ("retention_priority", DEFAULT_RETENTION_PRIORITY),
    ):
        if (value := getattr(request, name)) != neutral:
            raise InvalidRequestError(
                f"{name} is {value}; TensorRT-LLM's API has none for a request: leave it out",
                param=name,
            )


def _embedding_bias(params: SamplingParams, abilities: Abilities) -> Any:
    """float32 (vocab_size,), on the CPU."""
    # Not at the top: this process computes nothing, and torch is a heavy import.
    import torch

    bias = torch.zeros(abilities.vocab_size)
    for token_id, value in params.logit_bias:
        bias[token_id] += value
    return bias


def _sampling(request: Request, abilities: Abilities) -> dict[str, Any]:
    params = request.sampling_params
    top_k = params.top_k or 0
    if abilities.is_engine and top_k > _MAX_ENGINE_TOP_K:
        raise InvalidRequestError(
            f"top_k is {top_k}; with a TensorRT engine it must be at most {_MAX_ENGINE_TOP_K}, or "
            "0 for all tokens",
            param="top_k",
        )
    arguments: dict[str, Any] = {
        "temperature": 1.0 if params.temperature is None else params.temperature,
        "top_k": top_k,
        "top_p": 1.0 if params.top_p is None else params.top_p,
    }
    if params.min_p:
        _check_penalties("min_p", params.min_p, abilities)
        arguments["min_p"] = params.min_p
    if params.seed is not None:
        arguments["seed"] = (params.seed + request.sequence_index * _GOLDEN_RATIO) % _UINT64
    return arguments


def _penalties(request: Request, abilities: Abilities) -> dict[str, Any]:
    params, arguments = request.sampling_params, dict[str, Any]()
    for name, neutral in (
        ("repetition_penalty", 1.0),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0.0),
    ):
        value: float = getattr(params, name)
        if value == neutral:
            continue
        _check_penalties(name, value, abilities)
        arguments[name] = value
        if name == "repetition_penalty":
            continue
        if not abilities.prompt_ignore_length:
            raise InvalidRequestError(
                f"{name} is {value}; {abilities.release} would count the prompt's tokens with the "
                "answer's: leave it out, or use repetition_penalty",
                param=name,
            )
        arguments["prompt_ignore_length"] = len(request.prompt_token_ids)
    return arguments


def _check_penalties(name: str, value: float, abilities: Abilities) -> None:
    if not abilities.release.has_penalties:
        raise InvalidRequestError(
            f"{name} is {value}; {abilities.release} takes it and ignores it: leave it out, or "
            "install 1.3.0rc24 or later",
            param=name,
        )
