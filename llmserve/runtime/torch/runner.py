"""The ModelRunner in PyTorch: one process, one device. Of a tensor-parallel engine it is one rank.

It owns the weights, the KV cache and the slots of known requests. Which blocks a request has and
how many tokens a step computes is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmserve.checkpoint.decoder_tensors import torch_dtype
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.checkpoint.sharding import kv_heads_per_rank
from llmserve.core.sampling_params import SamplingParams
from llmserve.core.step import (
    ModelRunnerOutput,
    NewRequest,
    ScheduledPrefill,
    SchedulerOutput,
)
from llmserve.errors import ConfigError
from llmserve.runtime.host import default_host_kv_bytes, free_host_bytes
from llmserve.runtime.memory import MAX_SAMPLED_LOGITS, activation_bytes, kv_groups
from llmserve.runtime.model_runner import ModelInfo, TokenMasks
from llmserve.runtime.torch.attention_plan import (
    AttentionPlanner,
    GatheredPlanner,
    Int64Array,
)
from llmserve.runtime.torch.group import RankGroup
from llmserve.runtime.torch.input_batch import InputBatch, PrefillRows, Samples, StepInputs
from llmserve.runtime.torch.kernels.batch_invariant_attention import InvariantPlanner
from llmserve.runtime.torch.loading import load_decoder
from llmserve.runtime.torch.logprobs import RowLogprobs, row_logprobs
from llmserve.runtime.torch.sampler import ALL_BANNED, NOT_FINITE, RowMasks, Sampled, sample

_FAULTS = {
    NOT_FINITE: "the model computed NaN or infinity for the token at position {}",
    ALL_BANNED: "there is no token that may stand at position {}: all are banned",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepHandle:
    """A launched step.

    Attributes:
        inputs: What it computes; None for a step that computes nothing.
        logits: float32 (sampled, vocab), perhaps still being computed; None if nobody samples.
        broken: bool, whether each of the inputs' ``prefills`` came to NaN; None without any.
        prompt_logprobs: By request, in parts, for the prefills that want them.
    """

    inputs: StepInputs | None
    logits: torch.Tensor | None = None
    broken: torch.Tensor | None = None
    prompt_logprobs: Mapping[str, Sequence[RowLogprobs]] = field(default_factory=dict)


class TorchRunner:
    """Executes steps of a native engine on a CPU or a CUDA GPU. See ``load_runner``.

    ``rank`` and ``group`` make it one rank of a tensor-parallel engine, with its own share of the
    weights and of the KV cache; ``info`` counts that share's bytes. ``deterministic`` makes a
    request's tokens and log-probabilities the same bits whatever else is computed beside it, on a
    CPU alone. ``max_draft_len`` is the most guesses that a step may verify of a request.
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
        deterministic: bool = False,
        max_draft_len: int = 0,
        rank: int = 0,
        group: RankGroup | None = None,
    ) -> None:
        config, _ = read_engine(engine_dir)
        if threads is not None:
            torch.set_num_threads(threads)
        self._device = resolve_device(device)
        if deterministic and self._device.type != "cpu":
            raise ConfigError(
                f"deterministic is possible on a CPU alone, and the device is {self._device}; set "
                "device to cpu, or leave deterministic out"
            )
        self._tokens_per_block = tokens_per_block
        self._rank, self._group = rank, group
        self._decoder = load_decoder(
            engine_dir,
            config,
            max_seq_len=max_seq_len,
            device=self._device,
            rank=rank,
            group=group,
            deterministic=deterministic,
        )
        groups = kv_groups(config, tokens_per_block, max_seq_len)
        planner: AttentionPlanner
        if deterministic:
            planner = InvariantPlanner(config.num_attention_heads // config.tp_size)
        else:
            planner = GatheredPlanner(torch_dtype(config.dtype), self._device)
        self._inputs = InputBatch(
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            tokens_per_block=tokens_per_block,
            vocab_size=config.vocab_size,
            group_windows=[kv_group.window for kv_group in groups],
            layer_windows={
                config.window(layer): index
                for index, kv_group in enumerate(groups)
                for layer in kv_group.layers
            },
            planner=planner,
            device=self._device,
        )
        # K and V of one token in one layer, in elements.
        self._kv_width = 2 * kv_heads_per_rank(config) * config.head_size
        self._kv_cache: list[torch.Tensor] = []
        self.info = ModelInfo(
            vocab_size=config.vocab_size,
            max_seq_len=max_seq_len,
            kv_groups=groups,
            weights_bytes=self._decoder.weights_bytes,
            workspace_bytes=activation_bytes(
                config,
                max_num_tokens=max_num_tokens,
                max_batch_size=max_batch_size,
                max_seq_len=max_seq_len,
                max_draft_len=max_draft_len,
                deterministic=deterministic,
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
        layer_blocks = {
            layer: blocks
            for kv_group, blocks in zip(self.info.kv_groups, num_blocks, strict=True)
            for layer in kv_group.layers
        }
        self._kv_cache = [
            torch.empty(
                layer_blocks[index] * self._tokens_per_block,
                self._kv_width,
                dtype=layer.attention.kv_storage.dtype,
                device=self._device,
            )
            for index, layer in enumerate(self._decoder.layers)
        ]

    def warm_up(self) -> None:
        """Run a prefill and a decode in block 0, greedy and sampled, and forget them."""
        length = min(2, self._tokens_per_block - 1, self.info.max_seq_len - 1)
        if length < 1:
            return
        for params in (SamplingParams(seed=0), SamplingParams(temperature=1.0, top_p=0.9, seed=0)):
            self._warm_up(length, params)
        for cache in self._kv_cache:
            cache[: self._tokens_per_block].zero_()

    def _warm_up(self, length: int, params: SamplingParams) -> None:
        request_id = "warm-up"
        new = NewRequest(
            request_id=request_id,
            token_ids=[0] * length,
            num_prompt_tokens=length,
            sampling_params=params,
        )
        prefill = ScheduledPrefill(request_id=request_id, num_computed_tokens=0, num_tokens=length)
        steps = (
            SchedulerOutput(
                step_id=0,
                new_requests=[new],
                new_block_ids={request_id: tuple([0] for _ in self.info.kv_groups)},
                prefills=[prefill],
            ),
            SchedulerOutput(step_id=1, decodes=[request_id]),
            SchedulerOutput(step_id=2, finished_request_ids=[request_id]),
        )
        for step in steps:
            self.finish(self.launch(step))

    @torch.inference_mode()
    def launch(self, scheduler_output: SchedulerOutput) -> StepHandle:
        """Start a step; on CUDA it runs on while this returns.

        Raises:
            ValueError: The step is not what the scheduler's contract allows.
        """
        self._inputs.update(scheduler_output)
        self._copy_blocks(scheduler_output.block_copies)
        if not scheduler_output.num_requests:
            return StepHandle(inputs=None)
        inputs = self._inputs.pack(scheduler_output)
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
        if inputs.samples is not None:
            logits = self._decoder.logits(hidden.index_select(0, inputs.samples.flat_rows))
        return StepHandle(
            inputs=inputs,
            logits=logits,
            broken=broken,
            prompt_logprobs={
                prefill.request_id: self._prompt_logprobs(hidden, prefill, prefill.prompt_logprobs)
                for prefill in inputs.prefills
                if prefill.prompt_logprobs is not None
            },
        )

    def _prompt_logprobs(
        self, hidden: torch.Tensor, prefill: PrefillRows, num_top: int
    ) -> list[RowLogprobs]:
        token_ids = prefill.next_token_ids
        rows = hidden[prefill.rows][: len(token_ids)]
        # In pieces, for a long prompt's logits may be larger than the model.
        size = max(1, MAX_SAMPLED_LOGITS // self.info.vocab_size)
        pieces = [slice(start, start + size) for start in range(0, len(token_ids), size)]
        return [
            row_logprobs(self._decoder.logits(rows[piece]), token_ids[piece], num_top)
            for piece in pieces
        ]

    @torch.inference_mode()
    def finish(self, handle: StepHandle, masks: TokenMasks | None = None) -> ModelRunnerOutput:
        """Sample the step's next tokens and wait for them; rank 0 does it for all.

        Args:
            handle: Of ``launch``.
            masks: For some of those that sample; on rank 0 alone.

        Returns:
            What the step brought; nothing on other ranks than 0.

        Raises:
            ValueError: There is a mask for a request that does not sample, or that has drafts.
        """
        output = ModelRunnerOutput()
        if handle.inputs is None:
            return output
        samples = handle.inputs.samples
        if self._rank > 0:
            if samples is not None:
                drawn = torch.empty(len(samples.rows), dtype=torch.int64, device=self._device)
                self._accept(samples, drawn)
            return output
        _tell_prompts(handle, handle.inputs.prefills, output)
        if samples is not None:
            assert handle.logits is not None
            row_masks = _row_masks(samples, masks or {})
            sampled = sample(handle.logits, samples.rows, self._inputs.token_ids, row_masks)
            _tell_samples(samples, sampled, self._accept(samples, sampled.token_ids), output)
        return output

    def _accept(self, samples: Samples, token_ids: torch.Tensor) -> Int64Array:
        """Keep what was drawn, on every rank; how many tokens each request accepts."""
        if self._group is not None:
            self._group.broadcast_(token_ids)
        self._inputs.append_sampled(samples.rows, token_ids)
        num_accepted = samples.num_accepted(token_ids)
        self._inputs.advance(samples, num_accepted)
        return num_accepted

    def shutdown(self) -> None:
        """Free the KV cache and the weights."""
        self._kv_cache = []
        del self._decoder, self._inputs
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _copy_blocks(self, block_copies: tuple[list[tuple[int, int]], ...]) -> None:
        for kv_group, copies in zip(self.info.kv_groups, block_copies, strict=False):
            if not copies:
                continue
            sources, destinations = torch.tensor(copies, device=self._device).unbind(1)
            for layer in kv_group.layers:
                blocks = self._kv_cache[layer].view(-1, self._tokens_per_block, self._kv_width)
                blocks.index_copy_(0, destinations, blocks.index_select(0, sources))


def _tell_prompts(
    handle: StepHandle, prefills: Sequence[PrefillRows], output: ModelRunnerOutput
) -> None:
    if handle.broken is None:
        return
    for prefill, broken in zip(prefills, handle.broken.tolist(), strict=True):
        if broken:
            output.errors[prefill.request_id] = "the model computed NaN within the prompt"
        elif parts := handle.prompt_logprobs.get(prefill.request_id):
            output.prompt_logprobs[prefill.request_id] = [
                logprobs for part in parts for logprobs in part.fetch()
            ]


def _row_masks(samples: Samples, masks: TokenMasks) -> RowMasks:
    """The masks by sampled row."""
    if not masks:
        return {}
    places = {request_id: i for i, request_id in enumerate(samples.request_ids)}
    if strangers := masks.keys() - places.keys():
        raise ValueError(f"there is a mask for {min(strangers)}, which does not sample")
    row_masks = {}
    for request_id, mask in masks.items():
        first, stop = samples.bounds[places[request_id] :][:2].tolist()
        if stop - first > 1:
            raise ValueError(f"{request_id} has drafts, and a mask that is of one token")
        row_masks[first] = mask
    return row_masks


def _tell_samples(
    samples: Samples, sampled: Sampled, num_accepted: Int64Array, output: ModelRunnerOutput
) -> None:
    # Fetched together, so that a GPU is waited for once.
    token_ids, faults = torch.stack((sampled.token_ids, sampled.faults)).tolist()
    starts, stops = samples.bounds[:-1].tolist(), (samples.bounds[:-1] + num_accepted).tolist()
    for row, fault in enumerate(faults) if any(faults) else ():
        place = bisect_right(starts, row) - 1
        if fault and row < stops[place]:
            position = samples.rows.positions[row]
            output.errors.setdefault(samples.request_ids[place], _FAULTS[fault].format(position))
    for request_id, start, stop in zip(samples.request_ids, starts, stops, strict=True):
        if request_id in output.errors:
            continue
        output.token_ids[request_id] = token_ids[start:stop]
        if start in sampled.logprobs:
            output.logprobs[request_id] = [sampled.logprobs[row] for row in range(start, stop)]


def default_kv_bytes(info: ModelInfo) -> int:
    """What the KV cache takes on a CPU unless told otherwise."""
    return max(0, min(default_host_kv_bytes(), free_host_bytes() - info.workspace_bytes))


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
