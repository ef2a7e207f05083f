"""Zeros told from bits are the zeros that torch sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsee_scale.algorithms.bits import CPU_CHUNK, count_nonzero, count_ones, multiply_by_bits_, nonzero

SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_floats_are_zero_where_torch_says_so(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.tensor([*SPECIAL, smallest, -smallest], dtype=dtype)
    assert nonzero(values).tolist() == [False, False] + [True] * 7
    many = torch.randn(CPU_CHUNK * 2 + 3, dtype=dtype).relu()
    assert torch.equal(nonzero(many), many != 0)
    assert count_nonzero(many) == int((many != 0).sum())


@pytest.mark.parametrize("values", [torch.tensor([0, 1, -1]), torch.tensor([False, True, True])])
def test_integers_and_booleans_count_too(values):
    assert nonzero(values).tolist() == [False, True, True]
    assert count_nonzero(values) == 2


def test_any_layout_counts():
    matrix = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 3.0]])
    assert torch.equal(nonzero(matrix.t()), matrix.t() != 0)
    assert count_nonzero(matrix.t()) == count_nonzero(matrix) == 3
    assert count_nonzero(matrix[:0]) == 0


@pytest.mark.parametrize("numpy2", [True, False])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4099])
def test_ones_of_packed_bits_are_those_that_numpy_unpacks(size, numpy2, monkeypatch):
    if not numpy2:
        monkeypatch.delattr(np, "bitwise_count", raising=False)
    packed = np.random.default_rng(0).integers(0, 256, size + 1, dtype=np.uint8)[1:]
    assert count_ones(packed) == np.unpackbits(packed).sum()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integers_times_bits_keep_their_value_or_are_zero(dtype):
    limits = torch.iinfo(dtype)
    words = torch.tensor([limits.min, limits.max, -1, 5, 0], dtype=dtype).repeat(3)
    bits = torch.arange(15) % 2 == 0
    expected = words * bits
    multiply_by_bits_(words, bits)
    assert torch.equal(words, expected)
