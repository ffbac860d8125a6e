"""What rank 0 and the other ranks of an engine say to each other: msgpack of tagged structs.

Tensors go another way (``distributed_group``). A rank answers ``Load`` and ``Join``; otherwise it
speaks only to say why it ends.
"""

from __future__ import annotations

from multiprocessing.connection import Connection
from typing import TypeAlias

import msgspec

from llmserve import errors
from llmserve.core.step import SchedulerOutput


class Load(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Load your weights; the first message.

    Attributes:
        devices: Of the ranks, in order.
        threads: CPU threads of each.
        deterministic: As for ``TorchRunner``.
        max_draft_len: As for ``TorchRunner``.
    """

    engine_dir: str
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int
    devices: tuple[str, ...]
    threads: int
    deterministic: bool
    max_draft_len: int


class Join(msgspec.Struct, frozen=True, tag=True):
    """All have loaded: meet at this port."""

    port: int


class AllocateKvCache(msgspec.Struct, frozen=True, tag=True):
    """Make room for so many blocks per KV group."""

    num_blocks: tuple[int, ...]


class WarmUp(msgspec.Struct, frozen=True, tag=True):
    """Warm up, all together."""


class Step(msgspec.Struct, frozen=True, tag=True):
    """Compute a step, all together."""

    scheduler_output: SchedulerOutput


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """The weights are there."""

    weights_bytes: int


class Joined(msgspec.Struct, frozen=True, tag=True):
    """Connected; so much memory is there for a KV cache (``ModelRunner.available_kv_bytes``)."""

    available_kv_bytes: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Why the rank ends.

    Attributes:
        kind: The exception's class.
        message: What it said.
    """

    kind: str
    message: str

    def to_exception(self, rank: str) -> errors.LlmserveError:
        """What rank 0 raises: the rank's own error if it was raised on purpose."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, errors.LlmserveError):
            return kind(self.message)
        return errors.EngineError(f"{rank} failed: {self.kind}: {self.message}")


ToRank: TypeAlias = Load | Join | AllocateKvCache | WarmUp | Step
FromRank: TypeAlias = Loaded | Joined | Failed

_encoder = msgspec.msgpack.Encoder()
_to_rank = msgspec.msgpack.Decoder(ToRank)
_from_rank = msgspec.msgpack.Decoder(FromRank)


def send(connection: Connection, message: ToRank | FromRank) -> None:
    """Send a message.

    Raises:
        OSError: The other process is gone.
    """
    connection.send_bytes(_encoder.encode(message))


def receive_as_rank(connection: Connection) -> ToRank:
    """Wait for rank 0's next message.

    Raises:
        EOFError: Rank 0 is gone.
    """
    message: ToRank = _to_rank.decode(connection.recv_bytes())
    return message


def receive_from_rank(connection: Connection) -> FromRank:
    """Wait for a rank's next message.

    Raises:
        EOFError: The rank is gone.
        ConnectionError: Likewise.
    """
    message: FromRank = _from_rank.decode(connection.recv_bytes())
    return message
