"""The Engine protocol: what the server, batch jobs and ``LLM`` need of whatever generates tokens.

There is no ``step`` here: TensorRT-LLM's executor has none to offer. Text, stop strings and n > 1
are above this seam and are the same for every engine.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from llmserve.core.request import Output, Request
from llmserve.core.stats import EngineStats


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is and holds, fixed once it is ready.

    Attributes:
        backend: 'native' or 'tensorrt-llm'.
        device: 'cpu', 'cuda:0', ...
        dtype: Of activations.
        quant_algo: As in config.json, or None.
        vocab_size: Valid token ids are [0, vocab_size).
        max_batch_size: Most requests in one step.
        max_num_tokens: Most tokens in one step.
        max_seq_len: Longest prompt plus answer, in tokens.
        tokens_per_block: Tokens of one KV block.
        num_kv_blocks: Blocks in the pool, over all KV groups.
        kv_cache_bytes: Bytes of the pool.
        weights_bytes: Resident weights.
        load_s: Seconds from start to ready.
        pid: The engine's process.
        blocks_per_full_request: Most blocks, over all KV groups, that a request of max_seq_len
            tokens holds; None: as many as its tokens fill, in one group without a window.
    """

    backend: str
    device: str
    dtype: str
    quant_algo: str | None
    vocab_size: int
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    tokens_per_block: int
    num_kv_blocks: int
    kv_cache_bytes: int
    weights_bytes: int
    load_s: float
    pid: int
    blocks_per_full_request: int | None = None

    @property
    def kv_cache_tokens(self) -> int:
        """Tokens of requests of max_seq_len tokens that the KV cache holds at once. (Behind a
        sliding window fewer than these need to be stored.)
        """
        blocks = -(-self.max_seq_len // self.tokens_per_block)
        share = self.num_kv_blocks * blocks // (self.blocks_per_full_request or blocks)
        return share * self.tokens_per_block

    @property
    def max_concurrent_full_requests(self) -> int:
        """Requests of max_seq_len tokens that fit the KV cache at once, at most max_batch_size."""
        blocks = -(-self.max_seq_len // self.tokens_per_block)
        fitting = self.num_kv_blocks // (self.blocks_per_full_request or blocks)
        return min(fitting, self.max_batch_size)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the engine serves.

    Attributes:
        ok: Loaded, warm, alive and making progress.
        reason: One sentence when it is not.
    """

    ok: bool
    reason: str = ""


class Engine(Protocol):
    """A model that serves requests. All methods belong to one asyncio event loop."""

    @property
    def info(self) -> EngineInfo:
        """What the engine is; raises EngineDeadError before the first start has succeeded."""
        ...

    async def start(self) -> None:
        """Load and warm up. Returns when ready; raises what went wrong."""
        ...

    def submit(self, request: Request) -> AsyncIterator[Output]:
        """Queue a request; iterate over its outputs, the last of which has a finish_reason.

        Leaving the iterator early (``aclose``, cancellation) aborts the request.

        Raises:
            InvalidRequestError: It can never be served (too long, an id outside the vocabulary).
            EngineOverloadedError: The queue is full.
            EngineShutdownError: Draining or shut down.
            EngineDeadError: The engine is down; also raised from the iterator if it dies meanwhile.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request with finish reason ABORT. Unknown ids are ignored: it may have ended."""
        ...

    async def stats(self) -> EngineStats:
        """The latest snapshot."""
        ...

    async def health(self) -> Health:
        """Whether the engine makes progress."""
        ...

    async def shutdown(self, *, drain_s: float = 0.0) -> None:
        """Refuse new requests, let running ones end for up to ``drain_s`` seconds, then leave."""
        ...
