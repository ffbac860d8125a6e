"""The ModelRunner in PyTorch: one process, one device. Of a tensor-parallel engine it is one rank.

It owns the weights, the KV cache and the slots of known requests. Which blocks a request has and
how many tokens a step computes is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from llmserve.checkpoint.decoder_tensors import torch_dtype
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.checkpoint.sharding import kv_heads_per_rank
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import (
    KVGroupSpec,
    ModelRunnerOutput,
    NewRequest,
    ScheduledRequest,
    SchedulerOutput,
)
from llmserve.errors import ConfigError
from llmserve.runtime.host import default_host_kv_bytes, free_host_bytes
from llmserve.runtime.memory import activation_bytes, kv_bytes_per_token
from llmserve.runtime.model_runner import ModelInfo
from llmserve.runtime.torch.group import RankGroup
from llmserve.runtime.torch.input_batch import InputBatch, StepInputs
from llmserve.runtime.torch.loading import load_decoder
from llmserve.runtime.torch.sampler import sample


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHandle:
    """A launched step.

    Attributes:
        inputs: What it computes; None for a step that computes nothing.
        logits: float32 (sampled, vocab), perhaps still being computed; None if nobody samples.
        broken: bool, whether the prompt of each of the inputs' ``prefills`` came to NaN; None
            without any.
    """

    inputs: StepInputs | None
    logits: torch.Tensor | None
    broken: torch.Tensor | None = None


class TorchRunner:
    """Executes steps of a native engine on a CPU or a CUDA GPU. See ``load_runner``.

    ``rank`` and ``group`` make it one rank of a tensor-parallel engine, with its own share of the
    weights and of the KV cache; ``info`` counts that share's bytes.
    """

    info: ModelInfo

    def __init__(
        self,
        engine_dir: Path,
        *,
        max_batch_size: int,
        max_num_tokens: int,
        max_seq_len: int,
        tokens_per_block: int,
        device: str = "auto",
        threads: int | None = None,
        rank: int = 0,
        group: RankGroup | None = None,
    ) -> None:
        config, _ = read_engine(engine_dir)
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = resolve_device(device)
        self._dtype = torch_dtype(config.dtype)
        self._config = config
        self._tokens_per_block = tokens_per_block
        self._rank, self._group = rank, group
        self._decoder = load_decoder(
            engine_dir,
            config,
            max_seq_len=max_seq_len,
            device=self._device,
            rank=rank,
            group=group,
        )
        self._inputs = InputBatch(
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            tokens_per_block=tokens_per_block,
            windows={layer.attention.scores.window for layer in self._decoder.layers},
            dtype=self._dtype,
            device=self._device,
        )
        # K and V of one token in one layer, in elements.
        self._kv_width = 2 * kv_heads_per_rank(config) * config.head_size
        self._kv_dtypes = [layer.attention.kv_storage.dtype for layer in self._decoder.layers]
        self._kv_cache: list[torch.Tensor] = []
        self.info = ModelInfo(
            vocab_size=config.vocab_size,
            max_seq_len=max_seq_len,
            kv_groups=(
                KVGroupSpec(
                    layers=tuple(range(config.num_hidden_layers)),
                    window=None,
                    bytes_per_block=kv_bytes_per_token(config) * tokens_per_block,
                ),
            ),
            weights_bytes=self._decoder.weights_bytes,
            workspace_bytes=activation_bytes(
                config,
                max_num_tokens=max_num_tokens,
                max_batch_size=max_batch_size,
                max_seq_len=max_seq_len,
            ),
            device=str(self._device),
            dtype=config.dtype,
            quant_algo=config.quantization.quant_algo,
        )

    def available_kv_bytes(self) -> int:
        """What is free once the largest step has its room; on a CPU at most the default."""
        if self._device.type == "cpu":
            return default_kv_bytes(self.info)
        free, _ = torch.cuda.mem_get_info(self._device)
        return max(0, free - self.info.workspace_bytes)

    def allocate_kv_cache(self, num_blocks: tuple[int, ...]) -> None:
        """Reserve the KV cache. On a CPU its pages take memory when they are first written.

        Raises:
            ValueError: It is there already, or the counts are not one per KV group.
        """
        if self._kv_cache:
            raise ValueError("the KV cache is allocated already")
        (blocks,) = num_blocks
        self._kv_cache = [
            torch.empty(
                blocks * self._tokens_per_block,
                self._kv_width,
                dtype=dtype,
                device=self._device,
            )
            for dtype in self._kv_dtypes
        ]

    def warm_up(self) -> None:
        """Run a prefill and a decode in block 0, greedy and sampled, and forget them."""
        length = min(2, self._tokens_per_block - 1, self.info.max_seq_len - 1)
        if length < 1:
            return
        for params in (SamplingParams(seed=0), SamplingParams(temperature=1.0, top_p=0.9, seed=0)):
            new = NewRequest(
                request_id="warm-up",
                token_ids=[0] * length,
                num_prompt_tokens=length,
                sampling_params=params,
            )
            self._run(SchedulerOutput(step_id=0, new_requests=[new], scheduled=[_part(0, length)]))
            self._run(SchedulerOutput(step_id=1, scheduled=[_part(length, 1)]))
            self._run(SchedulerOutput(step_id=2, finished_request_ids=["warm-up"]))
        for cache in self._kv_cache:
            cache[: self._tokens_per_block].zero_()

    def _run(self, step: SchedulerOutput) -> None:
        self.finish(self.launch(step))

    @torch.inference_mode()
    def launch(self, scheduler_output: SchedulerOutput) -> StepHandle:
        """Start a step; on CUDA it runs on while this returns.

        Raises:
            ValueError: The step asks for what is not implemented.
        """
        self._inputs.update(scheduler_output)
        self._copy_blocks(scheduler_output.block_copies)
        if not scheduler_output.scheduled:
            return StepHandle(inputs=None, logits=None)
        inputs = self._inputs.pack(scheduler_output.scheduled)
        hidden = self._decoder.forward(
            inputs.token_ids, inputs.positions, inputs.plan, self._kv_cache
        )
        # A part of a prompt that came to NaN must not enter the tree of blocks that others reuse,
        # and nobody may come to sample from it: 8-bit K and V forget a NaN.
        broken = None
        if inputs.prefills:
            rows = hidden.isnan().any(-1)
            broken = torch.stack([rows[prefill.rows].any() for prefill in inputs.prefills])
        logits = None
        if inputs.sampled:
            logits = self._decoder.logits(hidden.index_select(0, inputs.sampled_rows))
        return StepHandle(inputs=inputs, logits=logits, broken=broken)

    @torch.inference_mode()
    def finish(self, handle: StepHandle, masks: object = None) -> ModelRunnerOutput:
        """Sample the step's next tokens and wait for them; rank 0 does it for all.

        Raises:
            ValueError: ``masks`` are given; they are not implemented.
        """
        if masks is not None:
            raise ValueError("grammar masks are not implemented")
        output = ModelRunnerOutput()
        if handle.inputs is None:
            return output
        if handle.broken is not None:
            for prefill, broken in zip(handle.inputs.prefills, handle.broken.tolist(), strict=True):
                if broken:
                    output.errors[prefill.request_id] = "the model computed NaN within the prompt"
        if handle.logits is None:
            return output
        rows = handle.inputs.sampled
        if self._group is not None and self._rank > 0:
            drawn = torch.empty(len(rows), dtype=torch.int64, device=self._device)
            self._inputs.append_sampled(rows, self._group.broadcast_(drawn))
            return output
        sampled = sample(handle.logits, rows, self._inputs.token_ids)
        if self._group is not None:
            self._group.broadcast_(sampled.token_ids)
        self._inputs.append_sampled(rows, sampled.token_ids)
        token_ids, valid = torch.stack((sampled.token_ids, sampled.valid.long())).tolist()
        for i, row in enumerate(rows):
            if row.request_id in output.errors:
                continue
            if not valid[i]:
                output.errors[row.request_id] = (
                    f"the model computed NaN or infinity for the token at position {row.position}"
                )
                continue
            output.token_ids[row.request_id] = [token_ids[i]]
            if i in sampled.logprobs:
                output.logprobs[row.request_id] = [sampled.logprobs[i]]
        return output

    def shutdown(self) -> None:
        """Free the KV cache and the weights."""
        self._kv_cache = []
        del self._decoder, self._inputs
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _copy_blocks(self, block_copies: list[tuple[int, int]]) -> None:
        if not block_copies:
            return
        sources, destinations = torch.tensor(block_copies, device=self._device).unbind(1)
        for cache in self._kv_cache:
            blocks = cache.view(-1, self._tokens_per_block, self._kv_width)
            blocks.index_copy_(0, destinations, blocks.index_select(0, sources))


def default_kv_bytes(info: ModelInfo) -> int:
    """What the KV cache takes on a CPU unless told otherwise."""
    return max(0, min(default_host_kv_bytes(), free_host_bytes() - info.workspace_bytes))


def _part(num_computed_tokens: int, num_tokens: int) -> ScheduledRequest:
    return ScheduledRequest(
        request_id="warm-up",
        num_computed_tokens=num_computed_tokens,
        num_tokens=num_tokens,
        new_block_ids=([0] if num_computed_tokens == 0 else [],),
    )


def resolve_device(device: str) -> torch.device:
    """The device behind a setting: 'auto', 'cpu', 'cuda' or 'cuda:N'; 'cuda' is 'cuda:0'.

    Raises:
        ConfigError: It is none of these, or not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if device != "cpu" and (kind != "cuda" or not (index or "0").isdigit()):
        raise ConfigError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if int(index or 0) >= count:
        raise ConfigError(f"device is {device!r}; this machine has {count} CUDA devices")
    return torch.device("cuda", int(index or 0))
