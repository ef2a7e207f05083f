"""Pruning whole models: exact counts, pools, scores, and what is refused."""

from __future__ import annotations

import pytest
import torch

import dsee_scale
from dsee_scale import ConfigError, DSEEConfig, Pool, PruneConfig, TargetError
from dsee_scale.adapters.linear import adapted_layers, is_adapted
from dsee_scale.config import paper_pools
from dsee_scale.passes.pools import block_linears
from tests.models import build, gpt2_config, llama_config

SMALL = DSEEConfig(rank=3, num_sparse=7)


def trained(
    config=llama_config, dsee: DSEEConfig = SMALL, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    model = build(config(), dtype)
    dsee_scale.inject(model, dsee)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.dsee_B, std=0.1)
        torch.nn.init.normal_(layer.dsee_values, std=0.1)
    return model


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.weight.detach().clone() for name, module in block_linears(model).items()}


def dense_delta(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """s BA and s (BA + S2) as stored, by the formula itself."""
    low = layer.dsee_spec.scaling * layer.dsee_B.float() @ layer.dsee_A.float()
    sparse = torch.zeros_like(low)
    sparse.index_put_(
        (layer.dsee_rows.long(), layer.dsee_cols.long()), layer.dsee_values.float(), accumulate=True
    )
    return low.detach(), (low + layer.dsee_spec.scaling * sparse).detach()


def dense_score(mode: str, layer: torch.nn.Module) -> torch.Tensor:
    weight = layer.weight.detach().float()
    if not is_adapted(layer):
        return weight.abs()
    low, delta = dense_delta(layer)
    scores = {
        "W": weight.abs(),
        "AB": low.abs(),
        "ABS": delta.abs(),
        "WAB": (weight + low).abs(),
        "WABS": (weight + delta).abs(),
        "NAB": 1 / low.abs(),
        "NABS": 1 / delta.abs(),
    }
    return scores[mode]


@pytest.mark.parametrize("mode", ["W", "AB", "ABS", "WAB", "WABS", "NAB", "NABS"])
def test_the_lowest_scores_go(mode):
    model = trained()
    scores = {n: dense_score(mode, m).flatten() for n, m in block_linears(model).items()}
    before = weights(model)
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.4, score=mode))
    everything = torch.cat(list(scores.values()))
    k = round(0.4 * everything.numel())
    gone = torch.zeros(everything.numel(), dtype=torch.bool)
    gone[torch.argsort(everything, stable=True)[:k]] = True
    after = torch.cat([m.weight.detach().flatten() for m in block_linears(model).values()])
    old = torch.cat([w.flatten() for w in before.values()])
    # fp32 rounding of BA may swap entries of equal score at the edge, nothing else
    differs = (after == 0) != gone
    assert differs.sum() <= 2
    assert (after == 0).sum() == k == report.removed
    assert torch.equal(after[after != 0], old[after != 0])


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exactly_the_asked_number_is_zero(sparsity, dtype):
    model = trained(dtype=dtype)
    for module in block_linears(model).values():  # torch 2.7 draws zeros in bfloat16
        module.weight.data.masked_fill_(module.weight == 0, 2**-10)
    report = dsee_scale.prune(model, PruneConfig(sparsity=sparsity, score="W"))
    zeros = sum(int((w == 0).sum()) for w in weights(model).values())
    total = sum(w.numel() for w in weights(model).values())
    assert zeros == report.removed == round(sparsity * total)
    assert report.total == total


@pytest.mark.parametrize("score", ["W", "WABS"])
def test_a_model_with_more_zeros_than_asked_for_is_reported_as_it_is(score):
    model = trained()
    for module in block_linears(model).values():
        module.weight.data[:, ::3] = 0
    before = {name: w.clone() for name, w in weights(model).items()}
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.1, score=score))
    assert report.removed == sum(int((w == 0).sum()) for w in before.values()) > 0.1 * report.total
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())


def test_ties_are_broken_by_position():
    model = trained()
    for module in block_linears(model).values():
        module.weight.data.fill_(0.25)
    dsee_scale.prune(model, PruneConfig(sparsity=0.3, score="W"))
    flat = torch.cat([w.flatten() for w in weights(model).values()])
    k = round(0.3 * flat.numel())
    assert (flat[:k] == 0).all()
    assert (flat[k:] == 0.25).all()


def test_each_matrix_has_its_sparsity_with_scope_matrix():
    model = trained()
    dsee_scale.prune(model, PruneConfig(sparsity=0.37, scope="matrix", score="W"))
    for name, weight in weights(model).items():
        assert (weight == 0).sum() == round(0.37 * weight.numel()), name


def test_the_papers_two_pools_have_their_own_sparsity():
    model = trained()
    dsee_scale.prune(model, PruneConfig(pools=paper_pools(0.2, 0.6), score="ABS"))
    adapted = adapted_layers(model)
    for inside, sparsity in ((True, 0.2), (False, 0.6)):
        flat = torch.cat([w.flatten() for n, w in weights(model).items() if (n in adapted) == inside])
        assert (flat == 0).sum() == round(sparsity * flat.numel())


