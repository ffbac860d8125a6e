"""Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

A counter-based generator: a random number is a function of a key and a counter and of nothing
else, so that batching, chunking and preemption can't move it.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Ten rounds of Philox on 32-bit words that are held in int64.

    Args:
        counter: int64 (4, n), each in [0, 2**32).
        key: int64 (2, n), likewise.

    Returns:
        int64 (4, n), likewise.
    """
    multipliers = torch.tensor(_MULTIPLIERS, device=counter.device)[:, None]
    # Words 0 and 2 are multiplied, words 1 and 3 are mixed in: each pair is one tensor.
    multiplied, mixed = counter[0::2], counter[1::2]
    weyl = torch.tensor(_WEYL, device=key.device)[:, None]
    for round_ in range(_ROUNDS):
        # The products wrap at 64 bits and so keep all their bits; >> copies the sign: hence masks.
        products = (multiplied * multipliers).flip(0)
        multiplied = ((products >> 32) & _MASK) ^ mixed ^ ((key + weyl * round_) & _MASK)
        mixed = products & _MASK
    return torch.stack((multiplied, mixed), dim=1).flatten(0, 1)


def uniform(
    seed: torch.Tensor, sequence_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """One random number per row, from its (seed, sequence index, position) alone.

    Args:
        seed: int64 (n,), all 64 bits count.
        sequence_index: int64 (n,).
        position: int64 (n,), of the token to draw.

    Returns:
        float64 (n,) in [0, 1), 53 random bits.
    """
    counter = torch.stack(
        (position & _MASK, position >> 32, sequence_index & _MASK, sequence_index >> 32)
    )
    key = torch.stack((seed & _MASK, (seed >> 32) & _MASK))
    words = philox4x32(counter, key)
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)).double() * 2.0**-53
