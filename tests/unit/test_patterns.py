"""N:M, heads and neurons on whole models, against plain references."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, RobertaConfig

import dsee_scale
from dsee_scale import ConfigError, DSEEConfig, FormatError, PruneConfig, TargetError
from dsee_scale.adapters.families import FAMILIES
from dsee_scale.adapters.linear import adapted_layers, is_adapted
from dsee_scale.adapters.removed_units import pack_units, removed_units, unpack_units
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.units import find_units
from dsee_scale.algorithms import patterns
from dsee_scale.algorithms.delta import delta_block
from dsee_scale.algorithms.score import Ranking
from dsee_scale.partition import open_partition
from dsee_scale.pruning.rankings import find_rankings  # the adapter of each matrix, as prune reads it
from dsee_scale.pruning.units import plan_units
from tests.models import build, gpt2_config, llama_config, token_batch

GROUPED = dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, head_dim=4, intermediate_size=52)


def bert_config(kind: type = BertConfig, **changes: Any) -> Any:
    sizes = dict(
        vocab_size=97,
        hidden_size=36,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=44,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return kind(**{**sizes, **changes})


def encoder(kind: type) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(bert_config(kind), dtype=torch.float32)
    for name, param in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(param, std=0.02)
    return model


MODELS = {
    "llama": (
        lambda: build(llama_config(**GROUPED)),
        DSEEConfig(rank=3, num_sparse=40, target_modules=("q_proj", "v_proj", "o_proj", "up_proj")),
    ),
    "biased": (
        lambda: build(llama_config(**GROUPED, attention_bias=True, mlp_bias=True)),
        DSEEConfig(rank=3, num_sparse=40, target_modules=("q_proj", "k_proj", "down_proj")),
    ),
    "gpt2": (
        lambda: build(gpt2_config()),
        DSEEConfig(
            rank=3,
            num_sparse=40,
            target_modules=("c_attn", "attn.c_proj", "c_fc"),
            output_slices={"c_attn": ("q", "v")},
        ),
    ),
    "bert": (
        lambda: encoder(BertConfig),
        DSEEConfig(
            rank=3,
            num_sparse=40,
            target_modules=("query", "value", "intermediate.dense"),
            trained_modules=("classifier",),
        ),
    ),
    "roberta": (
        lambda: encoder(RobertaConfig),
        DSEEConfig(rank=3, num_sparse=40, target_modules=("query", "value", "attention.output.dense")),
    ),
}


def adapted(name: str) -> torch.nn.Module:
    """A model with adapters that are not zero."""
    make, config = MODELS[name]
    model = make()
    dsee_scale.inject(model, config)
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model).values():
        for param in (layer.dsee_B, layer.dsee_values):
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.05)
    return model.eval()


def updates(model: torch.nn.Module, config: PruneConfig) -> dict[str, Ranking]:
    plan = plan_units(model, config, lambda param: param.shape)
    return find_rankings([plan.pool], config, open_partition(model))


# N:M


@given(
    st.integers(1, 6).flatmap(
        lambda m: st.tuples(
            st.lists(st.lists(st.integers(0, 3), min_size=m + 1, max_size=m + 1), min_size=1, max_size=5),
            st.integers(0, m),
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_lowest_in_groups_takes_the_lowest_and_of_ties_the_first(case):
    rows, num_remove = case
    found = patterns.lowest_in_groups(torch.tensor(rows, dtype=torch.int32)[:, :, None], num_remove)
    for row, gone in zip(rows, found[:, :, 0].tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda i: (row[i], i))
        assert {i for i, g in enumerate(gone) if g} == set(order[:num_remove])


@given(st.lists(st.integers(0, 9), min_size=0, max_size=12), st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_whole_slabs_keeps_order_and_positions(sizes, slab):
    total = sum(sizes) // slab * slab
    blocks, at = [], 0
    for size in sizes:
        size = min(size, total - at)
        blocks.append((torch.arange(at, at + size), at))
        at += size
    seen = 0
    for entries, position in patterns.whole_slabs(blocks, slab):
        assert position == seen and entries.numel() % slab == 0
        assert entries.tolist() == list(range(position, position + entries.numel()))
        seen += entries.numel()
    assert seen == total


def reference_n_of_m(weight_OI: torch.Tensor, score_OI: torch.Tensor, n: int, m: int) -> torch.Tensor:
    pruned = weight_OI.clone()
    for row in range(weight_OI.shape[0]):
        for first in range(0, weight_OI.shape[1], m):
            places = sorted(
                range(first, first + m), key=lambda i: (weight_OI[row, i] != 0, float(score_OI[row, i]), i)
            )
            pruned[row, places[: m - n]] = 0
    return pruned


@pytest.mark.parametrize("score", ["W", "WABS", "ABS", "NABS"])
@pytest.mark.parametrize("pattern", ["2:4", "1:2", "3:4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_n_of_m_equals_a_plain_loop(family, pattern, score):
    model = adapted(family)
    n, m = map(int, pattern.split(":"))
    before = copy.deepcopy(model)
    report = dsee_scale.prune(model, PruneConfig(pattern=pattern, score=score))
    config = PruneConfig(pattern="heads", score=score)
    rankings = updates(before, config)
    checked = 0
    for name, ranking in rankings.items():
        old, new = before.get_submodule(name).weight.detach(), model.get_submodule(name).weight.detach()
        found = old.abs()
        if ranking.delta is not None and score != "W":
            update = delta_block(ranking.delta, 0, old.shape[0])
            found = {"WABS": (old + update).abs(), "ABS": update.abs(), "NABS": 1 / update.abs()}[score]
        transposed = family == "gpt2"
        if transposed:
            old, new, found = old.T, new.T, found.T
        assert torch.equal(new, reference_n_of_m(old, found, n, m)), name
        assert report.matrices[name][0] == (new == 0).sum() >= old.numel() * (m - n) // m
        assert patterns.groups_hold(model.get_submodule(name).weight, n, m, transposed=transposed)
        checked += 1
    assert checked >= 4


def test_n_of_m_twice_changes_nothing_more():
    model = adapted("llama")
    for score in ("WABS", "W"):
        dsee_scale.prune(model, PruneConfig(pattern="2:4", score=score))
        weights = [param.clone() for param in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


def test_n_of_m_writes_no_negative_zero():
    model = adapted("gpt2")
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))
    weight = model.transformer.h[0].attn.c_attn.weight
    assert not torch.signbit(weight[weight == 0]).any()


def test_groups_hold_sees_a_group_with_too_many():
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]])
    assert patterns.groups_hold(weight[:1], 2, 4)
    assert not patterns.groups_hold(weight, 2, 4)
    assert not patterns.groups_hold(weight.T, 2, 4, transposed=True)


# Scores of units


def test_sums_do_not_depend_on_where_stretches_begin():
    weight = torch.randn(37, 29, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-14, 15)
    flat = weight.reshape(-1)
    shift = patterns.fixed_point_shift(patterns.largest_exponent([(flat.abs(), 0)]), flat.numel())
    for axis in (0, 1):
        expected = patterns.fixed_point(weight.abs(), shift).sum(dim=1 - axis)
        for cuts in ((0, 1073), (0, 1, 29, 30, 500, 1073), (*range(0, 1073, 7), 1073)):
            sums = torch.zeros(weight.shape[axis], dtype=torch.int64)
            for start, stop in itertools.pairwise(cuts):
                values = patterns.fixed_point(flat[start:stop].abs(), shift)
                patterns.add_along_axis(values, start, 29, axis, sums)
            assert torch.equal(sums, expected)
        exact = weight.abs().double().sum(dim=1 - axis)
        assert torch.allclose(sums.double() * 2.0**-shift, exact, rtol=1e-12, atol=37 * 2.0**-shift)


def test_fixed_point_sums_never_overflow():
    largest = torch.full((1000,), torch.finfo(torch.float32).max)
    shift = patterns.fixed_point_shift(patterns.largest_exponent([(largest, 0)]), 1000)
    assert int(patterns.fixed_point(largest, shift).sum()) > 0
    zero = patterns.largest_exponent([(torch.zeros(3), 0)])
    assert patterns.fixed_point(torch.zeros(3), patterns.fixed_point_shift(zero, 3)).tolist() == [0, 0, 0]


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        patterns.largest_exponent([(torch.tensor([1.0, float("inf")]), 0)])


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_pieces_cover_a_stretch_once(start, numel, columns):
    covered = [
        (piece.row + r) * columns + piece.column + c
        for piece in patterns.pieces(start, numel, columns)
        for r in range(piece.shape[0])
        for c in range(piece.shape[1])
    ]
    assert covered == list(range(start, start + numel))


def test_lowest_units_overall_keeps_the_floor():
    scores = [torch.tensor([0, 0, 0, 0]), torch.tensor([5, 1, 9, 1])]
    before = [torch.zeros(4, dtype=torch.bool)] * 2
    assert [g.tolist() for g in patterns.lowest_units_overall(scores, before, 5, 1)] == [
        [True, True, True, False],
        [False, True, False, True],
    ]


@pytest.mark.parametrize(("num_remove", "second"), [(3, [0, 0, 0, 0]), (4, [0, 1, 0, 0]), (5, [0, 1, 0, 1])])
def test_units_that_are_gone_count_beyond_the_floor_too(num_remove, second):
    scores = [torch.tensor([7, 7, 7, 7]), torch.tensor([5, 1, 9, 1])]
    before = [torch.tensor([True, True, True, False]), torch.zeros(4, dtype=torch.bool)]
    found = patterns.lowest_units_overall(scores, before, num_remove, 2)
    assert [g.tolist() for g in found] == [[True, True, True, False], [bool(each) for each in second]]


@given(st.lists(st.booleans(), min_size=1, max_size=70))
@settings(max_examples=40, deadline=None)
def test_units_survive_their_record(bits):
    gone = torch.tensor(bits)
    assert torch.equal(unpack_units(pack_units(gone), len(bits), "w"), gone)
    for wrong in (pack_units(gone) + "0", "x", ""):
        with pytest.raises(FormatError, match="one bit for each"):
            unpack_units(wrong, len(bits), "w")


def reference_scores(model: torch.nn.Module, config: PruneConfig) -> list[torch.Tensor]:
    """Float64 sums over whole matrices, from the definition."""
    rankings = updates(model, config)
    result = []
    for layer in find_units(model, config.pattern, lambda p: p.shape):
        total = torch.zeros(layer.num_units, dtype=torch.float64)
        with_adapter = [part for part in layer.parts if is_adapted(part.module)]
        for part in layer.parts if config.score == "W" or not with_adapter else with_adapter:
            weight = part.module.weight.detach().double()
            ranking = rankings[part.name]
            if config.score != "W" and ranking.delta is not None:
                update = delta_block(ranking.delta, 0, weight.shape[0]).double()
                weight = {"ABS": update, "NABS": update, "WABS": weight + update}[config.score]
            by_unit = (weight.T if part.transposed else weight).abs()
            by_unit = by_unit.sum(dim=1 if part.side == "outputs" else 0)
            for index, value in enumerate(by_unit.tolist()):
                if config.score == "W" or not with_adapter or part.side == "inputs":
                    inside = True
                else:
                    inside = any(a <= index < b for a, b in part.module.dsee_spec.slices)
                total[part.unit_of[index]] += value if inside else 0
        result.append(-total if config.score == "NABS" else total)
    return result


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("score", ["W", "WABS", "ABS", "NABS"])
@pytest.mark.parametrize("family", list(MODELS))
def test_units_of_lowest_score_go(family, score, kind):
    model = adapted(family)
    config = PruneConfig(pattern=kind, score=score, sparsity=0.4, scope="matrix")
    if score in ("ABS", "NABS") and kind == "neurons" and family == "roberta":
        with pytest.raises(TargetError, match="reads the update alone"):
            dsee_scale.prune(model, config)
        return
    expected = reference_scores(model, config)
    dsee_scale.prune(model, config)
    layers = find_units(model, kind, lambda p: p.shape)
    assert len(layers) == 2
    for layer, scores in zip(layers, expected, strict=True):
        gone = removed_units(model, layer)
        assert int(gone.sum()) == round(0.4 * layer.num_units)
        assert scores[gone].max() <= scores[~gone].min()


def test_the_papers_head_score_is_the_sum_over_q_and_v_rows():
    """With q and v adapted, ABS adds up |D| over the head's rows of both and of nothing else."""
    model = adapted("gpt2")
    for layer in adapted_layers(model).values():
        if layer.dsee_spec.shape[0] != 108:
            layer.dsee_B.data.mul_(100)  # would decide, if o or the feed-forward counted
    only_qv = adapted("gpt2")
    for layer in only_qv.transformer.h:
        dsee_scale.adapters.linear.detach(layer.attn.c_proj)
    dsee_scale.prune(only_qv, PruneConfig(pattern="heads", score="ABS", num_per_layer=1))
    weight = model.transformer.h[1].attn.c_attn
    ranking = updates(model, PruneConfig(pattern="heads", score="ABS"))["transformer.h.1.attn.c_attn"]
    update_OI = delta_block(ranking.delta, 0, weight.weight.shape[0]).T.abs()
    by_head = (update_OI[:36] + update_OI[72:]).reshape(3, -1).sum(dim=1)
    layer = find_units(only_qv, "heads", lambda p: p.shape)[1]
    assert int(removed_units(only_qv, layer).nonzero()) == int(by_head.argmin())


