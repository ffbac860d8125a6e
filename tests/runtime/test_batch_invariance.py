"""What a token is computed to depends, bit for bit, on the tokens before it and on nothing else.

Every sequence is computed by itself in one step, and again beside others in random steps: chunks of
all sizes, single tokens, several tokens behind many (as drafts are verified), in other blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmserve.build.native import build
from llmserve.checkpoint.engine_dir import read_engine
from llmserve.checkpoint.sharding import kv_heads_per_rank
from llmserve.config import BuildConfig, CalibrationConfig, ConvertConfig
from llmserve.convert.converter import convert
from llmserve.quantization import weight_format
from llmserve.runtime.torch.attention_plan import GatheredPlanner, RequestRows
from llmserve.runtime.torch.kernels import batch_invariant, batch_invariant_attention
from llmserve.runtime.torch.kernels.attention import (
    AttentionPlan,
    AttentionScores,
    attention_reference,
)
from llmserve.runtime.torch.kernels.batch_invariant import (
    MAX_ROWS,
    BatchInvariantProducts,
    RowTiles,
    row_tile,
)
from llmserve.runtime.torch.kernels.batch_invariant_attention import (
    KEY_TILE,
    InvariantPlanner,
)
from llmserve.runtime.torch.kernels.elementwise import (
    GELU_GRAIN,
    LOOP_GRAIN,
    MKL_GRAIN,
    whole_vectors,
)
from llmserve.runtime.torch.kernels.kv_storage import PlainKvStorage
from llmserve.runtime.torch.kernels.linear import make_linear
from llmserve.runtime.torch.loading import load_decoder
from tests.models import VOCAB_SIZE, make_model

CPU = torch.device("cpu")
MAX_SEQ_LEN, BLOCK = 320, 8
# Around the borders of key tiles, and no multiples of anything.
LENGTHS = (1, 3, 63, 64, 65, 130, 310)
# Wide enough for MKL to choose among its kernels; sides that no vector divides.
WIDE = {"hidden_size": 276, "intermediate_size": 333, "head_dim": 20}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", WIDE),
    "llama_tiny": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {**WIDE, "sliding_window": 150}),
    "mixtral": ("mixtral", WIDE),
    "qwen2": ("qwen2", {"hidden_size": 264, "sliding_window": 100}),
    "qwen3": ("qwen3", WIDE),
    "qwen3_moe": ("qwen3_moe", {**WIDE, "moe_intermediate_size": 45}),
    "gemma": ("gemma", WIDE),
    "gemma2": ("gemma2", {**WIDE, "sliding_window": 65}),
    "gemma3": ("gemma3_text", WIDE),
    "phi3": ("phi3", {"hidden_size": 272, "num_attention_heads": 17, "num_key_value_heads": 1}),
}
# Weights, KV cache, dtype of the rest.
FORMATS = [
    ("none", "auto", "bfloat16"),
    ("none", "auto", "float16"),
    ("w8a16", "auto", "float32"),
    ("w8a16", "int8", "bfloat16"),
    ("fp8_rowwise", "fp8", "float32"),
    ("fp8", "auto", "bfloat16"),
    ("int8_sq", "int8", "float32"),
]


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def make_engine(
    path: Path,
    family: str,
    quant: str = "none",
    cache: str = "auto",
    dtype: str = "float32",
    **overrides: Any,
) -> Path:
    make_model(path / "hf", family, **overrides)
    settings = ConvertConfig(quant=quant, kv_cache_dtype=cache, dtype=dtype)
    calibration = CalibrationConfig(samples=4, seq_len=64) if settings.calibrated else None
    convert(path / "hf", path / "checkpoint", settings=settings, calibration=calibration)
    return build(path / "checkpoint", path / "engine", BuildConfig(max_seq_len=MAX_SEQ_LEN))


class Model:
    """A decoder and its KV cache, without a scheduler: steps are given by hand."""

    def __init__(self, engine: Path, *, deterministic: bool = True) -> None:
        self.config, _ = read_engine(engine)
        self.decoder = load_decoder(
            *(engine, self.config),
            max_seq_len=MAX_SEQ_LEN,
            device=CPU,
            deterministic=deterministic,
        )
        self.layers = [layer.attention for layer in self.decoder.layers]
        plain = GatheredPlanner(torch.float32, CPU)
        heads = self.config.num_attention_heads
        self.planner = InvariantPlanner(heads) if deterministic else plain

    @torch.inference_mode()
    def compute(
        self, sequences: Sequence[torch.Tensor], schedule: Sequence[Sequence[tuple[int, int]]]
    ) -> list[torch.Tensor]:
        """Hidden states and logits of every token, by sequence.

        Args:
            sequences: Token ids of each.
            schedule: Of each step, sequences and how many more of their tokens it computes.
        """
        blocks = MAX_SEQ_LEN // BLOCK
        tables = np.random.default_rng(len(schedule)).permutation(len(sequences) * blocks)
        tables = tables.reshape(len(sequences), blocks).astype(np.int32)
        width = 2 * kv_heads_per_rank(self.config) * self.config.head_size
        caches = [
            torch.full((tables.size * BLOCK, width), 127, dtype=a.kv_storage.dtype)
            if a.kv_storage.dtype in (torch.int8, torch.uint8)
            else torch.full((tables.size * BLOCK, width), float("nan"), dtype=a.kv_storage.dtype)
            for a in self.layers
        ]
        done = np.zeros(len(sequences), dtype=np.int64)
        results: list[list[torch.Tensor]] = [[] for _ in sequences]
        for step in schedule:
            step = sorted(step, key=lambda part: (part[1] > 1, done[part[0]]))
            slots, counts = (np.array(column) for column in zip(*step, strict=True))
            rows = RequestRows(
                starts=done[slots],
                counts=counts,
                first_rows=np.cumsum(counts) - counts,
                slots=slots,
                block_tables=tables,
                tokens_per_block=BLOCK,
            )
            windows = {layer.scores.window for layer in self.layers}
            plan = AttentionPlan(views={w: self.planner.view(rows, w) for w in windows})
            tokens = torch.cat([sequences[s][done[s] :][:n] for s, n in step])
            positions = torch.from_numpy(rows.positions())
            hidden = self.decoder.forward(tokens, positions, plan, caches)
            both = torch.cat((hidden.float(), self.decoder.logits(hidden)), dim=-1)
            for slot, part in zip(slots, torch.split(both, counts.tolist()), strict=True):
                results[slot].append(part)
            done[slots] += counts
        return [torch.cat(parts) for parts in results]

    def alone(self, sequence: torch.Tensor) -> torch.Tensor:
        """The same of one sequence in one step."""
        return self.compute([sequence], [[(0, len(sequence))]])[0]


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator) for n in LENGTHS]


def random_schedule(lengths: Sequence[int], seed: int) -> list[list[tuple[int, int]]]:
    """Steps that compute all tokens: prefills, decodes, and a few tokens at a time."""
    random, left = np.random.default_rng(seed), list(lengths)
    schedule = []
    while any(left):
        step = []
        for slot in random.permutation(len(left)).tolist():
            if left[slot] and random.random() < 0.7:
                count = int(random.choice([1, 1, 2, 3, 7, 20, 64, 150]))
                step.append((slot, min(count, left[slot])))
                left[slot] -= step[-1][1]
        if step:
            schedule.append(step)
    return schedule


def check(model: Model, seeds: Sequence[int]) -> None:
    given = sequences()
    expected = [model.alone(sequence) for sequence in given]
    for seed in seeds:
        actual = model.compute(given, random_schedule(LENGTHS, seed))
        for one, other in zip(actual, expected, strict=True):
            assert bool(one.isfinite().all())
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", list(MODELS))
def test_families(tmp_path: Path, name: str) -> None:
    family, overrides = MODELS[name]
    check(Model(make_engine(tmp_path, family, **overrides)), seeds=range(2))


@pytest.mark.parametrize(("quant", "cache", "dtype"), FORMATS)
def test_formats(tmp_path: Path, quant: str, cache: str, dtype: str) -> None:
    check(Model(make_engine(tmp_path, "llama", quant, cache, dtype, **WIDE)), seeds=range(2))


@pytest.mark.parametrize("threads", [pytest.param(2, marks=pytest.mark.full), 3], indirect=True)
def test_threads(tmp_path: Path, threads: int) -> None:
    check(Model(make_engine(tmp_path, "gemma2", **MODELS["gemma2"][1])), seeds=range(1))


def test_a_recomputed_answer_is_the_one_that_was_decoded(tmp_path: Path) -> None:
    """As after a preemption: what was decoded token by token comes again as one prefill."""
    model = Model(make_engine(tmp_path, "llama", **WIDE))
    (sequence,) = (s for s in sequences() if len(s) == 130)
    decoded = model.compute([sequence], [[(0, 60)], *[[(0, 1)]] * 70])[0]
    assert torch.equal(decoded, model.alone(sequence))


def test_plain_computation_would_not_do(tmp_path: Path) -> None:
    """The tests above can fail on this machine."""
    model = Model(make_engine(tmp_path, "llama", **WIDE), deterministic=False)
    with pytest.raises(AssertionError):
        check(model, seeds=[0])


def rows(count: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(count, width, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)


@pytest.mark.parametrize("quant_algo", [None, "W8A16", "FP8_PER_CHANNEL_PER_TOKEN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_row_of_a_product_is_the_same_in_any_batch(
    quant_algo: str | None, dtype: torch.dtype
) -> None:
    weight = rows(515, 768) * 0.05
    stored = dict(weight_format(quant_algo).quantize(weight, torch.full((768,), 3.0), 0.5))
    if quant_algo is None:
        stored["weight"] = weight.to(dtype)
    plain = make_linear(quant_algo, stored, CPU)
    linear = RowTiles().invariant(plain, quant_algo, 768, dtype)
    x = rows(2 * MAX_ROWS + 11, 768, dtype)
    alone = torch.cat([linear(row) for row in torch.split(x, 1)])
    assert alone.shape == (len(x), 515)
    assert torch.allclose(alone.float(), plain(x).float(), rtol=0.02, atol=0.02)
    for count in (2, 3, 5, 16, 17, 100, MAX_ROWS, MAX_ROWS + 1, len(x)):
        assert torch.equal(linear(x[-count:]), alone[-count:])


class ByBatch:
    """A product whose results change with the number of rows, at a border."""

    weights_bytes = 0

    def __init__(self, border: int) -> None:
        self.border, self.weight, self.sizes = border, rows(64, 96), set[int]()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.add(len(x))
        return x.double().matmul(self.weight.double().t()).float() + (len(x) < self.border)


@pytest.mark.parametrize(("border", "tile"), [(0, 1), (2, 4), (5, 16), (16, 16), (40, None)])
def test_row_tile_is_the_smallest_that_keeps_the_bits(border: int, tile: int | None) -> None:
    assert row_tile(ByBatch(border), 96, torch.float32) == tile


@pytest.mark.parametrize("border", [5, 40])
def test_linears_that_no_tile_suits_are_computed_tile_by_tile(border: int) -> None:
    product = ByBatch(border)
    linear, x = RowTiles().invariant(product, "kind", 96, torch.float32), rows(90, 96)
    product.sizes.clear()
    whole = linear(x)
    assert product.sizes == ({96} if border == 5 else {16})
    assert torch.equal(whole, torch.cat([linear(row) for row in torch.split(x, 1)]))


def test_linears_of_a_kind_are_tried_once() -> None:
    tiles, first, second = RowTiles(), ByBatch(5), ByBatch(5)
    tiles.invariant(first, "kind", 96, torch.float32)
    tiles.invariant(second, "kind", 96, torch.float32)
    assert first.sizes
    assert not second.sizes


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_batches_of_products(
    transposed: bool, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(batch_invariant, "row_tile", lambda *_: None)
    products = BatchInvariantProducts(20, 64, transposed=transposed)
    left = rows(5 * 48, 20).view(5, 48, 20)
    right = rows(5 * 64, 20).view(5, 64, 20).transpose(1, 2)
    right = right if transposed else right.contiguous()
    out = torch.empty(5, 48, 64)
    products(left, right, out)
    assert torch.allclose(out, left @ right, atol=1e-4)
    single = torch.empty(1, products.tile, 64)
    for i in range(5):
        for start in range(0, 48, products.tile):
            part = slice(start, start + products.tile)
            products(left[i : i + 1, part].contiguous(), right[i : i + 1], single)
            assert torch.equal(single[0], out[i, part])


FUNCTIONS: dict[str, tuple[int, Callable[[torch.Tensor], object]]] = {
    "silu": (LOOP_GRAIN, lambda room: torch.nn.functional.silu(room, inplace=True)),
    "gelu": (GELU_GRAIN, lambda room: torch.ops.aten.gelu_(room, approximate="tanh")),
    "exp": (MKL_GRAIN, torch.exp_),
    "tanh": (MKL_GRAIN, torch.tanh_),
}


@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_element_is_the_same_wherever_it_lies(
    name: str, dtype: torch.dtype, threads: int
) -> None:
    grain, function = FUNCTIONS[name]
    x = rows(3001, 75, dtype)

    def applied(part: torch.Tensor) -> torch.Tensor:
        room, copy = whole_vectors(part, grain)
        function(room)
        return copy

    expected = torch.cat([applied(part) for part in torch.split(x, 40)])
    assert torch.equal(
        expected.flatten()[::501], torch.cat([applied(e) for e in x.flatten()[::501].split(1)])
    )
    for start, stop in ((0, 1), (7, 8), (5, 300), (2, 900), (1, 3001)):
        assert torch.equal(applied(x[start:stop]), expected[start:stop])


def attended(
    planner: Any,
    starts: Sequence[int],
    counts: Sequence[int],
    window: int | None,
    softcap: float | None,
) -> list[torch.Tensor]:
    """What rows of requests get, K and V and queries being functions of request and position."""
    kv_heads, group, head_size = 2, 3, 20
    order = sorted(range(len(counts)), key=lambda i: (counts[i] > 1, starts[i]))
    slots, first = np.array(order), np.array([starts[i] for i in order])
    number = np.array([counts[i] for i in order])
    blocks = 1200 // BLOCK
    tables = np.random.default_rng(sum(counts)).permutation(8 * blocks).reshape(8, blocks)
    packed = RequestRows(
        starts=first,
        counts=number,
        first_rows=np.cumsum(number) - number,
        slots=slots,
        block_tables=tables.astype(np.int32),
        tokens_per_block=BLOCK,
    )
    cache = torch.full((tables.size * BLOCK, 2 * kv_heads * head_size), float("nan"))
    queries = []
    for i, (slot, start, count) in enumerate(zip(order, first, number, strict=True)):
        seen = 0 if window is None else max(0, start - window + 1)
        positions = np.arange(seen, start + count)
        known = sequence_rows(slot, 2 * kv_heads * head_size)
        cache[torch.from_numpy(packed.kv_slots(i, positions))] = known[seen : start + count]
        queries.append(sequence_rows(slot + 8, kv_heads * group * head_size)[start : start + count])
    query = torch.cat(queries).view(-1, kv_heads, group, head_size)
    scores = AttentionScores(scale=head_size**-0.5, window=window, softcap=softcap)
    view = planner.view(packed, window)
    out = view.attend(query, cache, scores, PlainKvStorage(torch.float32)).flatten(1)
    parts = torch.split(out, number.tolist())
    return [parts[order.index(i)] for i in range(len(counts))]


@cache
def sequence_rows(seed: int, width: int) -> torch.Tensor:
    return torch.randn(1200, width, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 2, 64, 65, 150, 400])
@pytest.mark.parametrize("max_scores", [1, 1 << 20])
def test_attention(
    window: int | None, softcap: float | None, max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_invariant_attention, "MAX_INVARIANT_SCORES", max_scores)
    lengths, planner = (1, 64, 129, 1150), InvariantPlanner(6)
    whole = [
        attended(planner, [0] * 8, [*[1] * i, n], window, softcap)[i] for i, n in enumerate(lengths)
    ]
    scores = AttentionScores(scale=20**-0.5, window=window, softcap=softcap)
    for slot, (length, actual) in enumerate(zip(lengths, whole, strict=True)):
        last = slice(max(0, length - 5), length)
        key, value = sequence_rows(slot, 80)[:length].view(length, 2, 2, 20).unbind(1)
        query = sequence_rows(slot + 8, 120)[last].view(-1, 6, 20)
        expected = attention_reference(query, key, value, last.start, scores).flatten(1)
        assert float((actual[last].double() - expected).abs().max()) < 1e-5
    random = np.random.default_rng(0)
    for _ in range(6):
        counts = [int(min(random.choice([1, 1, 5, 8, 9, 70, 600]), n)) for n in lengths]
        starts = [int(random.integers(0, n - c + 1)) for n, c in zip(lengths, counts, strict=True)]
        parts = attended(planner, starts, counts, window, softcap)
        for part, all_rows, start, count in zip(parts, whole, starts, counts, strict=True):
            assert torch.equal(part, all_rows[start : start + count])


def test_a_tile_of_queries_holds_few_scores() -> None:
    rows_ = RequestRows(
        starts=np.array([0, 3000, 9, 0]),
        counts=np.array([1, 1, 6, 3000]),
        first_rows=np.array([0, 1, 2, 8]),
        slots=np.arange(4),
        block_tables=np.arange(4 * 400, dtype=np.int32).reshape(4, 400),
        tokens_per_block=BLOCK,
    )
    view = InvariantPlanner(12).view(rows_, None)
    assert sorted(torch.cat([b.rows for b in view.batches]).unique().tolist()) == list(range(3008))
    for batch in view.batches:
        scores = len(batch.query_tiles) * batch.queries * 12 * KEY_TILE
        assert scores <= 2 * batch_invariant_attention.MAX_INVARIANT_SCORES
    assert {batch.queries for batch in view.batches} == {1, 8, 16}
