"""Blocks that hand on more than their output: what earlier ones make would be the unpruned model's in a re-fit."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.algorithms.refit import Refit, sparsegpt
from dsee_scale.errors import TargetError
from dsee_scale.passes.blocks import capture
from dsee_scale.pruning.refit import block as block_module
from dsee_scale.pruning.refit import matrix, sweep
from tests.models import build, token_batch
from tests.unit.test_calibrate import batches, inputs_of, make

pytestmark = pytest.mark.unit
WORDS = r"layers\.\d reads what an earlier block made beside its output.*set refit=False"


def refused(model: nn.Module, batch: dict[str, Tensor]) -> None:
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(TargetError, match=WORDS):
        dsee_scale.prune(model, PruneConfig(sparsity=0.5), [batch])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="an older transformers")
def test_keys_and_values_that_later_blocks_share_are_refused():
    sizes = dict(vocab_size=97, vocab_size_per_layer_input=97, hidden_size=16, hidden_size_per_layer_input=8)
    sizes |= dict(intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1)
    sizes |= dict(head_dim=8, global_head_dim=8, sliding_window=4, max_position_embeddings=64, pad_token_id=0)
    sizes |= dict(layer_types=["sliding_attention", "full_attention"] * 2)
    batch = {"input_ids": token_batch()}
    sharing, apart = (
        build(transformers.Gemma4TextConfig(num_kv_shared_layers=number, **sizes)).requires_grad_(False)
        for number in (2, 0)
    )
    refused(sharing, batch)
    assert dsee_scale.prune(apart, PruneConfig(sparsity=0.5), [batch]).sparsity == pytest.approx(
        0.5, abs=1e-3
    )


class Block(nn.Module):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.lin, self.route, self.reads = nn.Linear(8, 8), nn.Linear(8, 8), reads

    def forward(self, x: Tensor, route: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.route(x)
        if self.reads and route is not None:
            found = found + route
        return x + self.lin(found) + bias, found, bias


class Chained(nn.Module):
    """Every block is handed the last one's route, and may read it; all hand the bias through."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(reads) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        route, bias = None, torch.ones(8)
        for block in self.layers:
            x, route, bias = block(x, route, bias)
        return x


def test_a_second_output_that_the_next_block_reads_is_refused_and_one_that_none_reads_is_not():
    batch = {"x": torch.randn(40, 8, generator=torch.Generator().manual_seed(0))}
    refused(Chained(reads=True).requires_grad_(False), batch)
    model = Chained(reads=False).requires_grad_(False)
    assert dsee_scale.prune(model, PruneConfig(sparsity=0.5), [batch]).sparsity == pytest.approx(0.5)


class Beside(nn.Module):
    """Its blocks are called with a buffer that holds something of the batch's, and that they may add to."""

    def __init__(self, adds: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"lin": nn.Linear(8, 8)}) for _ in range(2))
        self.adds = adds
        self.register_buffer("beside", torch.zeros(8), persistent=False)
        for block in self.layers:
            block.forward = functools.partial(self.run_block, block)  # type: ignore[method-assign]

    def run_block(self, block: nn.ModuleDict, x: Tensor, beside: Tensor) -> Tensor:
        if self.adds:
            beside.add_(1)
        return x + block["lin"](x * beside)

    def forward(self, x: Tensor) -> Tensor:
        self.beside.copy_(x.mean(0))
        for block in self.layers:
            x = block(x, self.beside)
        return x