# What a removed unit is


def silence(model: torch.nn.Module, layers: list[Any]) -> list[Any]:
    """Zero the inputs of o or down at removed units, by hooks on an untouched model."""
    handles = []
    for layer, gone in layers:
        part = layer.parts[-1]
        keep = (~gone[part.unit_of]).float()
        module = model.get_submodule(part.name)
        handles.append(module.register_forward_pre_hook(lambda _, args, keep=keep: (args[0] * keep,)))
    return handles


def output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_batch()).logits


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("family", list(MODELS))
def test_a_removed_unit_is_one_whose_output_is_nothing(family, kind):
    """The mapping of units to rows and columns, told by the outputs of the model."""
    model, untouched = adapted(family), adapted(family)
    dsee_scale.prune(model, PruneConfig(pattern=kind, sparsity=0.4, scope="matrix", score="random", seed=3))
    layers = [(layer, removed_units(model, layer)) for layer in find_units(model, kind, lambda p: p.shape)]
    assert all(gone.any() and not gone.all() for _, gone in layers)
    silence(untouched, layers)
    assert torch.allclose(output(model), output(untouched), atol=1e-6)
    assert not torch.allclose(output(model), output(adapted(family)), atol=1e-4)


@pytest.mark.parametrize("family", list(MODELS))
def test_rows_columns_biases_and_adapters_of_removed_units_are_zero(family):
    model = adapted(family)
    before = {name: param.clone() for name, param in model.named_parameters()}
    for kind in ("heads", "neurons"):
        dsee_scale.prune(model, PruneConfig(pattern=kind, sparsity=0.4, scope="matrix", score="W"))
    touched = set()
    for kind in ("heads", "neurons"):
        for layer in find_units(model, kind, lambda p: p.shape):
            for part in layer.parts:
                gone = removed_units(model, layer)[part.unit_of]
                module = part.module
                weight_OI = module.weight.T if part.transposed else module.weight
                lines = weight_OI if part.side == "outputs" else weight_OI.T
                old = before[f"{part.name}.weight"]
                old_OI = old.T if part.transposed else old
                assert not lines[gone].any()
                assert torch.equal(lines[~gone], (old_OI if part.side == "outputs" else old_OI.T)[~gone])
                if part.side == "outputs" and module.bias is not None:
                    assert not module.bias[gone].any() and module.bias[~gone].all()
                if is_adapted(module):
                    values = module.dsee_values
                    update = patterns_delta(module)
                    update = update if part.side == "outputs" else update.T
                    assert not update[gone].any() and update[~gone].any()
                    at = module.dsee_rows if part.side == "outputs" else module.dsee_cols
                    assert not values[gone[at.long()]].any()
                    touched.add(part.name)
    assert touched


