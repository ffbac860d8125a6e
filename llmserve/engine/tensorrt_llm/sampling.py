"""A request's SamplingParams as TensorRT-LLM's: field by field, or refused by name.

Its defaults differ from ours (a temperature alone leaves its C++ runtime greedy), so nothing that
matters is left to them. ``n`` is taken apart above, stop strings and text are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmserve.core.request import Request
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
        logprobs: It can give log-probabilities.
        prompt_ignore_length: Its SamplingParams has this field; without it, presence and frequency
            penalties count the prompt's tokens too.
    """

    release: TensorRTLLMRelease
    is_engine: bool
    logprobs: bool
    prompt_ignore_length: bool


def sampling_arguments(request: Request, abilities: Abilities) -> dict[str, Any]:
    """The keyword arguments of TensorRT-LLM's SamplingParams for a request.

    Raises:
        InvalidRequestError: A parameter that it cannot honour with our meaning.
    """
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
