"""The Triton kernels against a dense S2: on a GPU, or on CPU through Triton's interpreter where Triton is."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds, or with `pip install triton`")

from dsee_scale.adapters.kernels import triton_kernels  # noqa: E402
from dsee_scale.adapters.kernels.sparse_residual import backward_, forward_  # noqa: E402
from dsee_scale.adapters.kernels.triton_merge import merge_under_mask_  # noqa: E402
from dsee_scale.adapters.linear import attach, train_under_mask  # noqa: E402
from dsee_scale.adapters.support import choose_method, prepare  # noqa: E402
from dsee_scale.algorithms.delta import Delta, merged_weight  # noqa: E402
from tests.unit.test_delta import make_spec  # noqa: E402
from tests.unit.test_sparse_residual import dense, positions  # noqa: E402

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 5e-2}


def tensors(shape, tokens, count, dtype):
    generator = torch.Generator().manual_seed(1)
    sizes = ((tokens, shape[1]), (tokens, shape[0]), (tokens, shape[0]), (tokens, shape[1]), (count,))
    return [torch.randn(size, generator=generator).to(DEVICE, dtype) for size in sizes]


def prepared(shape, count, transposed):
    rows, cols = (index.to(DEVICE) for index in positions(shape, count))
    support = prepare(rows, cols, shape, "triton")
    object.__setattr__(support, "transposed", transposed)
    return support


def close(found, expected, tokens):
    bound = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound * max(1, tokens) ** 0.5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "count"), [(0, 9), (1, 1), (7, 200), (300, 90), (1300, 9)])
def test_kernels_equal_the_dense_product(tokens, count, transposed, dtype):
    shape = (21, 34)
    support = prepared(shape, count, transposed)
    x, dy, y, dx, values = tensors(shape, tokens, count, dtype)
    s2 = dense(support.rows.cpu(), support.cols.cpu(), values.cpu().double(), shape).to(DEVICE)
    expected_y, expected_dx = y.double() + x.double() @ s2.t(), dx.double() + dy.double() @ s2
    forward_(y, x, values, support)
    dvalues = backward_(dx, dy, x, values, support)
    close(y, expected_y, tokens)
    close(dx, expected_dx, tokens)
    assert dvalues.dtype == torch.promote_types(dtype, torch.float32)
    expected = (dy.double().t() @ x.double())[support.rows.long(), support.cols.long()]
    torch.testing.assert_close(dvalues.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("line", ["row", "column"])
def test_entries_that_share_a_row_or_a_column_add_up(line, transposed):
    along = torch.arange(40, dtype=torch.int32, device=DEVICE)
    fixed = torch.full_like(along, 3)
    support = prepare(*((fixed, along) if line == "row" else (along, fixed)), (40, 40), "triton")
    object.__setattr__(support, "transposed", transposed)
    x, dy, y, dx, values = tensors((40, 40), 9, 40, torch.float32)
    s2 = dense(support.rows.cpu(), support.cols.cpu(), values.cpu().double(), (40, 40)).to(DEVICE)
    expected_y, expected_dx = y.double() + x.double() @ s2.t(), dx.double() + dy.double() @ s2
    forward_(y, x, values, support)
    backward_(dx, dy, x, values, support)
    close(y, expected_y, 9)
    close(dx, expected_dx, 9)


@pytest.mark.parametrize("transposed", [False, True])
def test_views_with_strides_are_read_and_written_in_place(transposed):
    shape, tokens = (21, 34), 6
    support = prepared(shape, 50, transposed)
    x, _, y, _, values = tensors(shape, 2 * tokens, 50, torch.float32)
    s2 = dense(support.rows.cpu(), support.cols.cpu(), values.cpu().double(), shape).to(DEVICE)
    untouched, expected = y[1::2].clone(), y[::2].double() + x[::2].double() @ s2.t()
    triton_kernels.accumulate_(y[::2], x[::2], values, support.forward, transposed)
    close(y[::2], expected, tokens)
    assert torch.equal(y[1::2], untouched)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("under_mask", [False, True])
@pytest.mark.parametrize("count", [64, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gpu", ["cuda:0", pytest.param("cuda:1", marks=two_gpus)])
def test_an_adapted_layer_on_any_gpu_equals_the_one_on_the_cpu(gpu, dtype, count, under_mask):
    rows, cols = positions((1024, 768), count)
    layers = {}
    for device in ("cpu", gpu):
        torch.manual_seed(0)
        layer = torch.nn.Linear(768, 1024).to(device, dtype)
        spec = make_spec((1024, 768), ((0, 1024),), False, 8, count, 2.0)
        generator = torch.Generator().manual_seed(0)
        attach(layer.requires_grad_(False), spec, rows, cols, generator=generator, dtype=dtype, device=device)
        with torch.no_grad():
            layer.dsee_values.copy_(torch.linspace(-1, 1, count))
            layer.weight[torch.arange(1024) % 2 == 0, ::3] = 0
        train_under_mask(layer, under_mask)
        layers[device] = layer
    x = torch.randn(300, 768).to(dtype)
    results = []
    for device, layer in layers.items():
        moved = x.to(device).requires_grad_()
        output = layer(moved)
        output.square().sum().backward()
        results.append([output, moved.grad, layer.dsee_flat.grad])
    for ours, theirs in zip(*results, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs.cpu(), rtol=0.05, atol=0.02 * scale)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_gpu_gives_the_same_bits_on_every_run():
    for count in (64, 20_000):
        rows, cols = (index.cuda() for index in positions((1024, 768), count))
        support = prepare(rows, cols, (1024, 768))
        assert support.method == choose_method(count, (1024, 768), rows.device)
        x, dy, y, _, values = tensors((1024, 768), 300, count, torch.bfloat16)
        results = []
        for _ in range(5):
            out = y.clone()
            forward_(out, x, values, support)
            results.append((out, backward_(None, dy, x, values, support)))
        assert all(torch.equal(a, b) for run in results for a, b in zip(run, results[0], strict=True))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slices", [((0, 150),), ((0, 40), (90, 150))])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count, rank", [(0, 5), (30, 5), (30, 100)])
def test_the_merged_weight_is_that_of_the_blocks(count, rank, transposed, slices, dtype, out_dtype):
    spec = make_spec((150, 70), slices, transposed, rank, count, 1.7)
    generator = torch.Generator().manual_seed(3)
    flat = torch.randn(spec.numel, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(spec.storage_shape, generator=generator)
    weight = weight.masked_fill(torch.rand(weight.shape, generator=generator) < 0.5, 0).to(DEVICE, dtype)
    at = [
        start * 70 + torch.randperm((stop - start) * 70, generator=generator)[:count].sort().values
        for start, stop in slices
    ]
    rows, cols = (torch.cat(at) // 70).int().to(DEVICE), (torch.cat(at) % 70).int().to(DEVICE)
    for form in ("masked", "update"):
        out = torch.full_like(weight, 9, dtype=out_dtype)
        merge_under_mask_(out, weight, flat, rows, cols, spec, base=form == "masked")
        delta = Delta.of(spec, flat, rows, cols)
        expected = merged_weight(weight, delta, pruned=True, form=form, out=torch.empty_like(out))
        bound = 2**-7 if torch.bfloat16 in (dtype, out_dtype) else 1e-5
        torch.testing.assert_close(out, expected, rtol=bound, atol=3e-5)  # float32 sums in another order
        assert not out[weight == 0].any() and out[weight != 0].any()