def patterns_delta(module: Any) -> torch.Tensor:
    from dsee_scale.adapters.linear import delta_record

    record = delta_record(module, module.dsee_flat)
    block = delta_block(record, 0, record.storage_shape[0])
    return block.T if record.spec.transposed else block


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("family", list(MODELS))
def test_the_retune_keeps_removed_units_at_zero_whatever_the_optimizer_remembers(family, optimizer):
    model = adapted(family).train()
    trained = dsee_scale.trainable_parameters(model)
    kwargs = dict(momentum=0.9) if optimizer is torch.optim.SGD else dict(weight_decay=0.1)
    steps = optimizer(trained, lr=1e-2, **kwargs)

    def step(seed: int) -> None:
        logits = model(token_batch(seed=seed)).logits
        steps.zero_grad()
        logits.float().square().mean().backward()
        steps.step()

    for seed in range(3):
        step(seed)
    for kind in ("heads", "neurons"):
        dsee_scale.prune(model, PruneConfig(pattern=kind, sparsity=0.4, scope="matrix", score="W"))
    zeros = {name: param == 0 for name, param in model.named_parameters()}
    before = {name: param.clone() for name, param in model.named_parameters()}
    for seed in range(3):
        step(10 + seed)
    moved = 0
    for name, param in model.named_parameters():
        lines = zeros[name]
        if "dsee_" in name and lines.any():
            assert not param[lines].any(), name
            assert not param.grad[lines].any(), name
            moved += int((param != before[name]).sum())
    assert moved


