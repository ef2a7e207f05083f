"""Activation-aware pruning and re-fitting in one process, against the formulas themselves."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig, Statistics
from dsee_scale.adapters.linear import adapted_layers, is_adapted
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.targets import linear_kind
from dsee_scale.adapters.units import find_units
from dsee_scale.errors import CalibrationError, ConfigError, FormatError, PartitionError, TargetError
from dsee_scale.passes.pools import block_linears
from dsee_scale.pruning.refit import matrix, sweep
from tests.models import build, gpt2_config, llama_config, token_batch
from tests.unit.test_prune import dense_delta

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAMILIES = {
    "llama": (llama_config, DSEEConfig(rank=3, num_sparse=7, target_modules=("q_proj", "down_proj"))),
    "gpt2": (
        gpt2_config,
        DSEEConfig(rank=3, num_sparse=7, target_modules=("c_attn",), output_slices={"c_attn": ("q", "v")}),
    ),
    "everything": (llama_config, DSEEConfig(rank=3, num_sparse=7, target_modules=ALL)),
}


def batches(count: int = 4, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Right-padded ones, each to another length."""
    found = []
    for index in range(count):
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[1, length - 1 - index :] = 0
        found.append({"input_ids": token_batch(seed=index, length=length), "attention_mask": mask})
    return found


def make(family: str, dtype: torch.dtype = torch.float32, trained: bool = True) -> nn.Module:
    config, dsee = FAMILIES[family]
    model = build(config(), dtype)
    dsee_scale.inject(model, dsee)
    for index, layer in enumerate(adapted_layers(model).values() if trained else ()):
        generator = torch.Generator().manual_seed(index)
        for param in (layer.dsee_B, layer.dsee_values):
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.05)
    return model


def effective(layer: nn.Module) -> torch.Tensor:
    """W + D, outputs x inputs, by the formula."""
    transposed = linear_kind(layer) == "conv1d"
    weight = (layer.weight.t() if transposed else layer.weight).detach().double()
    if not is_adapted(layer):
        return weight
    if len(layer.dsee_spec.slices) == 1:
        return weight + dense_delta(layer)[1].double()
    rank = layer.dsee_spec.rank
    for k, (start, stop) in enumerate(layer.dsee_spec.slices):
        at = sum(b - a for a, b in layer.dsee_spec.slices[:k])
        b_OR = layer.dsee_B[at : at + stop - start].detach().double()
        weight[start:stop] += (
            layer.dsee_spec.scaling * b_OR @ layer.dsee_A[k * rank : (k + 1) * rank].detach().double()
        )
    at = (layer.dsee_rows.long(), layer.dsee_cols.long())
    return weight.index_put(
        at, layer.dsee_spec.scaling * layer.dsee_values.detach().double(), accumulate=True
    )


def inputs_of(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Every layer's inputs at tokens that count, stacked, caught one layer at a time."""
    found: dict[str, list[torch.Tensor]] = {}
    mask: list[torch.Tensor] = []
    layers = block_linears(model)
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: found.setdefault(name, []).append(args[0][mask[-1]])
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in data:
            mask.append(batch["attention_mask"].bool())
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_statistics_are_the_inputs_squares_without_padding(family):
    model, data = make(family), batches()
    expected = inputs_of(model, data)
    model.train()
    found = dsee_scale.calibrate(model, data)
    assert model.training and found.squares.keys() == expected.keys()
    for name, x_TI in expected.items():
        assert found.tokens[name] == len(x_TI) == 2 * 4 * 12 - (1 + 2 + 3 + 4)
        torch.testing.assert_close(found.squares[name].double(), x_TI.square().sum(0), rtol=1e-5, atol=1e-7)


def exact_sums(model: nn.Module, data: list[dict[str, torch.Tensor]]) -> dict[str, tuple[torch.Tensor, int]]:
    """Each layer's squares and tokens over all its calls; of calls that the mask fits, what it keeps."""
    found: dict[str, tuple[torch.Tensor, int]] = {}
    masks: list[torch.Tensor] = []

    def add(name: str, x: torch.Tensor) -> None:
        mask = masks[-1]
        flat = x[mask] if x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])
        squares, tokens = found.get(name, (torch.zeros(x.shape[-1], dtype=torch.float64), 0))
        found[name] = (squares + flat.double().square().sum(0), tokens + len(flat))

    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0].clone()))
        for name, layer in block_linears(model).items()
    ]
    with torch.no_grad():
        for batch in data:
            masks.append(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool())
            model.eval()(**batch)
    for handle in handles:
        handle.remove()
    return found


