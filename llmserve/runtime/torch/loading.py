"""An engine's tensors -> a ``Decoder`` on a device, or a layer of it at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llmserve.checkpoint.config import PretrainedConfig
from llmserve.checkpoint.decoder_tensors import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    layer_prefix,
    torch_dtype,
)
from llmserve.checkpoint.engine_dir import rank_file
from llmserve.checkpoint.reader import RankReader
from llmserve.checkpoint.rotary_scaling import rope_type
from llmserve.checkpoint.sharding import kv_heads_per_rank, padded_vocab_size
from llmserve.checkpoint.tensor_source import TensorSource
from llmserve.checkpoint.tensor_spec import TensorSpec
from llmserve.errors import CheckpointError
from llmserve.quantization import weight_format
from llmserve.quantization.layout import engine_tensors, kv_cache_scale, rank_tensors
from llmserve.runtime.torch.decoder import (
    Attention,
    Decoder,
    DecoderLayer,
    Embedding,
    GatedMlp,
    Head,
    Mlp,
    Norm,
)
from llmserve.runtime.torch.group import RankGroup, RowParallelLinear
from llmserve.runtime.torch.kernels.attention import AttentionScores
from llmserve.runtime.torch.kernels.batch_invariant import RowTiles
from llmserve.runtime.torch.kernels.elementwise import Activation
from llmserve.runtime.torch.kernels.int8_linear import int8_products_pay
from llmserve.runtime.torch.kernels.kv_storage import make_kv_storage
from llmserve.runtime.torch.kernels.linear import Linear, make_linear, stack_linears
from llmserve.runtime.torch.kernels.rotary import (
    RotaryTables,
    inverse_frequencies,
    long_rope_frequencies,
    long_rope_magnitude,
    rotary_table,
    yarn_magnitude,
)
from llmserve.runtime.torch.moe import MixtureOfExperts

Stored = dict[str, torch.Tensor]


def load_decoder(
    engine_dir: Path,
    config: PretrainedConfig,
    *,
    max_seq_len: int,
    device: torch.device,
    rank: int = 0,
    group: RankGroup | None = None,
    deterministic: bool = False,
) -> Decoder:
    """Read the weights of a native engine, or of one of its ranks.

    On the CPU they are mapped from the file, except for what has to be packed.

    Args:
        engine_dir: The engine.
        config: Its pretrained_config.
        max_seq_len: Positions that will ever be computed.
        device: Where to.
        rank: Whose.
        group: All ranks; needed where there are several.
        deterministic: As for ``DecoderLoader``.

    Raises:
        CheckpointError: A tensor is missing, left over, or of another shape or dtype.
    """
    with RankReader(engine_dir / rank_file(rank)) as reader:
        try:
            loader = DecoderLoader(
                reader,
                config,
                device=device,
                rank=rank,
                group=group,
                deterministic=deterministic,
            )
        except CheckpointError as error:
            raise CheckpointError(f"{reader.path}: {error}; build the engine again") from error
        decoder = loader.decoder(max_seq_len)
        # What was copied, to a GPU or to be packed, is not held a second time in the file's pages.
        packed = int8_products_pay() if device.type == "cpu" else True
        for name in reader.names() if packed else ():
            if device.type != "cpu" or reader.spec(name).dtype == torch.int8:
                reader.drop_pages(name)
        return decoder


class DecoderLoader:
    """Makes the parts of a decoder from the tensors of a rank.

    Args:
        source: Exactly the rank's engine tensors. On the CPU parts keep what it returns.
        config: Of the whole model.
        device: Where the parts compute.
        rank: Whose tensors they are.
        group: All ranks; needed where there are several.
        deterministic: Make every product batch-invariant; on the CPU alone.

    Raises:
        CheckpointError: A tensor is missing, left over, or of another shape or dtype.
    """

    def __init__(
        self,
        source: TensorSource,
        config: PretrainedConfig,
        *,
        device: torch.device,
        rank: int = 0,
        group: RankGroup | None = None,
        deterministic: bool = False,
    ) -> None:
        if (group is None) != (config.tp_size == 1):
            raise ValueError(f"a group of ranks belongs to tp_size > 1, not {config.tp_size}")
        self._source, self._config, self._device = source, config, device
        self._rank, self._group = rank, group
        self._row_tiles = RowTiles() if deterministic else None
        specs = rank_tensors(config, engine_tensors(config), rank)
        bounds = config.quantization.clamp_val
        self._clamp = (bounds[0], bounds[1]) if bounds else None
        _check_tensors(source, specs)
        self._suffixes: dict[str, list[str]] = {}
        for name in specs:
            module, _, suffix = name.rpartition(".")
            self._suffixes.setdefault(module, []).append(suffix)

    def decoder(self, max_seq_len: int) -> Decoder:
        """The whole model, for positions below ``max_seq_len``."""
        return Decoder(
            embedding=self.embedding(),
            layers=[self.layer(i) for i in range(self._config.num_hidden_layers)],
            head=self.head(),
            tied=self._config.share_embedding_table,
            rotary=self.rotary(max_seq_len),
        )

    def embedding(self) -> Embedding:
        """The embedding: all of it, or with use_parallel_embedding the rank's rows."""
        weight, scale = self._tensor(EMBEDDING), self._config.embedding_scale
        if not self._config.use_parallel_embedding:
            return Embedding(weight=weight, scale=scale)
        first = self._rank * weight.shape[0]
        return Embedding(weight=weight, scale=scale, first_token_id=first, group=self._group)

    def layer(self, index: int) -> DecoderLayer:
        """One layer, counted from the embedding."""
        prefix, inter = layer_prefix(index), self._config.inter_layernorms
        post_norm = self._norm(f"{prefix}.post_layernorm.weight")
        # The trap: with norms on both sides, post_layernorm comes after the attention.
        before, after = (
            f"{prefix}.{when}_feedforward_layernorm.weight" for when in ("pre", "post")
        )
        return DecoderLayer(
            input_norm=self._norm(f"{prefix}.input_layernorm.weight"),
            attention=self._attention(index),
            attention_norm=post_norm if inter else None,
            mlp_norm=self._norm(before) if inter else post_norm,
            mlp=self._mlp(prefix) if self._config.moe is None else self._experts(prefix),
            output_norm=self._norm(after) if inter else None,
        )

    def head(self) -> Head:
        """The final norm and lm_head, which may be the embedding."""
        config = self._config
        if not config.share_embedding_table:
            weight = self._tensor(LM_HEAD)
        else:
            weight = self._tensor(EMBEDDING)
            if config.tp_size > 1 and not config.use_parallel_embedding:
                weight = self._vocabulary_share(weight)
        return Head(
            norm=self._norm(FINAL_NORM),
            linear=self._plain(weight),
            vocab_size=config.vocab_size,
            softcap=config.final_logit_softcapping,
            group=self._group,
        )

    def rotary(self, max_seq_len: int) -> RotaryTables:
        """The rotations of positions below ``max_seq_len``, which chooses long_rope's factors."""
        config = self._config
        size, base = config.rotary_dim, config.rotary_base
        magnitude = 1.0
        if config.position_embedding_type == "long_rope":
            original = config.original_max_position_embeddings
            short, long = (
                config.longrope_scaling_short_factors,
                config.longrope_scaling_long_factors,
            )
            assert original is not None
            assert short is not None
            assert long is not None
            factors = long if max_seq_len > original else short
            frequencies = long_rope_frequencies(size, base, factors)
            magnitude = long_rope_magnitude(config.max_position_embeddings, original)
        else:
            frequencies = inverse_frequencies(size, base, config.rotary_scaling)
            if config.rotary_scaling is not None and rope_type(config.rotary_scaling) == "yarn":
                magnitude = yarn_magnitude(config.rotary_scaling)
        dtype = torch_dtype(config.dtype)
        full = rotary_table(frequencies, max_seq_len, dtype, magnitude).to(self._device)
        if config.rope_local_base_freq is None:
            return RotaryTables(full=full)
        frequencies = inverse_frequencies(size, config.rope_local_base_freq, None)
        sliding = rotary_table(frequencies, max_seq_len, dtype).to(self._device)
        return RotaryTables(full=full, sliding=sliding)

    def _attention(self, index: int) -> Attention:
        config, prefix = self._config, f"{layer_prefix(index)}.attention"
        algo = config.quantization.kv_cache_quant_algo
        scale = None if algo is None else self._tensor(kv_cache_scale(index))
        norms = config.qk_layernorm
        return Attention(
            qkv=self._linear(f"{prefix}.qkv"),
            dense=self._row_parallel(f"{prefix}.dense"),
            num_heads=config.num_attention_heads // config.tp_size,
            num_kv_heads=kv_heads_per_rank(config),
            head_size=config.head_size,
            rotary_dim=config.rotary_dim,
            scores=AttentionScores(
                scale=config.attention_scale,
                window=config.window(index),
                softcap=config.attn_logit_softcapping,
            ),
            kv_storage=make_kv_storage(algo, scale, torch_dtype(config.dtype)),
            q_norm=self._norm(f"{prefix}.q_layernorm.weight") if norms else None,
            k_norm=self._norm(f"{prefix}.k_layernorm.weight") if norms else None,
        )

    def _mlp(self, prefix: str) -> Mlp:
        if self._config.fused_mlp:
            fc = self._linear(f"{prefix}.mlp.fc")
        else:
            fc = self._stacked(f"{prefix}.mlp.gate", f"{prefix}.mlp.fc")
        proj = self._row_parallel(f"{prefix}.mlp.proj")
        return GatedMlp(fc=fc, proj=proj, activation=self._activation)

    def _experts(self, prefix: str) -> Mlp:
        moe = self._config.moe
        assert moe is not None
        return MixtureOfExperts(
            router=self._plain(self._tensor(f"{prefix}.mlp.router.weight")),
            fc=self._each_expert(f"{prefix}.mlp.fc", moe.num_experts),
            proj=self._each_expert(f"{prefix}.mlp.proj", moe.num_experts),
            top_k=moe.top_k,
            renormalize=moe.normalization_mode == 1,
            activation=self._activation,
            group=self._group,
        )

    @property
    def _activation(self) -> Activation:
        return "gelu_pytorch_tanh" if self._config.hidden_act == "gelu_pytorch_tanh" else "silu"

    def _linear(self, name: str) -> Linear:
        return self._make(self._algo(name), self._stored(name))

    def _plain(self, weight: torch.Tensor) -> Linear:
        return self._make(None, {"weight": weight})

    def _make(self, algo: str | None, stored: Stored) -> Linear:
        linear = make_linear(algo, stored, self._device, self._clamp)
        return self._invariant(linear, [algo], [stored])

    def _invariant(
        self, linear: Linear, algos: Sequence[str | None], stored: Sequence[Stored]
    ) -> Linear:
        if self._row_tiles is None:
            return linear
        weight = stored[0]["weight"]
        # Routers take float32, whatever the model's dtype; so do their weights.
        dtype = torch_dtype(self._config.dtype) if algos[0] is not None else weight.dtype
        kind = (
            *algos,
            *((s, t.shape, t.dtype) for part in stored for s, t in sorted(part.items())),
        )
        return self._row_tiles.invariant(linear, kind, weight.shape[1], dtype)

    def _row_parallel(self, name: str) -> Linear:
        if self._group is None:
            return self._linear(name)
        stored = self._stored(name)
        bias = stored.pop("bias", None)
        partial = self._make(self._algo(name), stored)
        return RowParallelLinear(
            partial, None if bias is None else bias.to(self._device), self._group
        )

    def _stacked(self, *names: str) -> Linear:
        algos, stored = [self._algo(n) for n in names], [self._stored(n) for n in names]
        linear = stack_linears(algos, stored, self._device, self._clamp)
        return self._invariant(linear, algos, stored)

    def _each_expert(self, name: str, num_experts: int) -> Sequence[Linear]:
        algo, stored = self._algo(name), self._stored(name)
        shape = tuple(stored["weight"].shape)
        dtype = torch_dtype(self._config.dtype)
        of_all = weight_format(algo).stored(shape, dtype)
        of_one = weight_format(algo).stored(shape[1:], dtype)
        # What is stored for all experts alike has the same shape for one.
        shared = {suffix for suffix, part in of_one.items() if part.spec == of_all[suffix].spec}
        experts = (
            {suffix: t if suffix in shared else t[e] for suffix, t in stored.items()}
            for e in range(num_experts)
        )
        return [self._make(algo, expert) for expert in experts]

    def _algo(self, linear: str) -> str | None:
        # Per linear, for exclude_modules may leave single ones of a quantised engine plain.
        quantization = self._config.quantization
        return quantization.quant_algo if quantization.quantizes(linear) else None

    def _stored(self, linear: str) -> Stored:
        return {s: self._source.tensor(f"{linear}.{s}") for s in self._suffixes[linear]}

    def _norm(self, name: str) -> Norm:
        # Gemma's norms round once, like its own code.
        return Norm(
            weight=self._tensor(name),
            epsilon=self._config.norm_epsilon,
            round_last=self._config.architecture.startswith("Gemma"),
        )

    def _vocabulary_share(self, weight: torch.Tensor) -> torch.Tensor:
        rows = padded_vocab_size(self._config) // self._config.tp_size
        share = weight[self._rank * rows : (self._rank + 1) * rows]
        return torch.nn.functional.pad(share, (0, 0, 0, rows - share.shape[0]))

    def _tensor(self, name: str) -> torch.Tensor:
        return self._source.tensor(name).to(self._device)


def _check_tensors(source: TensorSource, expected: Mapping[str, TensorSpec]) -> None:
    found = set(source.names())
    if missing := sorted(expected.keys() - found):
        raise CheckpointError(f"the tensor {missing[0]} is missing")
    if left_over := sorted(found - expected.keys()):
        raise CheckpointError(f"there is a tensor {left_over[0]}, which has no place")
    for name, spec in expected.items():
        if (given := source.spec(name)) != spec:
            raise CheckpointError(f"{name} is {given}; it must be {spec}")
