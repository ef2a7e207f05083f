"""The adapted layer against the dense formula, and as a citizen of PyTorch."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from dsee_scale.adapters import linear
from dsee_scale.adapters import support as support_module
from dsee_scale.adapters.kernels import lowrank_sparse
from dsee_scale.adapters.linear import (
    adapted_layers,
    attach,
    delta_record,
    detach,
    is_adapted,
    train_under_mask,
)
from dsee_scale.algorithms.delta import AdapterSpec, delta_block, merged_weight
from dsee_scale.errors import TargetError
from tests.unit.test_sparse_residual import LargestTensor

OUT, IN = 12, 7
WHOLE, FUSED = ((0, OUT),), ((0, 4), (8, 12))


def base_layer(kind="linear", bias=True, dtype=torch.float64):
    torch.manual_seed(0)
    layer = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=bias)
    nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer.to(dtype).requires_grad_(False)


def support(slices, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    flat = [
        start * IN + torch.randperm((stop - start) * IN, generator=generator)[:count].sort().values
        for start, stop in slices
    ]
    flat = torch.cat(flat)
    return flat // IN, flat % IN


def adapt(
    layer, slices=WHOLE, count=5, rank=3, trained=True, dropout=0.0, adapter_dtype=None, positions=None
):
    rows, cols = positions or support(slices, count)
    dtype = adapter_dtype or layer.weight.dtype
    spec = AdapterSpec(
        shape=(OUT, IN),
        transposed=isinstance(layer, Conv1D),
        slices=slices,
        rank=rank,
        num_sparse=rows.numel() // len(slices),
        scaling=1.7,
        dropout=dropout,
    )
    generator = torch.Generator().manual_seed(3)
    attach(layer, spec, rows, cols, generator=generator, dtype=dtype, device="cpu")
    if trained:
        with torch.no_grad():
            for param in (layer.dsee_A, layer.dsee_B, layer.dsee_values):
                param.normal_()
    return layer


def dense_update(layer):
    """D, dense and differentiable, (O, I)."""
    rank, offset, blocks = layer.dsee_B.shape[1], 0, layer.dsee_flat.new_zeros(OUT, IN)
    for k, (start, stop) in enumerate(layer.dsee_spec.slices):
        b = layer.dsee_B[offset : offset + stop - start]
        product = b @ layer.dsee_A[k * rank : (k + 1) * rank]
        blocks = blocks + nn.functional.pad(product, (0, 0, start, OUT - stop))
        offset += stop - start
    at = (layer.dsee_rows.long(), layer.dsee_cols.long())
    blocks = blocks.index_put(at, layer.dsee_values, accumulate=True)
    return layer.dsee_spec.scaling * blocks


def weight_OI(layer):
    return layer.weight.t() if layer.dsee_spec.transposed else layer.weight


def dense_output(layer, x):
    """The formula with a dense, differentiable D."""
    return nn.functional.linear(x, weight_OI(layer) + dense_update(layer), layer.bias)


def gradients(output, layer, x):
    inputs = [layer.dsee_flat] + ([x] if x.requires_grad else [])
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return torch.autograd.grad((output * weights).sum(), inputs)


def inputs(*shape, dtype=torch.float64, requires_grad=True):
    x = torch.randn(*shape, IN, dtype=dtype, generator=torch.Generator().manual_seed(5))
    return x.requires_grad_(requires_grad)


@pytest.fixture(params=["gather", "bags", "folded", "beside the base"])
def method(request, monkeypatch):
    """The ways to compute a product: S2 by either sum, S2 within the factors, base and update apart."""
    chosen = request.param if request.param in ("gather", "bags") else "gather"
    monkeypatch.setattr(support_module, "choose_method", lambda *_: chosen)
    monkeypatch.setattr(lowrank_sparse, "folds", lambda *_: request.param == "folded")
    if request.param == "beside the base":
        monkeypatch.setattr(linear, "_computes_alike", lambda *_: False)
    return request.param


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("count", [0, 1, 5, 25])
@pytest.mark.parametrize("slices", [WHOLE, FUSED])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
def test_output_and_gradients_equal_the_dense_formula(kind, bias, slices, count, shape, method):
    layer = adapt(base_layer(kind, bias), slices, count)
    x = inputs(*shape)
    found, expected = layer(x), dense_output(layer, x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, layer, x), gradients(expected, layer, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("slices", [WHOLE, FUSED])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradcheck(kind, slices, method):
    layer = adapt(base_layer(kind), slices, 6)

    def run(x, flat):
        return torch.func.functional_call(layer, {"dsee_flat": flat}, (x,))

    flat = layer.dsee_flat.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, (inputs(2, 2), flat))


@pytest.mark.parametrize("line", ["row", "column"])
def test_entries_in_one_row_or_one_column(line, method):
    along = torch.arange(IN)
    positions = (torch.full((IN,), 2), along) if line == "row" else (along, torch.full((IN,), 2))
    layer, x = adapt(base_layer(), positions=positions), inputs(5)
    torch.testing.assert_close(layer(x), dense_output(layer, x))
    for ours, theirs in zip(
        gradients(layer(x), layer, x), gradients(dense_output(layer, x), layer, x), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_inputs_that_are_not_contiguous(method):
    layer = adapt(base_layer(), FUSED)
    for view in (
        inputs(6).detach()[::2],
        inputs(3, 2).detach().transpose(0, 1),
        inputs(1).detach().expand(4, IN),
    ):
        x = view.requires_grad_()
        assert not x.is_contiguous()
        found, expected = layer(x), dense_output(layer, x)
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(gradients(found, layer, x), gradients(expected, layer, x), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_record_holds_what_the_layer_adds_to_its_weight(kind):
    layer, x = adapt(base_layer(kind), FUSED), inputs(4)
    record = delta_record(layer, layer.dsee_flat)
    expected = layer(x)
    with torch.no_grad():
        layer.weight.add_(delta_block(record, 0, record.storage_shape[0]))
    detach(layer)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_attaching_changes_no_bit_and_no_name(kind, dtype):
    layer = base_layer(kind, dtype=dtype)
    x = inputs(2, 9, dtype=dtype)
    before, names, cls = layer(x), list(layer.state_dict()), type(layer)
    adapt(layer, FUSED, trained=False)
    assert torch.equal(layer(x).view(torch.uint8), before.view(torch.uint8))
    assert isinstance(layer, cls)
    assert [name for name in layer.state_dict() if "dsee" not in name] == names
    assert set(layer.state_dict()) - set(names) == {linear.PARAMETER, *linear.BUFFERS}
    assert layer.dsee_A.std() > 0
    assert not layer.dsee_B.any()
    assert not layer.dsee_values.any()


def test_detaching_restores_the_layer():
    layer, x = base_layer(), inputs(3)
    before, attributes, cls = layer(x), set(vars(layer)), type(layer)
    detach(adapt(layer))
    assert type(layer) is cls
    assert set(vars(layer)) == attributes
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(layer(x), before)
    with pytest.raises(TargetError, match="not adapted"):
        detach(layer)


def test_a_weight_that_is_not_here_can_be_adapted():
    layer = base_layer()
    layer.weight.data = torch.empty(0)
    adapt(layer)
    assert layer.dsee_A.shape == (3, IN)
    assert layer.dsee_B.shape == (OUT, 3)
    layer.dsee_flat.data = torch.empty(0)
    assert "rank=3, num_sparse=5" in repr(layer)


def test_copies_and_pickles_compute_the_same():
    layer, x = adapt(base_layer("conv1d"), FUSED), inputs(3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.dsee_values.add_(1)
        assert not torch.equal(twin(x), layer(x))
        detach(twin)
        assert is_adapted(layer)


def test_positions_stay_int32_when_the_module_changes_dtype(method):
    layer = adapt(base_layer(dtype=torch.float32)).bfloat16()
    assert layer.dsee_rows.dtype == layer.dsee_cols.dtype == torch.int32
    assert layer.dsee_A.dtype == torch.bfloat16
    x = inputs(4, dtype=torch.bfloat16)
    torch.testing.assert_close(layer(x), dense_output(layer, x), rtol=0.05, atol=0.15)


def test_a_loaded_state_brings_its_support(method):
    source, target = adapt(base_layer(), count=4), adapt(base_layer(), positions=support(WHOLE, 4, seed=9))
    assert not torch.equal(source.dsee_cols, target.dsee_cols)
    x = inputs(3)
    for assign in (False, True):
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(target(x), source(x))


def test_buffers_that_were_replaced_are_noticed(method):
    layer, x = adapt(base_layer(), count=4), inputs(3)
    rows, cols = support(WHOLE, 4, seed=9)
    layer.dsee_rows, layer.dsee_cols = rows.int(), cols.int()
    torch.testing.assert_close(layer(x), dense_output(layer, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant, method):
    layers = nn.Sequential(*(adapt(base_layer(kind), FUSED) for kind in ("linear", "conv1d")))
    layers.insert(1, nn.Linear(OUT, IN, dtype=torch.float64).requires_grad_(False))
    x = inputs(2, 3)
    params = [p for p in layers.parameters() if p.requires_grad] + [x]
    expected = torch.autograd.grad(layers(x).square().sum(), params)
    checkpoint(layers, x, use_reentrant=reentrant).square().sum().backward()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)


def test_gradients_accumulate():
    layer, x = adapt(base_layer()), inputs(6)
    layer(x).square().sum().backward()
    once = layer.dsee_flat.grad.clone()
    layer.zero_grad()
    for part in x.detach().split(2):
        layer(part).square().sum().backward()
    torch.testing.assert_close(layer.dsee_flat.grad, once)


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_its_dtype_and_keeps_the_gradients_dtypes(adapter_dtype, method):
    layer = adapt(base_layer(dtype=torch.float32), adapter_dtype=adapter_dtype)
    x = inputs(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.dsee_flat.grad.dtype == adapter_dtype
    torch.testing.assert_close(found.float(), dense_output(layer.float(), x), rtol=0.05, atol=0.2)


@pytest.mark.parametrize(("base", "adapter"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_the_adapter_may_have_another_dtype_than_the_base(base, adapter, method):
    layer = adapt(base_layer(dtype=getattr(torch, base)), adapter_dtype=getattr(torch, adapter))
    x = inputs(8, dtype=getattr(torch, base))
    found = layer(x)
    assert found.dtype == x.dtype
    found.float().square().sum().backward()
    assert x.grad.dtype == x.dtype
    torch.testing.assert_close(found.float(), dense_output(layer.float(), x.float()), rtol=0.05, atol=0.2)


def test_a_rank_without_tokens_gets_zero_gradients(method):
    layer = adapt(base_layer(), FUSED)
    x = inputs(0)
    found = layer(x)
    assert found.shape == (0, OUT)
    found.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.dsee_flat.grad.shape == layer.dsee_flat.shape
    assert not layer.dsee_flat.grad.any()


def test_only_the_gradients_that_are_asked_for_are_made(method):
    layer, x = adapt(base_layer()), inputs(4, requires_grad=False)
    layer(x).sum().backward()
    assert x.grad is None
    assert layer.dsee_flat.grad.any()
    layer.zero_grad()
    layer.dsee_flat.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert layer.dsee_flat.grad is None
    torch.testing.assert_close(x.grad, torch.autograd.grad(dense_output(layer, x).sum(), x)[0])
    x.requires_grad_(False)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), dense_output(layer, x))


def test_dropout_is_that_of_the_adapters_input_in_training_only():
    layer, x = adapt(base_layer(), dropout=0.5), inputs(6)
    torch.testing.assert_close(layer.eval()(x), dense_output(layer, x))
    torch.manual_seed(0)
    found = layer.train()(x)
    torch.manual_seed(0)
    dropped = nn.functional.dropout(x, 0.5)
    plain = nn.functional.linear(x, layer.weight)
    torch.testing.assert_close(
        found, plain + dense_output(layer, dropped) - nn.functional.linear(dropped, layer.weight)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_compiles_without_a_graph_break(kind, training, method):
    torch.compiler.reset()
    layer = adapt(base_layer(kind, dtype=torch.float32), FUSED, dropout=0.0).train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for shape in ((2, 3), (2, 5)):
        x = inputs(*shape, dtype=torch.float32)
        found, expected = compiled(x), layer(x)
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(gradients(found, layer, x), gradients(expected, layer, x), strict=True):
            torch.testing.assert_close(ours, theirs)


class Squashed(nn.Linear):
    """A base layer whose backward needs its output."""

    def forward(self, x):
        return torch.sigmoid(super().forward(x))


def test_an_output_that_backward_needs_is_left_alone():
    layer, x = base_layer(), inputs(4)
    layer.__class__ = Squashed
    expected = torch.autograd.grad(layer(x).sum(), x)[0]
    adapt(layer, trained=False)
    torch.testing.assert_close(torch.autograd.grad(layer(x).sum(), x)[0], expected)


def test_an_output_that_backward_needs_is_never_overwritten_silently(monkeypatch):
    monkeypatch.setattr(linear, "_keeps_no_output", lambda base: True)
    monkeypatch.setattr(linear, "_CLASSES", {})
    layer, x = base_layer(), inputs(4)
    layer.__class__ = Squashed
    adapt(layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer(x).sum().backward()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_output_may_be_changed_in_place_afterwards(kind):
    layer, x = adapt(base_layer(kind)), inputs(2, 2)
    expected = gradients(dense_output(layer, x) * 3, layer, x)
    for ours, theirs in zip(gradients(layer(x).mul_(3), layer, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_input_is_kept_once_and_nothing_as_large_as_the_weight_is_made(kind):
    tokens, size = 16, 96
    layer = (Conv1D(size, size) if kind == "conv1d" else nn.Linear(size, size)).requires_grad_(False)
    rows, cols = torch.arange(size), torch.arange(size).flip(0)
    spec = AdapterSpec(
        shape=(size, size),
        transposed=kind == "conv1d",
        slices=((0, size),),
        rank=4,
        num_sparse=size,
        scaling=1.0,
    )
    attach(layer, spec, rows, cols, dtype=torch.float32, device="cpu")
    x = torch.randn(2, tokens // 2, size, requires_grad=True)
    saved = []

    def pack(tensor):
        saved.append((tensor.untyped_storage().data_ptr(), tensor.numel()))
        return tensor

    known = (layer.weight, x)
    with LargestTensor(*known) as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x).sum().backward()
    assert [numel for _, numel in saved].count(x.numel()) == 1
    assert largest.numel <= tokens * size < size * size


def test_wrong_requests_are_refused_by_name():
    layer = adapt(base_layer())
    with pytest.raises(TargetError, match="already adapted"):
        adapt(layer)
    bad = functools.partial(adapt, base_layer())
    with pytest.raises(TargetError, match="ascending"):
        bad(slices=((4, 8), (0, 4)), positions=(torch.tensor([0, 4]), torch.tensor([0, 0])))
    with pytest.raises(TargetError, match="ascending"):
        bad(slices=((0, OUT + 1),), positions=(torch.tensor([0]), torch.tensor([0])))
    with pytest.raises(TargetError, match="outside"):
        bad(slices=FUSED, positions=(torch.tensor([0, 5]), torch.tensor([0, 0])))
    for rows, cols in (([1, 0], [0, 0]), ([1, 1], [2, 2]), ([0], [IN])):
        with pytest.raises(TargetError, match="sorted"):
            bad(positions=(torch.tensor(rows), torch.tensor(cols)))
    with pytest.raises(TargetError, match="expected 4 of both: 2 for each of 2 slices"):
        bad(slices=FUSED, positions=(torch.arange(5), torch.arange(5)))
    hidden = base_layer()
    hidden.forward = hidden.forward
    with pytest.raises(TargetError, match="replaced on the instance"):
        adapt(hidden)


def test_adapted_layers_are_found_by_name():
    model = nn.Sequential(base_layer(), nn.ReLU(), adapt(base_layer("conv1d")))
    assert list(adapted_layers(model)) == ["2"]


def masked(kind="linear", slices=WHOLE, count=5, dtype=torch.float64, bias=True, **settings):
    """An adapted layer whose weight lost about half of its entries, trained under the mask."""
    layer = adapt(base_layer(kind, bias, dtype), slices, count, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        layer.weight[torch.rand(layer.weight.shape, generator=generator) < 0.5] = 0
    train_under_mask(layer, True)
    return layer


def masked_output(layer, x, dropped=None):
    """x ((W + D) * M)^T + bias, or x W^T + dropped (D * M)^T + bias, dense and differentiable."""
    mask = weight_OI(layer) != 0
    update = dense_update(layer) * mask
    if dropped is None:
        return nn.functional.linear(x, weight_OI(layer) + update, layer.bias)
    return nn.functional.linear(x, weight_OI(layer), layer.bias) + nn.functional.linear(dropped, update)


@pytest.mark.parametrize("count", [0, 5, 25])
@pytest.mark.parametrize("slices", [WHOLE, FUSED])
@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv1d", True)])
def test_under_the_mask_output_and_gradients_equal_the_dense_formula(kind, bias, slices, count):
    layer = masked(kind, slices, count, bias=bias)
    assert torch.equal(layer.dsee_flat, adapt(base_layer(kind, bias), slices, count).dsee_flat)
    for shape in ((4,), (2, 3), (0,)):
        x = inputs(*shape)
        found, expected = layer(x), masked_output(layer, x)
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(gradients(found, layer, x), gradients(expected, layer, x), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(layer(inputs(4)), dense_output(layer, inputs(4)))


@pytest.mark.parametrize("slices", [WHOLE, FUSED])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_gradcheck_under_the_mask(kind, slices):
    layer = masked(kind, slices, 6)
    layer.bias.requires_grad_()

    def run(x, flat, bias):
        return torch.func.functional_call(layer, {"dsee_flat": flat, "bias": bias}, (x,))

    flat, bias = (t.detach().clone().requires_grad_() for t in (layer.dsee_flat, layer.bias))
    assert torch.autograd.gradcheck(run, (inputs(2, 2), flat, bias))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_dropout_under_the_mask_is_that_of_the_updates_input(kind):
    layer, x = masked(kind, FUSED, dropout=0.5), inputs(6)
    torch.testing.assert_close(layer.eval()(x), masked_output(layer, x))
    layer.train()
    torch.manual_seed(0)
    found = layer(x)
    torch.manual_seed(0)
    expected = masked_output(layer, x, nn.functional.dropout(x, 0.5))
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(gradients(found, layer, x), gradients(expected, layer, x), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_under_the_mask_gives_the_same_gradients(reentrant):
    layers = nn.Sequential(masked("linear", FUSED), nn.Linear(OUT, IN).double(), masked("conv1d", FUSED))
    layers[1].requires_grad_(False)
    x = inputs(2, 3)
    params = [p for p in layers.parameters() if p.requires_grad] + [x]
    expected = torch.autograd.grad(layers(x).square().sum(), params)
    checkpoint(layers, x, use_reentrant=reentrant).square().sum().backward()
    for param, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_under_the_mask_the_layer_has_the_bits_of_its_masked_export(kind, dtype):
    layer, x = masked(kind, FUSED, dtype=dtype), inputs(4, dtype=dtype)
    record = delta_record(layer, layer.dsee_flat)
    exported = merged_weight(layer.weight.detach(), record, pruned=True, form="masked")
    exported = exported.t() if kind == "conv1d" else exported
    assert torch.equal(layer(x), nn.functional.linear(x, exported, layer.bias))
    layer(x).float().square().sum().backward()
    assert layer.dsee_flat.grad.dtype == dtype


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_autocast_under_the_mask(adapter_dtype):
    layer = masked(dtype=torch.float32, adapter_dtype=adapter_dtype)
    x = inputs(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.dsee_flat.grad.dtype == adapter_dtype
    torch.testing.assert_close(found.float(), masked_output(layer.float(), x), rtol=0.05, atol=0.2)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_under_the_mask_only_the_input_and_the_parameters_are_kept(kind):
    layer, x = masked(kind), inputs(5)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    own = {t.untyped_storage().data_ptr() for t in (x, layer.weight, layer.dsee_flat)}
    assert {t.untyped_storage().data_ptr() for t in kept} == own


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_it_compiles_under_the_mask(kind):
    torch.compiler.reset()
    layer = masked(kind, FUSED, dtype=torch.float32)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for shape in ((2, 3), (2, 5)):
        x = inputs(*shape, dtype=torch.float32)
        found, expected = compiled(x), layer(x)
        torch.testing.assert_close(found, expected)
        for ours, theirs in zip(gradients(found, layer, x), gradients(expected, layer, x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_weight_that_is_trained_too_is_no_mask():
    layer = adapt(base_layer())
    layer.weight.requires_grad_()
    with pytest.raises(TargetError, match="mask_update=False"):
        train_under_mask(layer, True)
