"""Runs a model over many sequences a layer at a time: a model of any size in the memory of a layer.

All sequences go through a layer before the next one is loaded, so each weight is read once. What is
held is the hidden state of every token, in the model's dtype: whoever has more tokens than that may
take gives them in groups (``token_groups``), and each group reads the weights again. KV lives
within one batch of one layer. The parts are the decoder's own, so this computes what it serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import torch_dtype
from llmserve.checkpoint.progress import Report, no_report
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.errors import ConfigError
from llmserve.runtime.torch.decoder import DecoderLayer, Head
from llmserve.runtime.torch.kernels.attention import whole_sequences_plan
from llmserve.runtime.torch.kernels.linear import Linear
from llmserve.runtime.torch.kernels.rotary import RotaryTables
from llmserve.runtime.torch.loading import DecoderLoader

TokenIds = Sequence[int]

# Of a batch through one layer: enough for full speed, and little beside the layer's weights.
_BATCH_TOKENS = 2048


class Observer(Protocol):
    """Sees what goes through the layers. What it is given is reused: it must not be kept."""

    def saw_linear(self, layer: int, name: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """A linear's inputs (tokens, in) and outputs (tokens, out), named as in ``linears()``."""
        ...

    def saw_key_value(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """K after the rotary embedding, and V, each (tokens, kv_heads * head_size)."""
        ...


class LayerwiseModel:
    """A model of which one layer at a time is in memory.

    Args:
        source: The engine tensors of a whole model.
        config: Its config.json, of a single rank.
        device: Where it computes. Hidden states stay on the CPU.

    Raises:
        CheckpointError: A tensor is missing, left over, or of another shape or dtype.
    """

    def __init__(
        self, source: TensorSource, config: PretrainedConfig, *, device: torch.device
    ) -> None:
        self._loader = DecoderLoader(source, config, device=device)
        self._config, self._device = config, device
        self._dtype = torch_dtype(config.dtype)

    @torch.inference_mode()
    def hidden_states(
        self,
        sequences: Sequence[TokenIds],
        observer: Observer | None = None,
        *,
        stage: str = "run",
        report: Report = no_report,
    ) -> torch.Tensor:
        """Every token's hidden state after the last layer, before the final norm.

        Args:
            sequences: Token ids of each, none empty.
            observer: Is shown what goes through the linears and into the KV cache.
            stage: What to call this in reports.
            report: Told after every layer of the bytes of weights that are done.

        Returns:
            (tokens of all sequences, hidden) on the CPU, one sequence after the other.

        Raises:
            ConfigError: A sequence is longer than the model's context.
            CheckpointError: A tensor cannot be read.
        """
        config = self._config
        longest = max(map(len, sequences))
        if longest > config.max_position_embeddings:
            raise ConfigError(
                f"a sequence has {longest} tokens; the model takes at most "
                f"{config.max_position_embeddings}: choose a smaller length"
            )
        rotary = self._loader.rotary(longest)
        batches = token_groups(sequences, _BATCH_TOKENS)
        hidden = self._embed(batches)
        for index in range(config.num_hidden_layers):
            layer = self._loader.layer(index)
            if observer is not None:
                layer = _observed(layer, index, observer)
            self._run(layer, index, batches, rotary, hidden, observer)
            layer_bytes = layer.weights_bytes
            report(stage, (index + 1) * layer_bytes, config.num_hidden_layers * layer_bytes)
        return hidden

    def head(self) -> Head:
        """The final norm and lm_head: rows of ``hidden_states`` on the device -> logits."""
        return self._loader.head()

    def _embed(self, batches: Sequence[Sequence[TokenIds]]) -> torch.Tensor:
        embedding = self._loader.embedding()
        tokens = sum(map(len, (ids for batch in batches for ids in batch)))
        hidden = torch.empty(tokens, self._config.hidden_size, dtype=self._dtype)
        start = 0
        for batch in batches:
            token_ids = torch.tensor([token for ids in batch for token in ids], device=self._device)
            hidden[start : start + len(token_ids)] = embedding(token_ids)
            start += len(token_ids)
        return hidden

    def _run(
        self,
        layer: DecoderLayer,
        index: int,
        batches: Sequence[Sequence[TokenIds]],
        rotary: RotaryTables,
        hidden: torch.Tensor,
        observer: Observer | None,
    ) -> None:
        """Take ``hidden`` through a layer, in place."""
        attention, window = layer.attention, layer.attention.scores.window
        width = attention.num_kv_heads * attention.head_size
        start = 0
        for batch in batches:
            lengths = [len(ids) for ids in batch]
            rows = slice(start, start + sum(lengths))
            start = rows.stop
            plan = whole_sequences_plan(lengths, (window,), self._device)
            positions = torch.cat([torch.arange(n, device=self._device) for n in lengths])
            cache = torch.empty(
                len(positions), 2 * width, dtype=attention.kv_storage.dtype, device=self._device
            )
            x = hidden[rows].to(self._device)
            hidden[rows] = layer(x, rotary.at(positions), plan, cache)
            if observer is not None:
                stored = attention.kv_storage.load(cache)
                observer.saw_key_value(index, stored[:, :width], stored[:, width:])


def token_groups(sequences: Sequence[TokenIds], max_tokens: int) -> list[Sequence[TokenIds]]:
    """Neighbouring sequences together, at most ``max_tokens`` of them or one that is longer."""
    groups: list[list[TokenIds]] = []
    tokens = max_tokens
    for ids in sequences:
        if tokens + len(ids) > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(ids)
        tokens += len(ids)
    return list(groups)


def row_chunks(rows: int, vocab_size: int, max_logits: int) -> Iterator[slice]:
    """The rows in chunks of at most ``max_logits``, or of one row."""
    step = max(1, max_logits // vocab_size)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _observed(layer: DecoderLayer, index: int, observer: Observer) -> DecoderLayer:
    return layer.map_linears(lambda name, linear: _ObservedLinear(linear, index, name, observer))


class _ObservedLinear:
    """A linear that shows what goes through it."""

    def __init__(self, linear: Linear, layer: int, name: str, observer: Observer) -> None:
        self._linear, self._layer, self._name = linear, layer, name
        self._observer = observer

    @property
    def weights_bytes(self) -> int:
        return self._linear.weights_bytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._linear(x)
        self._observer.saw_linear(self._layer, self._name, x, y)
        return y