def deberta(version: int) -> nn.Module:
    """Its layers also read embeddings of relative positions: the second's query and key, layers of the first's own."""
    sizes: dict[str, Any] = dict(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    sizes |= dict(max_position_embeddings=64, relative_attention=True, pos_att_type=["p2c", "c2p"])
    sizes |= dict(max_relative_positions=-1, type_vocab_size=0, position_biased_input=False)
    torch.manual_seed(0)
    if version == 1:
        return DebertaForSequenceClassification(DebertaConfig(**sizes)).requires_grad_(False)
    sizes |= dict(position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True)
    return DebertaV2ForSequenceClassification(DebertaV2Config(**sizes)).requires_grad_(False)


class ReadsTwice(nn.Module):
    """A block whose layers share an input in one of b's calls; a reads it before it changes in place, if it does."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.a, self.b, self.in_place = nn.Linear(16, 16), nn.Linear(16, 16), in_place

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.clone()
        if self.in_place:
            return hidden_states + self.a(x) + self.b(x.mul_(3))
        return x + self.b(torch.tanh(self.a(x) + self.b(x)))


class Embedded(nn.Module):
    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.emb, self.layers = nn.Embedding(97, 16), nn.ModuleList(block() for _ in range(2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.emb(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class CallsAll(nn.Module):
    """Experts as a list, all of them called, with no token where none is routed there; outputs as wide as inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 3, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 16), "down": nn.Linear(16, 16)}) for _ in range(3)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states.reshape(-1, 16)
        chosen, found = self.gate(x).argmax(-1).clamp(max=1), x.clone()  # none goes to the last one
        for index, expert in enumerate(self.experts):
            at = (chosen == index).nonzero().flatten()
            found = found.index_add(0, at, expert["down"](expert["up"](x[at])))
        return found.view_as(hidden_states)


