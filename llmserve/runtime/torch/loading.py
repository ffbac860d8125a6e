"""An engine directory's tensors -> a ``Decoder`` on a device."""

from __future__ import annotations

from pathlib import Path

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import EMBEDDING, LM_HEAD, torch_dtype
from llmserve.checkpoint.engine_dir import RANK_FILE
from llmserve.checkpoint.reader import RankReader
from llmserve.errors import CheckpointError
from llmserve.quantization.layout import engine_tensors
from llmserve.runtime.torch.decoder import Decoder, DecoderLayer
from llmserve.runtime.torch.kernels.linear import Linear, PlainLinear, make_linear, stack_linears
from llmserve.runtime.torch.kernels.rotary import inverse_frequencies, rotary_table


def load_decoder(
    engine_dir: Path, config: PretrainedConfig, *, max_seq_len: int, device: torch.device
) -> Decoder:
    """Read a native engine's weights.

    On the CPU they are mapped from the file, except for what has to be packed.

    Args:
        engine_dir: The engine.
        config: Its pretrained_config.
        max_seq_len: Positions that will ever be computed.
        device: Where to.

    Raises:
        CheckpointError: A tensor is missing, left over, or of another shape or dtype.
    """
    with RankReader(engine_dir / RANK_FILE) as reader:
        _check_tensors(reader, config)
        return _Loader(reader, config, device).decoder(max_seq_len)


def _check_tensors(reader: RankReader, config: PretrainedConfig) -> None:
    expected, found = engine_tensors(config), set(reader.names())
    if missing := sorted(expected.keys() - found):
        raise CheckpointError(f"{reader.path} lacks the tensor {missing[0]}; build it again")
    if left_over := sorted(found - expected.keys()):
        raise CheckpointError(f"{reader.path} has the tensor {left_over[0]}, which has no place")
    for name, spec in expected.items():
        if reader.spec(name) != spec:
            raise CheckpointError(
                f"{name} in {reader.path} is {reader.spec(name)}; it must be {spec}"
            )


class _Loader:
    def __init__(self, reader: RankReader, config: PretrainedConfig, device: torch.device) -> None:
        self._reader, self._config, self._device = reader, config, device
        self._names = frozenset(reader.names())
        bounds = config.quantization.clamp_val
        self._clamp = (bounds[0], bounds[1]) if bounds else None

    def decoder(self, max_seq_len: int) -> Decoder:
        config = self._config
        embedding = self._tensor(EMBEDDING)
        lm_head = embedding if config.share_embedding_table else self._tensor(LM_HEAD)
        inverse = inverse_frequencies(config.head_size, config.rotary_base, config.rotary_scaling)
        table = rotary_table(inverse, max_seq_len, torch_dtype(config.dtype))
        return Decoder(
            embedding=embedding,
            layers=[self._layer(i) for i in range(config.num_hidden_layers)],
            final_norm=self._tensor("transformer.ln_f.weight"),
            lm_head=PlainLinear(lm_head, None),
            tied=config.share_embedding_table,
            rotary=table.to(self._device),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_size=config.head_size,
            norm_epsilon=config.norm_epsilon,
        )

    def _layer(self, index: int) -> DecoderLayer:
        prefix = f"transformer.layers.{index}"
        return DecoderLayer(
            input_norm=self._tensor(f"{prefix}.input_layernorm.weight"),
            qkv=self._linear(prefix, "attention.qkv"),
            dense=self._linear(prefix, "attention.dense"),
            post_norm=self._tensor(f"{prefix}.post_layernorm.weight"),
            fc_gate=self._linear(prefix, "mlp.fc", "mlp.gate"),
            proj=self._linear(prefix, "mlp.proj"),
        )

    def _linear(self, prefix: str, *names: str) -> Linear:
        # Per linear, for exclude_modules may leave single ones of a quantised engine plain.
        quantization = self._config.quantization
        linears = [f"{prefix}.{name}" for name in names]
        algos = [quantization.quant_algo if quantization.quantizes(n) else None for n in linears]
        stored = [self._stored(name) for name in linears]
        if len(names) == 1:
            return make_linear(algos[0], stored[0], self._device, self._clamp)
        return stack_linears(algos, stored, self._device, self._clamp)

    def _stored(self, linear: str) -> dict[str, torch.Tensor]:
        suffixes = ("weight", "per_channel_scale", "bias")
        names = {suffix: f"{linear}.{suffix}" for suffix in suffixes}
        return {s: self._reader.tensor(name) for s, name in names.items() if name in self._names}

    def _tensor(self, name: str) -> torch.Tensor:
        return self._reader.tensor(name).to(self._device)