def test_removing_more_heads_keeps_those_that_are_gone():
    model = adapted("gpt2")
    first = PruneConfig(pattern="neurons", sparsity=0.25, scope="matrix", score="random", seed=1)
    dsee_scale.prune(model, first)
    layer = find_units(model, "neurons", lambda p: p.shape)[0]
    gone = removed_units(model, layer)
    dsee_scale.prune(
        model, PruneConfig(pattern="neurons", sparsity=0.5, scope="matrix", score="random", seed=2)
    )
    more = removed_units(model, layer)
    assert int(more.sum()) == 72 and bool((more | ~gone).all())


def test_a_budget_for_all_layers_leaves_each_its_floor():
    model = adapted("llama")
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1e-3)
    model.model.layers[0].mlp.gate_proj.weight.data.mul_(1e-3)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(1e-3)
    report = dsee_scale.prune(
        model, PruneConfig(pattern="neurons", sparsity=0.5, min_per_layer=13, score="W")
    )
    assert report.units == {
        "model.layers.0 neurons": (39, 52),
        "model.layers.1 neurons": (13, 52),
    }
    assert "52 of 104 neurons are gone" in str(report)


def test_the_record_names_units_and_keeps_the_pattern_within():
    model = adapted("gpt2")
    dsee_scale.prune(model, PruneConfig(pattern="2:4", modules=("c_fc",), score="W"))
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=12, score="W"))
    dsee_scale.prune(model, PruneConfig(pattern="heads", num_per_layer=1, score="W"))
    pruned = model_state(model).pruned
    assert pruned["transformer.h.0.mlp.c_fc.weight"]["pattern"] == "2:4"
    assert pruned["transformer.h.0.mlp.c_proj.weight"]["pattern"] == "neurons"
    assert pruned["transformer.h.0.attn.c_attn.bias"]["heads"] in ("8", "4", "2")