def test_pruning_again_keeps_what_was_removed():
    model = trained()
    dsee_scale.prune(model, PruneConfig(sparsity=0.3, score="ABS"))
    first = weights(model)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.dsee_B, std=0.3)
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="ABS"))
    for name, weight in weights(model).items():
        assert (weight[first[name] == 0] == 0).all()
    zeros = sum(int((w == 0).sum()) for w in weights(model).values())
    assert zeros == round(0.5 * sum(w.numel() for w in weights(model).values()))


def test_only_linear_weights_of_the_blocks_are_pruned():
    model = trained(gpt2_config, DSEEConfig(rank=2, num_sparse=3, target_modules=("c_attn",)))
    others = {
        n: p.clone() for n, p in model.named_parameters() if n.removesuffix(".weight") not in weights(model)
    }
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    for name, value in others.items():
        assert torch.equal(dict(model.named_parameters())[name], value), name


def test_random_scores_follow_the_seed():
    masks = []
    for seed in (0, 0, 1):
        model = trained()
        dsee_scale.prune(model, PruneConfig(score="random", seed=seed))
        masks.append(torch.cat([(w == 0).flatten() for w in weights(model).values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_a_score_that_needs_the_adapter_is_refused_without_one():
    with pytest.raises(TargetError, match=r"'WABS' needs adapters.*inject.*score='W'"):
        dsee_scale.prune(build(llama_config()), PruneConfig(score="WABS"))


def test_magnitude_needs_no_adapter():
    model = build(llama_config())
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    assert report.removed == round(report.total / 2)


@pytest.mark.parametrize(
    ("prune", "error", "words"),
    [
        (PruneConfig(modules=("qproj",), score="W"), TargetError, "'qproj' matches no linear layer.*q_proj"),
        (
            PruneConfig(pools=(Pool(name="a", sparsity=0.1), Pool(name="b", sparsity=0.2)), score="W"),
            ConfigError,
            "'a' and 'b' both hold",
        ),
        (
            PruneConfig(pools=(Pool(name="a", sparsity=0.1, modules=("xyz",)),), score="W"),
            ConfigError,
            "pool 'a': modules 'xyz' matches no weight; prunable layers: .*q_proj",
        ),
        (
            PruneConfig(pools=(Pool(name="a", sparsity=0.1, modules=("q_proj", "v_porj")),), score="W"),
            ConfigError,
            "pool 'a': modules 'v_porj' matches no weight",
        ),
    ],
)
def test_bad_pools_are_refused_with_nothing_removed(prune, error, words):
    model = trained()
    with pytest.raises(error, match=words):
        dsee_scale.prune(model, prune)
    assert all((w != 0).all() for w in weights(model).values())


def test_a_weight_that_is_not_finite_is_named_and_nothing_is_removed():
    model = trained()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(TargetError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        dsee_scale.prune(model, PruneConfig(score="W"))
    assert all((w != 0).all() for w in weights(model).values())


def test_the_report_prints_the_sparsity_of_each_matrix():
    text = str(dsee_scale.prune(trained(), PruneConfig(sparsity=0.5, score="W")))
    assert "50.0" in text
    assert "down_proj" in text


@pytest.mark.parametrize(("step", "expected"), [(0, 0.0), (10, 0.0), (60, 0.4375), (110, 0.5), (500, 0.5)])
def test_cubic_schedule(step, expected):
    schedule = dsee_scale.CubicSchedule(final_sparsity=0.5, start_step=10, num_steps=100)
    assert schedule.sparsity(step) == pytest.approx(expected)
    with pytest.raises(ConfigError, match="pattern 'heads' here removes a fixed number"):
        schedule.config(PruneConfig(pattern="heads", num_per_layer=1), step)


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_the_first_cuts_of_a_schedule_may_be_too_small_for_a_head(scope):
    config = PruneConfig(pattern="heads", score="W", scope=scope)
    model = build(llama_config(num_key_value_heads=5))
    schedule = dsee_scale.CubicSchedule(final_sparsity=0.4, start_step=0, num_steps=20)
    gone = [
        sum(heads for heads, _ in dsee_scale.prune(model, schedule.config(config, step)).units.values())
        for step in range(21)
    ]
    assert gone[:2] == [0, 0 if scope == "matrix" else 1] and gone[-1] == 4 and gone == sorted(gone)
    never = dsee_scale.CubicSchedule(final_sparsity=0.04, start_step=0, num_steps=10)
    with pytest.raises(ConfigError, match=r"sparsity 0\.04 of \d+ units .* rounds to none"):
        dsee_scale.prune(build(llama_config(num_key_value_heads=5)), never.config(config, 0))


def test_units_that_an_uneven_pruning_removed_count_towards_the_next_budget():
    model = build(llama_config(intermediate_size=32))
    with torch.no_grad():
        for param in model.model.layers[0].mlp.parameters():
            param *= 0.01
    neurons = dict(pattern="neurons", score="W")
    first = dsee_scale.prune(model, PruneConfig(sparsity=0.4, **neurons))
    assert first.units == {"model.layers.0 neurons": (26, 32), "model.layers.1 neurons": (0, 32)}
    second = dsee_scale.prune(model, PruneConfig(sparsity=0.5, min_per_layer=16, **neurons))
    assert second.units == {"model.layers.0 neurons": (26, 32), "model.layers.1 neurons": (6, 32)}
