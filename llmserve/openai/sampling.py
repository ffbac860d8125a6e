"""From a request's fields to SamplingParams."""

from __future__ import annotations

from dataclasses import replace

from llmserve.core.sampling_params import SamplingParams
from llmserve.openai.protocol import GenerationRequest
from llmserve.tokenizer import GenerationConfig

_OPENAI_TEMPERATURE = 1.0  # documented as the default; a model's own default comes before it


def to_sampling_params(
    request: GenerationRequest,
    defaults: GenerationConfig,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None,
) -> SamplingParams:
    """Translate a request.

    Args:
        request: What the client set wins.
        defaults: Where the client set nothing; then OpenAI's, which is temperature 1.
        max_tokens: None fills the context.
        logprobs, prompt_logprobs: As SamplingParams has them.

    Raises:
        InvalidRequestError: Values that do not go together.
    """
    guide = request.guided_decoding
    sampling = {"temperature": _OPENAI_TEMPERATURE, **defaults.sampling_defaults()}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        given = getattr(request, name)
        if given is not None:
            sampling[name] = max(given, 0) if name == "top_k" else given
    return SamplingParams(
        **sampling,
        max_tokens=max_tokens,
        seed=request.seed,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        min_tokens=request.min_tokens or 0,
        logit_bias=tuple((request.logit_bias or {}).items()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        guided_decoding=None if guide is None else guide[1],
        n=request.n or 1,
        stop=tuple(request.stop or ()),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        ignore_eos=bool(request.ignore_eos),
        skip_special_tokens=request.skip_special_tokens is not False,
        truncate_prompt_tokens=request.truncate_prompt_tokens,
    )


def clamp_max_tokens(
    params: SamplingParams, prompt_tokens: int, max_seq_len: int
) -> SamplingParams:
    """Lower a default ``max_tokens`` to what a prompt leaves of the context.

    Only for a number that the client did not give: one that it gave and that does not fit is an
    error. A prompt that leaves nothing is left for the engine to refuse.
    """
    if params.truncate_prompt_tokens is not None:
        prompt_tokens = min(prompt_tokens, params.truncate_prompt_tokens)
    rest = max_seq_len - prompt_tokens
    if params.max_tokens is None or rest < 1 or params.max_tokens <= rest:
        return params
    return replace(params, max_tokens=rest)