# Bad input

BAD = [
    ("llama", dict(pattern="heads", num_per_layer=6), ConfigError, "removes 6 of 6 heads"),
    (
        "llama",
        dict(pattern="heads", num_per_layer=3),
        ConfigError,
        "breaks the key/value groups.*multiple of 2",
    ),
    ("llama", dict(pattern="heads", sparsity=0.9, scope="matrix"), ConfigError, "removes 6 of 6 heads"),
    ("llama", dict(pattern="heads", sparsity=0.9), ConfigError, "only 4 can go"),
    ("llama", dict(pattern="heads", sparsity=0.1, scope="matrix"), ConfigError, "rounds to none"),
    ("llama", dict(pattern="neurons", num_per_layer=52), ConfigError, "removes 52 of 52 neurons"),
    ("llama", dict(pattern="2:5"), ConfigError, "48 inputs, which groups of 5 do not divide"),
    ("llama", dict(pattern="4:8"), ConfigError, "down_proj has 52 inputs"),
    ("bert", dict(pattern="neurons", score="AB", num_per_layer=44), ConfigError, "removes 44 of 44"),
]


@pytest.mark.parametrize("family, settings, kind, text", BAD)
def test_bad_counts_are_refused_before_anything_changes(family, settings, kind, text):
    model = adapted(family)
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(kind, match=text):
        dsee_scale.prune(
            model,
            PruneConfig(**{"score": "W", **settings}),
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(pattern="4:4"), "expected 1 <= N < M"),
        (dict(pattern="0:4"), "expected 1 <= N < M"),
        (dict(pattern="2:4", sparsity=0.3), "means a sparsity of 0.5"),
        (dict(pattern="blocks"), "is unknown"),
        (dict(pattern="heads", modules=("q_proj",)), "leave `modules` out"),
        (dict(pattern="2:4", pools=(dict(name="a", sparsity=0.5),)), "pools go with"),
        (dict(num_per_layer=2), "go with pattern 'heads', 'neurons' or 'experts'"),
        (dict(pattern="heads", num_per_layer=0), "at least 1"),
        (dict(pattern="heads", num_per_layer=2, min_per_layer=2), "not both"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        PruneConfig(**{"score": "W", **settings})


def test_an_unknown_architecture_names_the_known_ones_and_where_to_add_one():
    from transformers import OPTConfig

    config = OPTConfig(vocab_size=97, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    model = AutoModel.from_config(config)
    with pytest.raises(TargetError, match=r"'opt'.*llama.*families.FAMILIES"):
        dsee_scale.prune(model, PruneConfig(pattern="heads", score="W"))


def test_an_activation_that_is_not_zero_at_zero_is_refused():
    model = build(gpt2_config(activation_function="sigmoid"))
    with pytest.raises(TargetError, match="activation 'sigmoid' of 0 is not 0"):
        dsee_scale.prune(model, PruneConfig(pattern="neurons", score="W"))


def test_every_family_names_what_its_blocks_have():
    """Each described architecture of transformers, built small."""
    from transformers import AutoConfig

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    for model_type, family in FAMILIES.items():
        if family.experts:  # see test_experts
            continue
        own = dict(n_embd=32, n_head=4, n_layer=2, n_inner=48) if model_type == "gpt2" else {**sizes, **heads}
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **own))
        for kind in ("heads", "neurons"):
            layers = find_units(model, kind, lambda p: p.shape)
            assert len(layers) == 2 and layers[0].size == (4 if kind == "heads" else 48), model_type
        assert family.name in ("llama", "gpt2", "bert")


def test_prunings_of_one_call_come_one_after_the_other():
    heads = PruneConfig(pattern="heads", num_per_layer=2, score="W")
    neurons = PruneConfig(pattern="neurons", sparsity=0.25, scope="matrix", score="W")
    one, two = adapted("llama"), adapted("llama")
    report = dsee_scale.prune(one, [heads, neurons])
    for config in (heads, neurons):
        dsee_scale.prune(two, config)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert len(report.matrices) == 14 and len(report.units) == 4
    assert "4 of 12 heads are gone" in str(report) and "26 of 104 neurons are gone" in str(report)
    with pytest.raises(ConfigError, match=r"prune got \[\]; expected PruneConfig"):
        dsee_scale.prune(one, [])
