"""Elementwise functions whose results depend on the element alone, not on where it lies.

On a CPU torch runs them through vector instructions, except for what is left over where a tensor,
or a thread's share of it, ends: that goes through the C library, whose exp is another one. So a
tensor gets room for whole vectors in every share.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

# torch's vectors, unrolled, have at most so many elements.
_VECTOR = 64
# Elements that a thread takes at least: in torch's usual loops, and in functions that come from MKL
# (exp, tanh). Up to GELU_GRAIN gelu has one share; beyond it all threads have one.
LOOP_GRAIN, MKL_GRAIN, GELU_GRAIN = 1 << 15, 1 << 11, 1 << 14

Activation = Literal["silu", "gelu_pytorch_tanh"]


def empty_vectors(*shape: int, dtype: torch.dtype, grain: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory on the CPU for a tensor on which a function meets whole vectors alone.

    Args:
        shape: Of the tensor.
        dtype: Likewise.
        grain: Of the function: one of the above.

    Returns:
        The room, flat, to call the function on in place, and the tensor, which is its beginning.
    """
    size, shares = torch.Size(shape).numel(), torch.get_num_threads()
    if grain != GELU_GRAIN or size <= grain:
        shares = min(shares, max(1, -(-size // grain)))
    step = _VECTOR * shares
    room = torch.empty(-(-size // step) * step, dtype=dtype)
    room[size:] = 0
    return room, room[:size].view(shape)


def whole_vectors(x: torch.Tensor, grain: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``x`` with the room of ``empty_vectors``; on a GPU the copy is its own room."""
    if x.device.type != "cpu":
        copy = x.clone(memory_format=torch.contiguous_format)
        return copy, copy
    room, copy = empty_vectors(*x.shape, dtype=x.dtype, grain=grain)
    copy.copy_(x)
    return room, copy


def gated(up_and_gate: torch.Tensor, activation: Activation) -> torch.Tensor:
    """(tokens, 2 * ffn), up and then gate -> activation(gate) * up, (tokens, ffn)."""
    up, gate = up_and_gate.chunk(2, -1)
    if activation == "silu":
        room, activated = whole_vectors(gate, LOOP_GRAIN)
        F.silu(room, inplace=True)
    else:
        room, activated = whole_vectors(gate, GELU_GRAIN)
        torch.ops.aten.gelu_(room, approximate="tanh")
    return activated.mul_(up)


def softcapped(x: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap * tanh(x / softcap), shaped as ``x``."""
    room, capped = whole_vectors(x, MKL_GRAIN)
    softcap_(room, softcap)
    return capped


def softcap_(room: torch.Tensor, softcap: float) -> None:
    """x becomes softcap * tanh(x / softcap), in a room of ``empty_vectors``."""
    room.div_(softcap).tanh_().mul_(softcap)
