"""A mixture of experts in place of an MLP: every token goes through the few that suit it best.

Tokens are sorted by expert and each expert makes one product of all of its own; which others are in
the batch changes the size of a product and nothing else of a token's result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llmserve.runtime.torch.decoder import LinearMap
from llmserve.runtime.torch.group import RankGroup
from llmserve.runtime.torch.kernels.elementwise import Activation, gated
from llmserve.runtime.torch.kernels.linear import Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """The experts of one layer and their router.

    Attributes:
        router: hidden -> experts, in float32.
        fc: Of each expert, hidden -> 2 * ffn: up and then gate.
        proj: Of each expert, ffn -> hidden.
        top_k: Experts of a token.
        renormalize: Whether the weights of a token's experts are divided by their sum.
        activation: Of the gate.
        group: All ranks, where each has a share of every expert; else None.
    """

    router: Linear
    fc: Sequence[Linear]
    proj: Sequence[Linear]
    top_k: int
    renormalize: bool
    activation: Activation
    group: RankGroup | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) -> (tokens, hidden), summed over a token's experts in float32."""
        weights, experts = self.route(x)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=len(self.fc)).tolist()
        tokens = torch.split(order // self.top_k, counts)
        shares = torch.split(weights.view(-1, 1).index_select(0, order), counts)
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for fc, proj, rows, share in zip(self.fc, self.proj, tokens, shares, strict=True):
            if rows.shape[0]:
                part = proj(gated(fc(x.index_select(0, rows)), self.activation))
                # No token comes twice, so the order of a token's sum is that of the experts.
                y.index_add_(0, rows, part * share)
        y = y.to(x.dtype)
        return y if self.group is None else self.group.all_reduce_(y)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The experts of each token, by a softmax over all of them in float32.

        Args:
            x: (tokens, hidden).

        Returns:
            float32 weights (tokens, top_k), largest first, and the int64 experts they belong to.
        """
        probabilities = self.router(x.float()).softmax(-1)
        weights, experts = probabilities.topk(self.top_k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts

    def map_linears(self, change: LinearMap) -> MixtureOfExperts:
        """A copy with 'mlp.fc.e' and 'mlp.proj.e' of every expert e changed."""
        return replace(
            self,
            fc=[change(f"mlp.fc.{e}", linear) for e, linear in enumerate(self.fc)],
            proj=[change(f"mlp.proj.{e}", linear) for e, linear in enumerate(self.proj)],
        )

    @property
    def weights_bytes(self) -> int:
        """Bytes of all experts and the router."""
        return self.router.weights_bytes + sum(
            part.weights_bytes for part in (*self.fc, *self.proj)
        )


def mixture_reference(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """The definition: a token and an expert at a time, added up in float64.

    Args:
        mixture: The experts.
        x: (tokens, hidden).

    Returns:
        (tokens, hidden) in float64.
    """
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x):
        logits = mixture.router(row[None].float())[0].double()
        chosen = logits.softmax(0).sort(descending=True)
        weights = chosen.values[: mixture.top_k]
        if mixture.renormalize:
            weights = weights / weights.sum()
        for weight, expert in zip(weights, chosen.indices[: mixture.top_k].tolist(), strict=True):
            hidden = gated(mixture.fc[expert](row[None]), mixture.activation)
            y[token] += weight * mixture.proj[expert](hidden)[0].double()
    return y
