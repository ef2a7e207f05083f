"""Products with the sparse residual against a dense S2, for every method that runs on this machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dsee_scale.adapters.kernels.sparse_residual import backward_, forward_
from dsee_scale.adapters.support import choose_method, prepare

METHODS = ("gather", "bags")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def positions(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(shape[0] * shape[1], generator=generator)[:count].sort().values
    return (flat // shape[1]).int(), (flat % shape[1]).int()


def dense(rows, cols, values, shape):
    return torch.zeros(shape, dtype=values.dtype).index_put((rows.long(), cols.long()), values)


def check_products(rows, cols, shape, tokens, method, dtype):
    generator = torch.Generator().manual_seed(1)
    x, dy, y, dx = (
        torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (shape[1], shape[0], shape[0], shape[1])
    )
    values = torch.randn(rows.numel(), generator=generator, dtype=torch.float64).to(dtype)
    support = prepare(rows, cols, shape, method)
    assert support.method == method
    s2 = dense(rows, cols, values.double(), shape)
    expected = (
        y.double() + x.double() @ s2.t(),
        dx.double() + dy.double() @ s2,
        (dy.double().t() @ x.double())[rows.long(), cols.long()],
    )
    forward_(y, x, values, support)
    dvalues = backward_(dx, dy, x, values, support)
    close = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * max(1, tokens) ** 0.5)
    for found, wanted in zip((y, dx, dvalues), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, **close)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
@pytest.mark.parametrize("count", [1, 5, 200, 21 * 34])
def test_products_equal_the_dense_ones(count, tokens, method, dtype):
    shape = (21, 34)
    check_products(*positions(shape, count), shape, tokens, method, dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("line", ["row", "column"])
def test_entries_that_share_a_row_or_a_column_add_up(line, method):
    shape = (40, 40)
    along, fixed = torch.arange(40, dtype=torch.int32), torch.full((40,), 3, dtype=torch.int32)
    rows, cols = (fixed, along) if line == "row" else (along, fixed)
    for dtype in TOLERANCE:
        check_products(rows, cols, shape, 9, method, dtype)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_support_of_any_shape(data):
    shape = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    flat = data.draw(
        st.lists(st.integers(0, shape[0] * shape[1] - 1), min_size=1, max_size=40, unique=True).map(sorted)
    )
    rows = torch.tensor([f // shape[1] for f in flat], dtype=torch.int32)
    cols = torch.tensor([f % shape[1] for f in flat], dtype=torch.int32)
    method = data.draw(st.sampled_from(METHODS))
    check_products(rows, cols, shape, data.draw(st.integers(0, 5)), method, torch.float64)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_on_every_run_with_two_threads(method):
    shape, threads = (64, 64), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows, cols = positions(shape, 900)
        support = prepare(rows, cols, shape, method)
        x, dy, values = torch.randn(700, 64), torch.randn(700, 64), torch.randn(900)
        results = []
        for _ in range(4):
            y = torch.zeros(700, 64)
            dx = torch.zeros(700, 64)
            forward_(y, x, values, support)
            dvalues = backward_(dx, dy, x, values, support)
            results.append(torch.cat([y.flatten(), dx.flatten(), dvalues]))
        assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)


def test_the_method_follows_the_number_of_entries_and_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    chosen = [choose_method(n, (4096, 4096), cpu) for n in (1, 64, 1678, 16777, 167772)]
    assert chosen == ["gather", "gather", "gather", "bags", "bags"]
    assert choose_method(64, (4096, 4096), cuda) in ("triton", "bags"), "gather needs atomics on a GPU"


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned in memory of its own."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("count", [64, 512, 16384])
def test_temporaries_are_a_few_vectors_of_tokens_or_entries(count):
    shape, tokens = (1024, 1024), 200
    rows, cols = positions(shape, count)
    support = prepare(rows, cols, shape)
    x, y, dx, dy = (torch.randn(tokens, 1024) for _ in range(4))
    values = torch.randn(count)
    with LargestTensor(x, y, dx, dy, values) as largest:
        forward_(y, x, values, support)
        backward_(dx, dy, x, values, support)
    assert 0 < largest.numel <= max(tokens * 1024, count)
