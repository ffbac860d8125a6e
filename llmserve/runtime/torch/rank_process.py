"""The program of a tensor-parallel rank but the first: ``python -m ...rank_process``.

It does what rank 0 says (see ``tensor_parallel``), which is its parent, and ends with it. Rank 0 is
in the engine's own process.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from llmserve.errors import LlmserveError
from llmserve.runtime.child_process import live_with_parent
from llmserve.runtime.torch.rank_messages import (
    AllocateKvCache,
    Failed,
    Join,
    Joined,
    Load,
    Loaded,
    Step,
    WarmUp,
    receive_as_rank,
    send,
)

if TYPE_CHECKING:
    from llmserve.runtime.torch.distributed_group import DistributedGroup
    from llmserve.runtime.torch.runner import TorchRunner

# Exit statuses: after a failure of its own, and when another rank is gone.
FAILED, PEER_LOST = 1, 2


def main(parent_pid: int, connection_fd: int, rank: int) -> int:
    """Run the process until rank 0 kills it, as it does at the end, or is gone.

    Args:
        parent_pid: Of rank 0.
        connection_fd: The messages from and to it.
        rank: This one, from 1.

    Returns:
        The exit status.
    """
    live_with_parent(parent_pid)
    with Connection(connection_fd) as connection:
        try:
            _serve(connection, rank)
        except (EOFError, ConnectionError):
            return PEER_LOST
        except Exception as error:
            # A sentence suffices for what was raised on purpose; all else needs its traceback.
            if not isinstance(error, LlmserveError):
                traceback.print_exc()
            send(connection, Failed(type(error).__name__, str(error)))
            return FAILED


def make_group(load: Load, rank: int) -> DistributedGroup:
    """All ranks, as one of them sees them."""
    import torch

    from llmserve.runtime.torch.distributed_group import DistributedGroup

    device = torch.device(load.devices[rank])
    return DistributedGroup(rank, len(load.devices), device, ordered=load.deterministic)


def load_rank(load: Load, rank: int, group: DistributedGroup) -> TorchRunner:
    """A rank's runner, with its weights loaded.

    Raises:
        CheckpointError: Tensors are missing or left over.
        ConfigError: There is no such device.
    """
    from llmserve.runtime.torch.runner import TorchRunner

    return TorchRunner(
        Path(load.engine_dir),
        max_batch_size=load.max_batch_size,
        max_num_tokens=load.max_num_tokens,
        max_seq_len=load.max_seq_len,
        tokens_per_block=load.tokens_per_block,
        device=load.devices[rank],
        threads=load.threads,
        deterministic=load.deterministic,
        max_draft_len=load.max_draft_len,
        rank=rank,
        group=group,
    )


def _serve(connection: Connection, rank: int) -> NoReturn:
    # It takes seconds: now, while rank 0 does it, and here, where it is told if it fails.
    importlib.import_module("llmserve.runtime.torch.runner")
    load = receive_as_rank(connection)
    assert isinstance(load, Load)
    group = make_group(load, rank)
    runner = load_rank(load, rank, group)
    send(connection, Loaded(runner.info.weights_bytes))
    while True:
        match receive_as_rank(connection):
            case Step(scheduler_output):
                runner.finish(runner.launch(scheduler_output))
            case Join(port):
                group.join(port)
                send(connection, Joined(runner.available_kv_bytes()))
            case AllocateKvCache(num_blocks):
                runner.allocate_kv_cache(num_blocks)
            case WarmUp():
                runner.warm_up()
            case Load():
                raise AssertionError("a rank loads once")


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
