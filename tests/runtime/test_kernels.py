"""Norm, rotary embedding and paged attention against their plain references."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llmserve.runtime.torch.kernels import attention
from llmserve.runtime.torch.kernels.attention import (
    AttentionPlan,
    AttentionScores,
    DecodeBatch,
    GatheredView,
    PrefillChunk,
    attention_reference,
    causal_mask,
    paged_attention,
    whole_sequences_plan,
)
from llmserve.runtime.torch.kernels.kv_storage import PlainKvStorage, make_kv_storage
from llmserve.runtime.torch.kernels.norm import rms_norm, rms_norm_reference
from llmserve.runtime.torch.kernels.rotary import (
    apply_rotary_,
    apply_rotary_reference,
    inverse_frequencies,
    rotary_table,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = float((actual.cpu().double() - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE[dtype]


@DTYPES
def test_rms_norm(generator: torch.Generator, dtype: torch.dtype, device: str) -> None:
    # In float16 the squares of 1000 overflow: they must be summed in float32.
    x = (torch.randn(5, 70, generator=generator) * 1000).to(dtype)
    weight = (torch.rand(70, generator=generator) + 0.5).to(dtype)
    actual = rms_norm(x.to(device), weight.to(device), 1e-5)
    assert actual.dtype == dtype
    _close(actual, rms_norm_reference(x, weight, 1e-5), dtype)


@pytest.mark.parametrize("round_last", [False, True])
def test_rms_norm_rounds_where_transformers_does(
    generator: torch.Generator, round_last: bool
) -> None:
    x = torch.randn(50, 64, generator=generator).bfloat16()
    # Gemma's weight is 1 less: of both there is an exact bfloat16.
    weight = torch.randint(64, 128, (64,), generator=generator).bfloat16() / 128
    theirs = (Gemma2RMSNorm if round_last else LlamaRMSNorm)(64, eps=1e-6).bfloat16()
    with torch.no_grad():
        theirs.weight.copy_(weight - 1 if round_last else weight)
        expected = theirs(x)
    different = rms_norm(x, weight, 1e-6, round_last=round_last) != expected
    assert different.float().mean() < 1e-3
    other = rms_norm(x, weight, 1e-6, round_last=not round_last) != expected
    assert other.float().mean() > 0.05


def test_rms_norm_epsilon_counts_where_the_row_is_small() -> None:
    x, weight = torch.full((1, 8), 1e-3), torch.ones(8)
    assert rms_norm(x, weight, 1e-6)[0, 0] == pytest.approx(2**-0.5)


@DTYPES
def test_rotary(generator: torch.Generator, dtype: torch.dtype, device: str) -> None:
    inverse = inverse_frequencies(16, 10000.0, None)
    table = rotary_table(inverse, 300, dtype).to(device)
    positions = torch.tensor([0, 1, 299, 17, 17])
    x = torch.randn(5, 4 * 16 + 3, generator=generator).to(dtype)
    expected = apply_rotary_reference(x[:, : 3 * 16].view(5, 3, 16), positions, inverse)
    flat = x.to(device)
    cos, sin = table.index_select(0, positions.to(device)).unsqueeze(1).unbind(2)
    apply_rotary_(flat[:, : 3 * 16].view(5, 3, 16), cos, sin)
    _close(flat[:, : 3 * 16].view(5, 3, 16), expected, dtype)
    assert torch.equal(flat[:, 3 * 16 :].cpu(), x[:, 3 * 16 :])  # in place, and no further


def test_llama3_frequencies_keep_the_short_and_stretch_the_long() -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    plain = inverse_frequencies(128, 500000.0, None)
    scaled = inverse_frequencies(128, 500000.0, scaling)
    wavelengths = 2 * torch.pi / plain
    ratio = plain / scaled
    assert torch.equal(ratio[wavelengths < 2048], torch.ones(int((wavelengths < 2048).sum())))
    assert torch.allclose(ratio[wavelengths > 8192], torch.tensor(8.0))
    between = ratio[(wavelengths >= 2048) & (wavelengths <= 8192)]
    assert len(between) > 2
    assert bool((between.diff() > 0).all())
    assert torch.equal(
        inverse_frequencies(128, 500000.0, {"type": "linear", "factor": 4}) * 4, plain
    )


class Paged:
    """Requests with random K and V in a pool whose every other value is NaN."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.kv_heads, self.group, self.head_size, self.block = 2, 3, 8, 4
        self.dtype, self.device = dtype, device
        width = 2 * self.kv_heads * self.head_size
        self.cache = torch.full((40 * self.block, width), float("nan"), dtype=dtype, device=device)
        blocks = torch.randperm(40, generator=self.generator).tolist()
        self.key_values, self.slots = [], []
        for length in lengths:
            table = [blocks.pop() for _ in range(-(-length // self.block))]
            slots = [table[i // self.block] * self.block + i % self.block for i in range(length)]
            self.slots.append(torch.tensor(slots))
            self.key_values.append(self.random(length, width))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def store(self, request: int, count: int) -> None:
        """The first tokens' K and V are in the cache."""
        slots = self.slots[request][:count].to(self.device)
        self.cache[slots] = self.key_values[request][:count].to(self.device)

    def expected(self, request: int, query: torch.Tensor, scores: AttentionScores) -> torch.Tensor:
        length = len(self.slots[request])
        key, value = self.key_values[request].view(length, 2, self.kv_heads, -1).unbind(1)
        flat = query.reshape(len(query), -1, self.head_size)
        return attention_reference(flat, key, value, length - len(query), scores).flatten(1)

    def run(
        self,
        fresh: list[tuple[int, int]],
        scores: AttentionScores,
        *,
        decodes: Sequence[DecodeBatch] = (),
        prefills: Sequence[PrefillChunk] = (),
    ) -> None:
        """Attend, ``fresh`` being (request, tokens of this step), and compare."""
        tokens = sum(n for _, n in fresh)
        # Large enough for softcaps to bend the scores.
        query = self.random(tokens, self.kv_heads, self.group, self.head_size) * 3
        slots = torch.cat([self.slots[r][-n:] for r, n in fresh]).to(self.device)
        view = GatheredView(slot_mapping=slots, decodes=decodes, prefills=prefills)
        plan = AttentionPlan(views={scores.window: view})
        key_value = torch.cat([self.key_values[r][-n:] for r, n in fresh]).to(self.device)
        storage = PlainKvStorage(self.dtype)
        out = paged_attention(query.to(self.device), key_value, self.cache, plan, scores, storage)
        expected = torch.cat(
            [
                self.expected(r, q, scores)
                for (r, n), q in zip(fresh, query.split([n for _, n in fresh]), strict=True)
            ]
        )
        _close(out, expected, self.dtype)


SCORES = pytest.mark.parametrize(
    "scores",
    [
        AttentionScores(scale=8**-0.5),
        AttentionScores(scale=0.5),
        AttentionScores(scale=8**-0.5, window=4),
        AttentionScores(scale=8**-0.5, softcap=2.0),
        AttentionScores(scale=0.5, window=5, softcap=2.0),
    ],
    ids=["plain", "scale", "window", "softcap", "all"],
)


@DTYPES
@SCORES
def test_decode_attention_is_not_touched_by_what_others_left(
    dtype: torch.dtype, device: str, scores: AttentionScores
) -> None:
    lengths = [1, 5, 9]
    paged = Paged(lengths, dtype, device)
    for request, length in enumerate(lengths):
        paged.store(request, length - 1)
    seen = [
        slots[-(scores.window or length) :]
        for slots, length in zip(paged.slots, lengths, strict=True)
    ]
    longest = max(len(slots) for slots in seen)
    slots = torch.stack([torch.cat((s, s[:1].expand(longest - len(s)))) for s in seen])
    mask = torch.zeros(3, 1, 1, longest, dtype=dtype)
    for request, own in enumerate(seen):
        mask[request, ..., len(own) :] = float("-inf")
    batch = DecodeBatch(rows=slice(0, 3), kv_slots=slots.flatten().to(device), mask=mask.to(device))
    paged.run([(0, 1), (1, 1), (2, 1)], scores, decodes=[batch])


@DTYPES
@SCORES
@pytest.mark.parametrize("query_rows", [3, 256])
def test_mixed_batch(
    dtype: torch.dtype,
    device: str,
    scores: AttentionScores,
    query_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.kernels.attention.QUERY_ROWS", query_rows)
    paged = Paged([6, 11, 7], dtype, device)
    paged.store(0, 5)  # a decode
    paged.store(1, 4)  # a chunk of 7 behind 4; request 2 is a whole prompt
    before = min(4, (scores.window or 11) - 1)
    decode = DecodeBatch(
        rows=slice(0, 1),
        kv_slots=paged.slots[0][-(scores.window or 6) :].to(device),
        mask=None,
    )
    behind = PrefillChunk(
        rows=slice(1, 8),
        num_previous_tokens=before,
        kv_slots=paged.slots[1][4 - before :].to(device),
    )
    whole = PrefillChunk(
        rows=slice(8, 15), num_previous_tokens=0, kv_slots=paged.slots[2].to(device)
    )
    paged.run([(0, 1), (1, 7), (2, 7)], scores, decodes=[decode], prefills=[behind, whole])


@pytest.mark.parametrize("length", [65, 129])
def test_prefills_whose_last_row_has_a_tile_of_its_own(length: int, device: str) -> None:
    # torch's CUDA kernels take 64 queries at a time.
    paged = Paged([length], torch.float32, device)
    chunk = PrefillChunk(
        rows=slice(0, length), num_previous_tokens=0, kv_slots=paged.slots[0].to(device)
    )
    scores = AttentionScores(scale=8**-0.5, window=4)
    paged.run([(0, length)], scores, prefills=[chunk])


@pytest.mark.parametrize("max_scores", [1, 100, 1 << 20])
def test_softcapped_prefills_hold_few_scores_at_a_time(
    max_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.kernels.attention.MAX_SCORES", max_scores)
    paged = Paged([30], torch.float32, "cpu")
    chunk = PrefillChunk(rows=slice(0, 30), num_previous_tokens=0, kv_slots=paged.slots[0])
    paged.run([(0, 30)], AttentionScores(scale=0.3, softcap=1.0), prefills=[chunk])


def test_whole_sequences_plan() -> None:
    paged = Paged([5, 9], torch.float32, "cpu")
    plan = whole_sequences_plan([5, 9], (None, 4), torch.device("cpu"))
    for window in (None, 4):
        view = plan.views[window]
        assert isinstance(view, GatheredView)
        paged.slots = list(view.slot_mapping.split([5, 9]))
        scores = AttentionScores(scale=0.3, window=window)
        paged.run([(0, 5), (1, 9)], scores, prefills=view.prefills)


def test_causal_mask() -> None:
    hidden = float("-inf")
    like = torch.empty(0)
    assert causal_mask(1, 2, like).tolist() == [[0, 0, hidden], [0, 0, 0]]
    assert causal_mask(1, 2, like, window=2).tolist() == [[0, 0, hidden], [hidden, 0, 0]]
    assert causal_mask(1, 2, like, window=1).tolist() == [[hidden, 0, hidden], [hidden, hidden, 0]]


@pytest.mark.parametrize("quant_algo", ["INT8", "FP8"])
def test_a_gather_in_parts_is_that_of_the_whole(
    quant_algo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make_kv_storage(quant_algo, torch.tensor([0.02]), torch.bfloat16)
    key_value = torch.randn(40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cache, slots = storage.store(key_value), torch.arange(39, 2, -2)
    whole = attention._gathered(cache, slots, storage, torch.bfloat16)
    assert torch.equal(whole, storage.load(cache)[slots])
    monkeypatch.setattr(attention, "_UNPACKED_ELEMENTS", 5 * 16)
    assert torch.equal(attention._gathered(cache, slots, storage, torch.bfloat16), whole)
