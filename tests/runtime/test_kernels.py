"""Norm, rotary embedding and paged attention against their plain references."""

from __future__ import annotations

import pytest
import torch

from llmserve.runtime.torch.kernels.attention import (
    AttentionPlan,
    DecodeBatch,
    PrefillChunk,
    attention_reference,
    causal_mask,
    paged_attention,
)
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

    def expected(self, request: int, query: torch.Tensor) -> torch.Tensor:
        length = len(self.slots[request])
        key, value = self.key_values[request].view(length, 2, self.kv_heads, -1).unbind(1)
        flat = query.reshape(len(query), -1, self.head_size)
        return attention_reference(flat, key, value, length - len(query)).flatten(1)

    def run(self, query: torch.Tensor, fresh: list[tuple[int, int]], plan: AttentionPlan) -> None:
        """Attend, ``fresh`` being (request, tokens of this step), and compare."""
        key_value = torch.cat([self.key_values[r][-n:] for r, n in fresh]).to(self.device)
        out = paged_attention(query.to(self.device), key_value, self.cache, plan)
        expected = torch.cat(
            [
                self.expected(r, q)
                for (r, n), q in zip(fresh, query.split([n for _, n in fresh]), strict=True)
            ]
        )
        _close(out, expected, self.dtype)


@DTYPES
def test_decode_attention_is_not_touched_by_what_others_left(
    dtype: torch.dtype, device: str
) -> None:
    lengths = [1, 5, 9]
    paged = Paged(lengths, dtype, device)
    for request, length in enumerate(lengths):
        paged.store(request, length - 1)
    longest = max(lengths)
    slots = torch.stack(
        [torch.cat((s, s[:1].expand(longest - len(s)))) for s in paged.slots]
    ).flatten()
    mask = torch.zeros(3, 1, 1, longest, dtype=dtype)
    for request, length in enumerate(lengths):
        mask[request, ..., length:] = float("-inf")
    batch = DecodeBatch(rows=slice(0, 3), kv_slots=slots.to(device), mask=mask.to(device))
    plan = AttentionPlan(
        slot_mapping=torch.stack([s[-1] for s in paged.slots]).to(device),
        decodes=[batch],
        prefills=[],
    )
    paged.run(paged.random(3, 2, 3, 8), [(0, 1), (1, 1), (2, 1)], plan)


@DTYPES
@pytest.mark.parametrize("query_rows", [3, 256])
def test_mixed_batch(
    dtype: torch.dtype, device: str, query_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmserve.runtime.torch.kernels.attention._QUERY_ROWS", query_rows)
    paged = Paged([6, 11, 7], dtype, device)
    paged.store(0, 5)  # a decode
    paged.store(1, 4)  # a chunk of 7 behind 4; request 2 is a whole prompt
    plan = AttentionPlan(
        slot_mapping=torch.cat([paged.slots[0][-1:], paged.slots[1][-7:], paged.slots[2]]).to(
            device
        ),
        decodes=[DecodeBatch(rows=slice(0, 1), kv_slots=paged.slots[0].to(device), mask=None)],
        prefills=[
            PrefillChunk(
                rows=slice(1, 8), num_computed_tokens=4, kv_slots=paged.slots[1].to(device)
            ),
            PrefillChunk(
                rows=slice(8, 15), num_computed_tokens=0, kv_slots=paged.slots[2].to(device)
            ),
        ],
    )
    paged.run(paged.random(15, 2, 3, 8), [(0, 1), (1, 7), (2, 7)], plan)


def test_causal_mask() -> None:
    assert causal_mask(1, 2, torch.empty(0)).tolist() == [[0, 0, float("-inf")], [0, 0, 0]]
