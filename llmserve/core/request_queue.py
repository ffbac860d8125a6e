"""Who waits, and who is next: by priority, first come first served within one.

Everybody comes to their turn: while others wait, every eighth start belongs to the one that has
waited longest among those of lower priorities. It keeps the better rank to its end, so that under
max_utilization it is not paused again before it has got anywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from llmserve.core.request_state import RequestState

# Of so many starts at least one belongs to lower priorities, if any wait.
_TURNS = 8


class RequestQueue:
    """Waiting requests. Paused ones stand before all others of their rank."""

    def __init__(self) -> None:
        self._by_rank: dict[int, deque[RequestState]] = {}
        self._starts = 0  # of the best rank in a row, while others waited

    def __len__(self) -> int:
        return sum(map(len, self._by_rank.values()))

    def __iter__(self) -> Iterator[RequestState]:
        """All of them, in the order of their rank."""
        for rank in sorted(self._by_rank):
            yield from self._by_rank[rank]

    def push(self, state: RequestState) -> None:
        """It has come."""
        self._by_rank.setdefault(state.rank, deque()).append(state)

    def push_paused(self, state: RequestState) -> None:
        """It ran already, and goes on as soon as there is room."""
        self._by_rank.setdefault(state.rank, deque()).appendleft(state)

    def remove(self, state: RequestState) -> None:
        """It starts or has ended."""
        waiting = self._by_rank[state.rank]
        waiting.remove(state)
        if not waiting:
            del self._by_rank[state.rank]

    def start(self, state: RequestState) -> None:
        """``remove`` it, because its turn has come."""
        best = min(self._by_rank)
        self.remove(state)
        others_wait = any(rank > best for rank in self._by_rank)
        self._starts = self._starts + 1 if others_wait and state.rank == best else 0
        state.rank = min(state.rank, best)

    def next_ones(self, count: int) -> list[RequestState]:
        """The first so many in the order in which they may start."""
        ranks = sorted(self._by_rank)
        order = [state for rank in ranks for state in _first(self._by_rank[rank], count)]
        if self._starts >= _TURNS - 1 and len(ranks) > 1:
            heads = [self._by_rank[rank][0] for rank in ranks[1:]]
            longest = min(heads, key=lambda state: state.arrival_s)
            order.remove(longest)
            order.insert(0, longest)
        return order[:count]


def _first(waiting: deque[RequestState], count: int) -> Iterator[RequestState]:
    return (state for state, _ in zip(waiting, range(count), strict=False))
