"""Philox4x32-10 against its authors' test vectors and against numpy's implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmserve.runtime.torch.kernels.philox import philox4x32, uniform

# (counter, key, result), from the known-answer tests of Random123.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip
CONSTANTS = {
    32: ((0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)),
    64: (
        (0xD2E7470EE14C6C93, 0xCA5A826395121157),
        (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
    ),
}


def philox(counter: list[int], key: list[int], bits: int) -> list[int]:
    """The paper's definition in Python's integers, for words of 32 or 64 bits."""
    (m0, m1), weyl = CONSTANTS[bits]
    mask = 2**bits - 1
    c0, c1, c2, c3 = counter
    for round_ in range(10):
        k0, k1 = ((k + round_ * w) & mask for k, w in zip(key, weyl, strict=True))
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> bits) ^ c1 ^ k0, p1 & mask, (p0 >> bits) ^ c3 ^ k1, p0 & mask
    return [c0, c1, c2, c3]


def test_the_definition_equals_numpys() -> None:
    # numpy has Philox4x64 alone; it counts up before it generates.
    key, counter = [123, 2**63 + 7], [41, 2**64 - 1, 3, 4]
    rng = np.random.Philox(key=np.array(key, np.uint64), counter=np.array(counter, np.uint64))
    assert rng.random_raw(4).tolist() == philox([42, *counter[1:]], key, 64)


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter: str, key: str, result: str, device: str) -> None:
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, result)]
    c, k = (torch.tensor(w, device=device)[:, None] for w in words[:2])
    assert philox4x32(c, k)[:, 0].tolist() == words[2] == philox(words[0], words[1], 32)


def test_equals_the_definition(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2**32, (6, 200), generator=generator)
    result = philox4x32(words[:4].to(device), words[4:].to(device)).cpu()
    for i in range(200):
        column = words[:, i].tolist()
        assert result[:, i].tolist() == philox(column[:4], column[4:], 32)


def test_uniform_is_a_function_of_its_key_alone(device: str) -> None:
    seed, index, position = -(2**63) + 12345, 3, 2**33 + 17
    expected = philox(
        [position % 2**32, position >> 32, index, 0],
        [(seed % 2**64) % 2**32, (seed % 2**64) >> 32],
        32,
    )
    value = ((expected[0] >> 5) * 2**26 + (expected[1] >> 6)) / 2**53
    args = (torch.tensor([seed] * 3), torch.tensor([index, 0, index]))
    positions = torch.tensor([position, position, 0])
    drawn = uniform(*(a.to(device) for a in args), positions.to(device)).tolist()
    assert drawn[0] == value
    assert len(set(drawn)) == 3


def test_uniform_is_uniform() -> None:
    n = 100_000
    drawn = uniform(torch.full((n,), 7), torch.zeros(n, dtype=torch.int64), torch.arange(n))
    assert 0.0 <= float(drawn.min()) < 1e-3
    assert 1 - 1e-3 < float(drawn.max()) < 1.0
    counts = torch.histc(drawn, bins=100, min=0.0, max=1.0)
    chi_square = float(((counts - n / 100) ** 2 / (n / 100)).sum())
    assert chi_square < 148.2  # 99 degrees of freedom: one in a thousand is larger
    assert abs(float(torch.corrcoef(torch.stack((drawn[:-1], drawn[1:])))[0, 1])) < 0.01
