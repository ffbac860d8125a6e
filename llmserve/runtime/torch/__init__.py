"""The PyTorch runtime: executes native engines on a CPU or a CUDA GPU. Importing it is cheap."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.checkpoint.engine_dir import read_engine

if TYPE_CHECKING:
    from llmserve.runtime.torch.runner import TorchRunner
    from llmserve.runtime.torch.tensor_parallel import TensorParallelRunner


def load_runner(
    engine_dir: Path,
    *,
    max_batch_size: int,
    max_num_tokens: int,
    max_seq_len: int,
    tokens_per_block: int,
    device: str = "auto",
    threads: int | None = None,
    deterministic: bool = False,
    max_draft_len: int = 0,
) -> TorchRunner | TensorParallelRunner:
    """Load a native engine's weights; the KV cache comes later (``allocate_kv_cache``).

    An engine of several ranks is loaded by as many processes, this one among them: on its main
    thread, and one such engine at a time.

    Args:
        engine_dir: What ``llmserve build`` wrote.
        max_batch_size: Most requests known at a time.
        max_num_tokens: Most tokens computed in one step.
        max_seq_len: Longest prompt plus answer, in tokens.
        tokens_per_block: Tokens of one KV block.
        device: 'cpu', 'cuda' or 'cuda:N'; 'auto' takes CUDA where there is a GPU. Of several ranks,
            rank r takes cuda:r.
        threads: CPU threads of products, which ranks share; None leaves one rank torch's own
            choice, and several all cores.
        deterministic: Compute each request's tokens to the bit alike, whatever runs beside it.
        max_draft_len: Most guesses that a step verifies of a request.

    Raises:
        CheckpointError: The directory is no native engine, or tensors are missing or left over.
        ConfigError: There is no such device, or fewer GPUs than ranks, or it is none for
            ``deterministic``, which CPUs alone can do.
        EngineError: A rank's process ended while it was loading.
    """
    config, _ = read_engine(engine_dir)
    if config.tp_size > 1:
        from llmserve.runtime.torch.tensor_parallel import TensorParallelRunner

        return TensorParallelRunner(
            engine_dir,
            config.tp_size,
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_seq_len=max_seq_len,
            tokens_per_block=tokens_per_block,
            device=device,
            threads=threads,
            deterministic=deterministic,
            max_draft_len=max_draft_len,
        )
    from llmserve.runtime.torch.runner import TorchRunner

    return TorchRunner(
        engine_dir,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        max_seq_len=max_seq_len,
        tokens_per_block=tokens_per_block,
        device=device,
        threads=threads,
        deterministic=deterministic,
        max_draft_len=max_draft_len,
    )