def embedded(block: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return Embedded(block).requires_grad_(False)


def few_tokens() -> list[dict[str, torch.Tensor]]:
    """So few that experts see none of some batches, the last among them."""
    return [{"input_ids": token_batch(batch=1, length=2 - seed // 12, seed=seed)} for seed in range(13)]


SHARING: dict[str, Callable[[], nn.Module]] = {
    "deberta 1": lambda: deberta(1),
    "deberta 2": lambda: deberta(2),
    "twice": lambda: embedded(lambda: ReadsTwice(False)),
    "in place": lambda: embedded(lambda: ReadsTwice(True)),
    "empty": lambda: embedded(CallsAll),
}


@pytest.mark.parametrize("case", list(SHARING))
def test_layers_that_share_some_inputs_alone_have_sums_of_their_own(case):
    model, data = SHARING[case](), batches()
    if case in ("twice", "in place", "empty"):
        data = few_tokens()
    found, expected = dsee_scale.calibrate(model, data), exact_sums(model, data)
    for name in block_linears(model):
        squares, tokens = expected[name]
        assert found.tokens[name] == tokens, name
        torch.testing.assert_close(found.squares[name].double(), squares, rtol=1e-5, atol=1e-7)


def test_one_padded_row_beside_positions_that_outnumber_it():
    """DeBERTa's own projections of positions read twice as many vectors as a row has tokens."""
    model, batch = deberta(1), batches()[3]
    data = [{name: each[1:] for name, each in batch.items()}]
    found, expected = dsee_scale.calibrate(model, data), exact_sums(model, data)
    assert {tokens for _, tokens in expected.values()} == {8, 24}
    assert found.tokens == {name: tokens for name, (_, tokens) in expected.items()}


def test_layers_that_share_every_input_share_one_record():
    found = dsee_scale.calibrate(make("llama"), batches())
    layer = "model.layers.1."
    for group in (
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
    ):
        assert len({id(found.squares[layer + name]) for name in group}) == 1
    assert len({id(value) for value in found.squares.values()}) == 2 * 4
    found = dsee_scale.calibrate(deberta(2), batches())
    query, key, value = (
        found.squares[f"deberta.encoder.layer.0.attention.self.{name}_proj"]
        for name in ("query", "key", "value")
    )
    assert query is key and query is not value
    with torch.inference_mode():  # tensors that tell of no change
        alike = dsee_scale.calibrate(make("llama"), batches()).squares
    for name, value in dsee_scale.calibrate(make("llama"), batches()).squares.items():
        assert torch.equal(alike[name], value)


@pytest.mark.parametrize("case", ["deberta 2", "twice", "in place", "empty"])
def test_a_matrix_is_refitted_for_its_own_inputs_whatever_else_is_pruned(case):
    """Alone it shares with nobody."""
    names = {"deberta 2": "value_proj", "twice": "b", "in place": "b", "empty": "layers.0.experts.1.up"}
    data = few_tokens() if case == "empty" else [{"input_ids": token_batch(seed=seed)} for seed in range(6)]
    weights = []
    for modules in ((names[case],), ()):
        model = SHARING[case]()
        dsee_scale.prune(model, PruneConfig(modules=modules, scope="matrix"), data)
        first = next(n for n in block_linears(model) if n.endswith("." + names[case]) or n == names[case])
        weights.append(model.get_submodule(first).weight)
    assert torch.equal(*weights)


class Beside(nn.Module):
    """A block whose last layer reads what it returns, as the next block's first one does."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = self.a(hidden_states)
        self.b(x)
        return x


def test_layers_of_two_blocks_are_solved_for_inputs_of_their_own():
    model = embedded(Beside)
    report = dsee_scale.prune(model, PruneConfig(scope="matrix"), [{"input_ids": token_batch()}])
    assert not report.by_magnitude


@pytest.mark.parametrize("family", list(FAMILIES))
def test_wanda_removes_the_same_share_of_each_row_by_weight_times_input(family):
    model, data = make(family), batches()
    norms = {name: x_TI.square().mean(0).sqrt() for name, x_TI in inputs_of(model, data).items()}
    scores = {name: effective(layer).abs() * norms[name] for name, layer in block_linears(model).items()}
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.4, refit=False), data)
    for name, layer in block_linears(model).items():
        weight = layer.weight.t() if linear_kind(layer) == "conv1d" else layer.weight
        gone, k = weight == 0, round(0.4 * weight.shape[1])
        assert (gone.sum(1) == k).all(), name
        lowest = torch.zeros_like(gone).scatter_(1, scores[name].argsort(dim=1)[:, :k], True)
        assert (gone != lowest).sum() <= 2, name  # rounding may swap two entries of one score
        assert report.matrices[name] == (k * len(weight), weight.numel())


@pytest.mark.parametrize("settings", [dict(pattern="2:4"), dict(scope="global"), dict(scope="matrix")])
def test_wanda_goes_with_every_pattern_and_scope(settings):
    model = make("everything")
    model = build(llama_config(intermediate_size=52))
    dsee_scale.inject(model, FAMILIES["everything"][1])
    report = dsee_scale.prune(model, PruneConfig(**settings, refit=False), batches())
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_units_that_add_least_to_the_blocks_output_go(family, kind):
    config, dsee = FAMILIES[family]
    sizes = dict(num_key_value_heads=5) if family == "llama" else {}
    model, data = build(config(**sizes)), batches()
    dsee_scale.inject(model, dsee)
    xs = inputs_of(model, data)
    expected = {}
    for layer in find_units(model, kind, lambda p: p.shape):
        (part,) = [part for part in layer.parts if part.side == "inputs"]
        adds = effective(part.module).square().sum(0) * xs[part.name].square().mean(0)
        scores = torch.zeros(layer.num_units, dtype=torch.float64).index_add_(0, part.unit_of, adds)
        expected[part.name] = (scores.argsort()[: round(layer.num_units / 2)], part)
    dsee_scale.prune(model, PruneConfig(pattern=kind, scope="matrix"), data)
    for name, (gone, part) in expected.items():
        columns = effective(part.module).abs().sum(0)
        zero = (
            torch.zeros(int(part.unit_of.max()) + 1, dtype=torch.float64).index_add_(0, part.unit_of, columns)
            == 0
        )
        assert set(zero.nonzero().flatten().tolist()) == set(gone.tolist()), name


def test_ties_within_a_row_go_in_order():
    model = make("llama", trained=False)
    for layer in block_linears(model).values():
        layer.weight.data.fill_(0.25)
    statistics = dsee_scale.calibrate(model, batches())
    flat = dataclasses.replace(
        statistics, squares={n: torch.ones_like(s) for n, s in statistics.squares.items()}
    )
    dsee_scale.prune(model, PruneConfig(sparsity=0.3, refit=False), flat)
    for layer in block_linears(model).values():
        k = round(0.3 * layer.weight.shape[1])
        assert (layer.weight[:, :k] == 0).all() and (layer.weight[:, k:] == 0.25).all()


def relative_change(
    model: nn.Module, before: dict[str, torch.Tensor], data: list[dict[str, torch.Tensor]]
) -> float:
    """How far the last hidden states moved."""
    with torch.no_grad():
        after = torch.cat([model.eval()(**b).logits[b["attention_mask"].bool()] for b in data])
    return float((after - before["logits"]).norm() / before["logits"].norm())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_refitting_moves_the_logits_less_than_wanda_alone(family, pattern):
    data = batches(16, length=20)
    changes = {}
    for refitted in (False, True):
        model = make(family) if pattern == "unstructured" else _divisible(family)
        with torch.no_grad():
            logits = torch.cat([model.eval()(**b).logits[b["attention_mask"].bool()] for b in data])
        scope = "matrix" if pattern == "unstructured" else None
        report = dsee_scale.prune(model, PruneConfig(pattern=pattern, scope=scope, refit=refitted), data)
        assert report.sparsity == pytest.approx(0.5, abs=0.01)
        if refitted:
            _check_refitted(model, pattern)
            changes[refitted] = relative_change(model, {"logits": logits}, data)
        else:
            changes[refitted] = relative_change(model, {"logits": logits}, data)
    assert changes[True] < 0.9 * changes[False], changes


def _divisible(family: str) -> nn.Module:
    config, dsee = FAMILIES[family]
    model = build(config(intermediate_size=52) if family != "gpt2" else config())
    dsee_scale.inject(model, dsee)
    return model


def _check_refitted(model: nn.Module, pattern: str) -> None:
    for name, layer in block_linears(model).items():
        weight = layer.weight.t() if linear_kind(layer) == "conv1d" else layer.weight
        gone = weight == 0
        if pattern == "2:4":
            assert (gone.view(len(weight), -1, 4).sum(-1) == 2).all(), name
        else:
            assert gone.sum() == round(0.5 * weight.numel()), name
        if is_adapted(layer):
            assert not layer.dsee_values.any() and layer.dsee_under_mask
            assert (weight[layer.dsee_rows.long(), layer.dsee_cols.long()] != 0).all(), name


def test_the_effective_weight_is_the_same_whether_the_update_goes_on_or_starts_again():
    """With the mask BA stays and the weight makes room for it; without, BA would bring back what is gone."""
    kept, again, data = make("everything"), make("everything"), batches()
    for model, under_mask in ((kept, True), (again, False)):
        dsee_scale.prune(model, PruneConfig(mask_update=under_mask), data)
    for one, two in zip(adapted_layers(kept).values(), adapted_layers(again).values(), strict=True):
        assert one.dsee_B.any() and not two.dsee_B.any() and not two.dsee_values.any() and two.dsee_A.any()
        mask = two.weight != 0
        assert torch.equal(one.weight != 0, mask)
        weight = two.weight.t() if linear_kind(two) == "conv1d" else two.weight
        mask = mask.t() if linear_kind(two) == "conv1d" else mask
        torch.testing.assert_close((effective(one) * mask).float(), weight, atol=1e-4, rtol=1e-3)
    for batch in data:
        torch.testing.assert_close(kept(**batch).logits, again(**batch).logits, atol=1e-3, rtol=1e-3)


def test_a_second_refit_keeps_the_zeros_of_the_first():
    model, data = make("everything"), batches()
    dsee_scale.prune(model, PruneConfig(sparsity=0.3, scope="matrix"), data)
    first = {name: layer.weight == 0 for name, layer in block_linears(model).items()}
    for index, layer in enumerate(adapted_layers(model).values()):  # D is not zero where the weight is
        layer.dsee_B.data.copy_(
            torch.randn(layer.dsee_B.shape, generator=torch.Generator().manual_seed(index)) * 0.1
        )
    dsee_scale.prune(model, PruneConfig(sparsity=0.6, scope="matrix"), data)
    for name, layer in block_linears(model).items():
        assert (layer.weight[first[name]] == 0).all()
        assert (layer.weight == 0).sum() == round(0.6 * layer.weight.numel())


def test_small_bounds_for_gram_matrices_change_nothing():
    one, two = make("everything"), make("everything")
    dsee_scale.prune(one, PruneConfig(), batches())
    config = PruneConfig(gram_memory_mib=1)
    object.__setattr__(config, "gram_memory_mib", 0)  # below any matrix: one input at a time
    dsee_scale.prune(two, config, batches())
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_saved_statistics_give_the_same_masks_and_no_other_model_takes_them(tmp_path):
    one, two = make("llama"), make("llama")
    found = dsee_scale.calibrate(one, batches())
    found.save(tmp_path / "statistics.safetensors")
    config = PruneConfig(refit=False)
    dsee_scale.prune(one, config, batches())
    dsee_scale.prune(two, config, Statistics.load(tmp_path / "statistics.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    for stale in (one, make("llama", trained=False)):  # other zeros, other adapter values
        before = [param.clone() for param in stale.parameters()]
        with pytest.raises(CalibrationError, match=r"another state.*calibrate again"):
            dsee_scale.prune(stale, config, found)
        assert all(torch.equal(a, b) for a, b in zip(before, stale.parameters(), strict=True))
    (tmp_path / "statistics.safetensors").write_bytes(b"damaged")
    with pytest.raises(FormatError, match="no calibration statistics"):
        Statistics.load(tmp_path / "statistics.safetensors")


def test_statistics_are_written_whole_or_not_at_all(tmp_path):
    found = Statistics({"layer": torch.ones(4)}, {"layer": 1}, "")
    found.save(tmp_path / "new" / "folder" / "statistics.safetensors")
    assert Statistics.load(tmp_path / "new" / "folder" / "statistics.safetensors").tokens == {"layer": 1}
    with pytest.raises(FormatError, match=r"cannot be written to .*new"):
        found.save(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def padding_only() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": token_batch(), "attention_mask": torch.zeros(2, 12, dtype=torch.int64)}]


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, r"pass calibration=batches.*score='W'.*Nothing was removed"),
        ([], "have no calibration batch"),
        (padding_only(), "no token of the calibration batches counts"),
    ],
)
def test_bad_calibration_is_refused_and_nothing_is_removed(refit, data, words):
    model = make("llama")
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(CalibrationError, match=words):
        dsee_scale.prune(model, PruneConfig(refit=refit), data)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("case", "config"),
    [
        ("empty", PruneConfig(refit=False)),  # experts, which see padding
        ("deberta 1", PruneConfig(refit=False)),  # positions, which are no padding
        ("deberta 2", PruneConfig(refit=False, modules=("query_proj", "classifier"))),
        ("deberta 1", PruneConfig()),
    ],
)
def test_padding_alone_is_refused_whatever_else_layers_see(case, config):
    model, refused = (
        SHARING[case](),
        pytest.raises(CalibrationError, match="no token of the calibration batches"),
    )
    before = [param.clone() for param in model.parameters()]
    with refused:
        dsee_scale.prune(model, config, padding_only())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    with pytest.raises(CalibrationError, match="no token of the calibration batches counts"):
        dsee_scale.calibrate(model, padding_only(), modules=config.modules)


@pytest.mark.parametrize("refit", [False, True])
def test_a_refused_pruning_is_not_counted(refit):
    model = make("llama")
    for data, counted in ((["no batch"], 0), (batches(), 1)):
        with pytest.raises(CalibrationError) if not counted else contextlib.nullcontext():
            dsee_scale.prune(model, PruneConfig(refit=refit), data)
        assert model_state(model).prunings == counted


@pytest.mark.parametrize("refit", [False, True])
def test_activations_that_are_not_finite_are_named(refit):
    model = make("llama")
    model.model.embed_tokens.weight.data[:, 3] = float("inf")
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(CalibrationError, match="NaN or infinity"):
        dsee_scale.prune(model, PruneConfig(refit=refit), batches())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_refit_that_stops_half_way_says_where_and_the_model_refuses_to_go_on(monkeypatch):
    model, solve, calls = make("llama"), matrix.sparsegpt, []

    def failing(*args, **more):
        calls.append(args)
        if len(calls) == 9:  # in the second of two blocks
            raise MemoryError("no memory is left")
        return solve(*args, **more)

    monkeypatch.setattr(matrix, "sparsegpt", failing)
    with pytest.raises(
        PartitionError, match=r"layers\.0 to model\.layers\.0 are pruned.*no memory is left.*Load"
    ) as caught:
        dsee_scale.prune(model, PruneConfig(), batches())
    for use in (
        lambda: model(token_batch()),
        lambda: dsee_scale.prune(model, PruneConfig(score="W")),
        lambda: dsee_scale.save_adapter(model, "unused"),
        lambda: dsee_scale.export_model(model, "unused"),
    ):
        with pytest.raises(PartitionError) as again:
            use()
        assert str(again.value) == str(caught.value)


def test_a_gpt2_given_token_ids_alone_is_refitted_as_with_a_mapping():
    """GPT-2 hands its cache to the blocks by position; a block must not run on what the captured pass left in it."""
    data = [batch["input_ids"] for batch in batches(6, length=20)]
    one, two, config = make("gpt2"), make("gpt2"), PruneConfig(scope="matrix")
    one.config.use_cache = two.config.use_cache = True
    dsee_scale.prune(one, config, data)
    dsee_scale.prune(two, config, [{"input_ids": ids} for ids in data])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    three = make("gpt2")
    three.config.use_cache = True
    dsee_scale.prune(three, config, [(ids,) for ids in data])
    assert all(torch.equal(a, b) for a, b in zip(two.parameters(), three.parameters(), strict=True))


class InPlace(nn.Module):
    """A block that adds to its input in place, or does not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.lin, self.out, self.in_place = nn.Linear(8, 12), nn.Linear(12, 8), in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.out(torch.relu(self.lin(x)))
        if not self.in_place:
            return x + y
        x += y
        return x


class Toy(nn.Module):
    def __init__(self, in_place: bool, order: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlace(in_place) for _ in range(3))
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        for index in self.order:
            x = self.blocks[index](x)
        return x


def toy(**settings) -> nn.Module:
    torch.manual_seed(0)
    return Toy(**settings).requires_grad_(False)


def test_blocks_that_add_in_place_are_refitted_like_others():
    data = [torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    one, two = toy(in_place=False), toy(in_place=True)
    for model in (one, two):
        dsee_scale.prune(model, PruneConfig(gram_memory_mib=1), data)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("order", [(0, 0, 1, 2), (0, 1), (1, 0, 2)])
def test_blocks_that_are_used_otherwise_than_once_in_turn_are_refused(order):
    model = toy(in_place=False, order=order)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(TargetError, match="does not simply continue from the block before it"):
        dsee_scale.prune(model, PruneConfig(), [torch.randn(4, 8)])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Adding(Toy):
    """As vision models whose features join again after the first blocks, in batches that have some."""

    def forward(self, x: torch.Tensor, feature: torch.Tensor | None = None) -> torch.Tensor:
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == 0 and feature is not None:
                x = x + feature
        return x


def test_every_batch_is_asked_whether_blocks_follow_each_other():
    model = Adding(in_place=False).requires_grad_(False)
    before = [param.clone() for param in model.parameters()]
    data = [{"x": torch.randn(4, 8)}, {"x": torch.randn(4, 8), "feature": torch.ones(8)}]
    with pytest.raises(TargetError, match=r"blocks.1 does not simply continue from the block before it"):
        dsee_scale.prune(model, PruneConfig(), data)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("lone", ["mapping", "tensor"])
def test_one_batch_in_place_of_a_list_is_named(lone):
    batch = batches()[0]
    with pytest.raises(CalibrationError, match=r"calibration is one batch.*\[batch\]"):
        dsee_scale.prune(make("llama"), PruneConfig(), batch if lone == "mapping" else batch["input_ids"])


@pytest.mark.parametrize(
    ("later", "data", "words"),
    [
        (PruneConfig(modules=("q_proj", "lm_head")), None, "lm_head lies outside"),
        (PruneConfig(refit=False), "empty", "have no calibration batch"),
        (PruneConfig(), "padding", "no token"),
    ],
)
def test_what_a_later_pruning_cannot_do_is_refused_before_the_first(later, data, words):
    model = build(llama_config(tie_word_embeddings=False, num_key_value_heads=5))
    before = [param.clone() for param in model.parameters()]
    given = {"empty": [], "padding": padding_only()}.get(data, batches())
    with pytest.raises((CalibrationError, TargetError), match=words):
        dsee_scale.prune(model, [PruneConfig(pattern="heads", num_per_layer=1, score="W"), later], given)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("place", ["write_back", "advance"])
def test_a_refit_that_fails_while_it_writes_marks_the_model(monkeypatch, place):
    model = make("llama")

    def failing(*_):
        raise MemoryError("no memory is left")

    monkeypatch.setattr(sweep, place, failing)
    words = {"write_back": "layers.0 may be", "advance": "layers.0 to model.layers.0 are"}[place]
    with pytest.raises(PartitionError, match=f"stopped half way: model.{words} pruned and re-fitted, later"):
        dsee_scale.prune(model, PruneConfig(), batches())
    with pytest.raises(PartitionError, match="stopped half way"):
        model(token_batch())


def test_a_block_that_is_being_written_is_told_from_those_that_are_done(monkeypatch):
    model, write, calls = make("llama"), sweep.write_back, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no memory is left")
        return write(*args)

    monkeypatch.setattr(sweep, "write_back", failing)
    words = r"layers\.0 to model\.layers\.0 are pruned and re-fitted, model\.layers\.1 may be, later blocks are not"
    with pytest.raises(PartitionError, match=words):
        dsee_scale.prune(model, PruneConfig(), batches())


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="an older torch")
def test_a_cpu_multiplies_in_float32_while_it_solves_and_as_before_after(monkeypatch):
    """Where bfloat16 is allowed within float32 products, which CPUs with AMX then use."""
    cpu, seen, solve = torch.backends.mkldnn.matmul, [], sweep.solve_pieces

    def solving(*given):
        seen.append(cpu.fp32_precision)
        return solve(*given)

    monkeypatch.setattr(sweep, "solve_pieces", solving)
    gpu = torch.backends.cuda.matmul
    before, precisions = torch.get_float32_matmul_precision(), (cpu.fp32_precision, gpu.fp32_precision)
    torch.set_float32_matmul_precision("medium")
    try:
        dsee_scale.prune(make("everything"), PruneConfig(scope="matrix"), batches(2))
        assert cpu.fp32_precision == "bf16" and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
        cpu.fp32_precision, gpu.fp32_precision = precisions
    assert set(seen) == {"ieee"}


def test_statistics_from_before_a_further_pruning_or_training_are_refused():
    config = PruneConfig(refit=False, modules=("q_proj",))
    model = make("llama")
    dsee_scale.prune(model, dataclasses.replace(config, sparsity=0.1), batches())
    found = dsee_scale.calibrate(model, batches())
    dsee_scale.prune(model, dataclasses.replace(config, sparsity=0.3), found)
    with pytest.raises(CalibrationError, match="another state"):
        dsee_scale.prune(model, dataclasses.replace(config, sparsity=0.5), found)
    model = build(llama_config())
    dsee_scale.inject(model, dataclasses.replace(FAMILIES["llama"][1], trained_modules=("norm",)))
    found = dsee_scale.calibrate(model, batches())
    model.model.norm.weight.data.mul_(2)
    with pytest.raises(CalibrationError, match="another state"):
        dsee_scale.prune(model, config, found)


def test_statistics_of_another_base_with_the_same_shapes_are_refused():
    found = dsee_scale.calibrate(make("llama"), batches())
    other = build(llama_config(), seed=1)
    dsee_scale.inject(other, FAMILIES["llama"][1])
    with pytest.raises(CalibrationError, match="another model"):
        dsee_scale.prune(other, PruneConfig(refit=False), found)


def test_refit_wants_batches_rather_than_statistics():
    model = make("llama")
    with pytest.raises(CalibrationError, match=r"refit needs the batches.*refit=False"):
        dsee_scale.prune(model, PruneConfig(), dsee_scale.calibrate(model, batches()))


def test_an_adapter_that_is_not_finite_is_named_before_anything_is_written():
    model = make("everything")
    model.model.layers[1].mlp.down_proj.dsee_values.data[0] = float("nan")
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(TargetError, match=r"the adapter of model\.layers\.1\.mlp\.down_proj holds NaN"):
        dsee_scale.prune(model, PruneConfig(), batches())
    for a, b in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shared", ["mlp.up_proj", "input_layernorm"])
def test_a_weight_that_two_blocks_share_is_not_solved_for_one_of_them(shared):
    model = build(llama_config())
    first, second = (layer.get_submodule(shared) for layer in model.model.layers[:2])
    second.weight = first.weight
    before = [param.clone() for param in model.parameters()]
    if shared == "input_layernorm":  # which stays as it is
        dsee_scale.prune(model, PruneConfig(block_steps=0), batches())
        return
    with pytest.raises(
        TargetError, match=r"layers\.1 and model\.layers\.0 share mlp\.up_proj\.weight, .*refit=False"
    ):
        dsee_scale.prune(model, PruneConfig(), batches())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    dsee_scale.prune(model, PruneConfig(refit=False), batches())


def test_refit_outside_of_the_blocks_is_refused():
    model = build(llama_config(tie_word_embeddings=False))
    with pytest.raises(TargetError, match=r"lm_head lies outside.*refit=False"):
        dsee_scale.prune(model, PruneConfig(modules=("lm_head", "q_proj")), batches())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(refit=True, score="W"), "refit chooses by activations"),
        (dict(refit=True, pattern="experts"), "refit does not go with pattern 'experts'"),
        (dict(scope="row", pattern="2:4"), "scope 'row' goes with pattern 'unstructured'"),
        (dict(pattern="heads", num_per_layer=1, sparsity=0.5), "num_per_layer says how many"),
        (dict(pattern="1:4", sparsity=0.5), "means a sparsity of 0.75"),
        (dict(pattern="heads", scope="matrix", min_per_layer=2), "min_per_layer goes with scope 'global'"),
    ],
)
def test_settings_without_effect_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        PruneConfig(**settings)
