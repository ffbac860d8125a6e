"""The ranks' collectives over torch.distributed: gloo between CPUs, NCCL between CUDA GPUs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

# torch's own documentation has it there; its stubs do not say so.
from torch.distributed import TCPStore  # type: ignore[attr-defined]

# Ranks wait for each other while one reads its weights from a slow disk; a hang is the business of
# whoever watches the engine.
_TIMEOUT = timedelta(minutes=10)
_HOST = "127.0.0.1"


class DistributedGroup:
    """A ``RankGroup``. A process belongs to one at a time.

    It is made before the others are there, so that a rank can be loaded with it; ``join`` connects.
    A collective raises ConnectionError when another rank is gone. All of it is on the loopback
    interface of one host, which nobody else can reach.

    Args:
        rank: Of this process, from 0.
        size: Ranks in all.
        device: Of the tensors.
        ordered: Add up in the order of the ranks. Otherwise where a number lies in its tensor may
            decide the order, and so how the sum is rounded.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, *, ordered: bool = False
    ) -> None:
        self._rank, self._size, self._device = rank, size, device
        self._ordered = ordered
        self._store: TCPStore | None = None

    def open(self) -> int:
        """Be where the ranks meet; for rank 0, before it joins.

        Returns:
            The port for everyone's ``join``.
        """
        listener = socket.create_server((_HOST, 0))
        port = int(listener.getsockname()[1])
        self._store = TCPStore(
            *(_HOST, port, self._size),
            is_master=True,
            wait_for_workers=False,
            timeout=_TIMEOUT,
            master_listen_fd=listener.detach(),
        )
        return port

    def join(self, port: int) -> None:
        """Meet the other ranks; returns when all are there.

        Args:
            port: Of rank 0's ``open``.

        Raises:
            ConnectionError: A rank is gone, or has not come in ten minutes.
        """
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
        on_cpu = self._device.type == "cpu"
        with _collective():
            store = self._store or TCPStore(
                _HOST, port, self._size, wait_for_workers=False, timeout=_TIMEOUT
            )
            dist.init_process_group(
                "gloo" if on_cpu else "nccl",
                store=store,
                rank=self._rank,
                world_size=self._size,
                timeout=_TIMEOUT,
                device_id=None if on_cpu else self._device,
            )
        # NCCL takes its memory at the first call.
        self.all_reduce_(torch.zeros(1, device=self._device))

    def all_reduce_(self, x: torch.Tensor) -> torch.Tensor:
        """Add up all ranks' ``x`` (one shape and dtype), in place; returns ``x``."""
        if self._ordered:
            first, *others = self._all_gather(x)
            x.copy_(first)
            for other in others:
                x.add_(other)
            return x
        with _collective():
            dist.all_reduce(x)
        return x

    def all_gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' ``x`` side by side in the last dimension, in the order of the ranks."""
        return torch.cat(self._all_gather(x), dim=-1)

    def _all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self._size)]
        with _collective():
            dist.all_gather(parts, x)
        return parts

    def broadcast_(self, x: torch.Tensor) -> torch.Tensor:
        """Give every rank the values of rank 0's ``x``, in place; returns ``x``."""
        with _collective():
            dist.broadcast(x, 0)
        return x

    def abort(self) -> None:
        """Make collectives under way return, from any thread; what they computed means nothing."""
        if dist.group.WORLD is not None:
            dist.group.WORLD.abort()

    def leave(self) -> None:
        """Disconnect, whether or not the others are still there. Safe to call twice."""
        if dist.is_initialized():
            if self._device.type == "cuda":
                self.abort()  # NCCL's own way out waits for all ranks
            dist.destroy_process_group()
        self._store = None


@contextmanager
def _collective() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error