def test_what_blocks_are_called_with_is_that_batchs_and_stays_as_it_is(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data = [{"x": torch.randn(40, 8, generator=generator)} for _ in range(3)]
    seen: dict[str, Tensor] = {}
    reduced = block_module._reduced

    def noted(*args: object) -> dict[str, Tensor]:
        found = reduced(*args)
        seen.update({name: gram.clone() for name, gram in found.items()})
        return found

    monkeypatch.setattr(block_module, "_reduced", noted)
    dsee_scale.prune(Beside(adds=False).requires_grad_(False), PruneConfig(scope="matrix"), data)
    rows = torch.cat([batch["x"] * batch["x"].mean(0) for batch in data])
    torch.testing.assert_close(seen["layers.0.lin"], rows.t() @ rows / len(rows))

    model = Beside(adds=True).requires_grad_(False)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(
        TargetError, match=r"layers\.0 changes in place what it is called with.*set refit=False"
    ):
        dsee_scale.prune(model, PruneConfig(scope="matrix"), data)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_later_block_is_solved_for_what_the_pruned_ones_before_it_give():
    model, data = make("everything"), batches(1)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[1].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    tuned = inputs_of(model, data)["model.layers.1.self_attn.q_proj"]
    seen.clear()
    dsee_scale.prune(model, PruneConfig(sparsity=0.4), data)
    hook.remove()
    last = seen[-1][
        data[0]["attention_mask"].bool()
    ].double()  # the last block runs last for its own statistics
    torch.testing.assert_close(last, inputs_of(model, data)["model.layers.1.self_attn.q_proj"])
    assert (last - tuned).norm() > 0.01 * tuned.norm()


class Tied(nn.Module):
    """Two layers with other inputs and one weight; or one layer under two names."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.second = self.first if twice else nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.first(x) if self.twice else self.second(self.first(x).tanh()))


class Stack(nn.Module):
    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Tied(twice) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


@pytest.mark.parametrize("modules", [(), ("first",), ("second",)])
def test_a_weight_that_two_layers_of_a_block_share_is_not_solved_for_one_of_them(modules):
    model = Stack(twice=False).requires_grad_(False)
    batch = {"x": torch.randn(40, 8, generator=torch.Generator().manual_seed(0))}
    before = model.layers[0].first.weight.clone()
    words = r"layers\.0\.second and layers\.0\.first share weight, .*refit=False.*Nothing was removed"
    with pytest.raises(TargetError, match=words):
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, modules=modules), [batch])
    assert torch.equal(model.layers[0].first.weight, before)
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.5, modules=modules, refit=False), [batch])
    assert report.sparsity == pytest.approx(0.5)


def test_one_layer_under_two_names_is_solved():
    model = Stack(twice=True).requires_grad_(False)
    batch = {"x": torch.randn(40, 8, generator=torch.Generator().manual_seed(0))}
    assert dsee_scale.prune(model, PruneConfig(sparsity=0.5), [batch]).sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [1e-18, 1e-19, 1e-20, 1e-22])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_hands_on_next_to_nothing_is_refitted(layer, scale):
    model = make("llama")
    values = model.model.layers[layer].self_attn.v_proj
    values.weight.data.mul_(scale)
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.5, scope="matrix"), batches(2))
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(param.isfinite().all() for param in model.parameters())


def test_a_matrix_that_cannot_be_solved_or_stored_is_named(monkeypatch):
    def far(*args: object, **settings: object) -> Refit:
        found = sparsegpt(*args, **settings)
        return Refit(found.weight * torch.inf, found.record)

    def fails(*_: object, **__: object) -> Refit:
        raise ValueError("the weight or its update holds NaN or infinity")

    for solver, words in ((far, "too large for torch.float32"), (fails, "its update holds NaN")):
        monkeypatch.setattr(matrix, "sparsegpt", solver)
        named = rf"^model\.layers\.0\.\w+\.\w+_proj cannot be re-fitted: .*{words}.*Nothing was removed"
        with pytest.raises(TargetError, match=named):
            dsee_scale.prune(make("llama"), PruneConfig(sparsity=0.5, scope="matrix"), batches(2))


class SeenError(Exception):
    pass


@pytest.mark.parametrize(("on_cpu", "place"), [(True, "cpu"), (False, "meta")])
def test_all_that_blocks_are_called_with_is_kept_where_the_setting_says(monkeypatch, on_cpu, place):
    """`meta` stands for the device that computes."""

    def watched(*args: object) -> None:
        kept: list[Tensor] = []
        for call in capture(*args):
            pytree.tree_map_only(Tensor, kept.append, (call.hidden, call.arguments))
        assert len(kept) > 4 and {tensor.device.type for tensor in kept} == {place}
        raise SeenError

    monkeypatch.setattr(sweep, "capture", watched)
    monkeypatch.setattr(sweep, "compute_device", lambda *_: torch.device("meta"))
    with pytest.raises(SeenError):
        dsee_scale.prune(make("llama"), PruneConfig(inputs_on_cpu=on_cpu), batches(2))
