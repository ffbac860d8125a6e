"""Log-probabilities of tokens: log-softmax in float32 of the model's logits, before anything else
is done to these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmserve.core.request import TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLogprobs:
    """Of one token per row, on the device, perhaps still being computed.

    Attributes:
        logprobs: float32 (rows,), of the tokens.
        ranks: int64 (rows,): theirs, 1 for the likeliest.
        top_token_ids: int64 (rows, k), likeliest first.
        top_logprobs: float32 (rows, k).
    """

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_token_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def fetch(self, wanted: Sequence[int] | None = None) -> list[TokenLogprobs]:
        """Wait for them.

        Args:
            wanted: For each row, how many of its likeliest tokens; None for all there are.
        """
        if wanted is None:
            wanted = [self.top_token_ids.shape[1]] * len(self.logprobs)
        columns = zip(
            self.logprobs.tolist(),
            self.ranks.tolist(),
            self.top_token_ids.tolist(),
            self.top_logprobs.tolist(),
            wanted,
            strict=True,
        )
        return [
            TokenLogprobs(logprob, rank, tuple(ids[:k]), tuple(values[:k]))
            for logprob, rank, ids, values, k in columns
        ]


def row_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> RowLogprobs:
    """The log-probabilities of one token per row.

    Args:
        logits: float32 (rows, vocab), of the model; not changed.
        token_ids: int64 (rows,).
        num_top: How many of the likeliest are wanted; the vocabulary at most are given.
    """
    values = logits.log_softmax(dim=-1)
    chosen = values.gather(1, token_ids[:, None])
    top_values, top_ids = values.topk(min(num_top, logits.shape[1]), dim=-1)
    return RowLogprobs(
        logprobs=chosen[:, 0],
        ranks=(values > chosen).sum(dim=-1) + 1,
        top_token_ids=top_ids,
        top_logprobs=top_values,
    )
