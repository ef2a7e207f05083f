"""N:M together with heads and neurons: groups are formed among the inputs that are left, as the export has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import ConfigError, PruneConfig
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.targets import linear_kind
from dsee_scale.algorithms.patterns import groups_hold
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.cli import main
from dsee_scale.export.export import export_model
from dsee_scale.passes.pools import block_linears
from tests.models import build, llama_config, moe_config
from tests.unit.test_patterns import adapted, output

NEURONS = {"llama": 16, "biased": 4, "gpt2": 20, "bert": 8, "roberta": 4}
"""What stays of each is a multiple of 4."""


def zeros(weight: torch.Tensor) -> int:
    return int((weight == 0).sum())


@pytest.mark.parametrize("family", list(NEURONS))
@pytest.mark.parametrize("score", ["W", "WABS"])
def test_exported_weights_are_2_4_where_neurons_went_before(tmp_path, family, score):
    model = adapted(family)
    neurons = PruneConfig(pattern="neurons", num_per_layer=NEURONS[family], score="random")
    report = dsee_scale.prune(model, [neurons, PruneConfig(pattern="2:4", score=score, refit=False)])
    assert report.sparsity > 0.5
    export_model(model, tmp_path / "out")
    loaded = dsee_scale.load_pretrained(tmp_path / "out")
    checked = 0
    for name, module in block_linears(loaded).items():
        transposed = linear_kind(module) == "conv1d"
        weight: torch.Tensor = module.weight.detach()  # type: ignore[assignment, union-attr]
        assert groups_hold(weight, 2, 4, transposed=transposed), name
        assert zeros(weight) == weight.numel() // 2, name
        checked += 1
    assert checked >= 8


def test_groups_among_the_inputs_that_are_left_hold_the_largest():
    """Against a plain loop over the columns that stay."""
    model = adapted("llama")
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=16, score="random"))
    down = model.model.layers[0].mlp.down_proj
    before = down.weight.detach().clone()
    left = before.any(dim=0).nonzero().flatten()
    assert len(left) == 36 and any(left.diff() > 1)
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))
    expected = torch.zeros_like(before)
    for row in range(len(before)):
        for first in range(0, len(left), 4):
            group = left[first : first + 4]
            kept = group[before[row, group].abs().topk(2).indices]
            expected[row, kept] = before[row, kept]
    assert torch.equal(down.weight, expected)


def test_heads_whose_size_is_no_multiple_of_m_shift_groups_too(tmp_path):
    sizes = dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=4, head_dim=6)
    model = build(llama_config(**sizes, intermediate_size=24))
    heads = PruneConfig(pattern="heads", num_per_layer=2, score="W")
    dsee_scale.prune(model, heads)
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))
    export_model(model, tmp_path / "out")
    loaded = dsee_scale.load_pretrained(tmp_path / "out")
    weight = loaded.model.layers[0].self_attn.o_proj.weight
    assert weight.shape == (24, 12) and groups_hold(weight, 2, 4) and zeros(weight) == weight.numel() // 2
    torch.testing.assert_close(output(loaded), output(model.eval()), atol=1e-5, rtol=1e-5)


def test_whole_groups_that_went_leave_the_others_where_they_are():
    """Heads of a multiple of M inputs: the same result as if 2:4 had come first."""
    first, second = adapted("gpt2"), adapted("gpt2")
    heads, groups = (
        PruneConfig(pattern="heads", num_per_layer=1, score="W"),
        PruneConfig(pattern="2:4", score="W"),
    )
    for config in (heads, groups):
        dsee_scale.prune(first, config)
    mask = first.transformer.h[0].attn.c_proj.weight != 0
    dsee_scale.prune(second, groups)
    expected = second.transformer.h[0].attn.c_proj.weight != 0
    gone = ~mask.any(dim=1)
    assert int(gone.sum()) == 12
    assert torch.equal(mask[~gone], expected[~gone])


def test_units_that_would_shift_the_groups_of_an_earlier_n_of_m_are_refused():
    model = adapted("llama")
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(ConfigError, match=r"down_proj is 2:4.*neurons first.*in one call"):
        dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=4, score="W"))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    dsee_scale.prune(model, PruneConfig(pattern="heads", num_per_layer=2, score="W"))  # whole groups of 4


def test_inputs_left_that_m_does_not_divide_are_refused():
    model = adapted("llama")
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=15, score="W"))
    with pytest.raises(ConfigError, match=r"down_proj has 37 inputs left.*groups of 4"):
        dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))


def test_a_later_pruning_that_makes_no_sense_is_refused_before_the_first():
    model = adapted("llama")
    before = [param.clone() for param in model.parameters()]
    for bad, text in (
        (PruneConfig(pattern="neurons", num_per_layer=52, score="W"), "removes 52 of 52 neurons"),
        (PruneConfig(pattern="2:4", modules=("no_such_module",), score="W"), "no_such_module"),
    ):
        with pytest.raises(dsee_scale.errors.DSEEError, match=text):
            dsee_scale.prune(model, [PruneConfig(pattern="heads", num_per_layer=2, score="W"), bad])
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


TWO_OF_FOUR = PruneConfig(pattern="2:4", score="W")
NEURONS_ANYWHERE = PruneConfig(pattern="neurons", sparsity=0.25, score="W")


@pytest.mark.parametrize(
    "first, later, text",
    [
        (
            PruneConfig(pattern="neurons", num_per_layer=2, score="W"),
            [TWO_OF_FOUR],
            r"down_proj has 50 inputs left",
        ),
        (
            TWO_OF_FOUR,
            [PruneConfig(pattern="neurons", num_per_layer=4, score="W")],
            r"down_proj is 2:4.*neurons first",
        ),
        (NEURONS_ANYWHERE, [TWO_OF_FOUR], r"down_proj.*2:4.*global.*multiple of 4.*num_per_layer.*apart"),
        (
            NEURONS_ANYWHERE,
            [PruneConfig(pattern="neurons", num_per_layer=16, score="W"), TWO_OF_FOUR],
            r"down_proj.*global",
        ),
        (
            PruneConfig(pattern="heads", num_per_layer=2, score="W"),
            [PruneConfig(pattern="neurons", num_per_layer=3, score="W"), TWO_OF_FOUR],
            r"down_proj has 49 inputs left",
        ),
    ],
)
def test_a_step_that_an_earlier_one_makes_impossible_is_refused_before_the_first(first, later, text):
    model = adapted("llama")
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(ConfigError, match=text):
        dsee_scale.prune(model, [first, *later])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model_state(model).pruned


@pytest.mark.parametrize("spoilt", ["weight", "adapter"])
def test_what_only_a_later_step_reads_is_checked_before_the_first(spoilt):
    model = adapted("llama")
    mlp = model.model.layers[1].mlp
    (mlp.down_proj.weight if spoilt == "weight" else mlp.up_proj.dsee_flat).data.view(-1)[0] = torch.nan
    before = [param.clone() for param in model.parameters()]
    later = PruneConfig(pattern="neurons", num_per_layer=4, score="ABS")
    with pytest.raises(dsee_scale.TargetError, match="NaN"):
        dsee_scale.prune(model, [PruneConfig(pattern="heads", num_per_layer=2, score="W"), later])
    for a, b in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_later_score_without_adapters_is_refused_before_the_first():
    model = build(llama_config())
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(dsee_scale.TargetError, match="needs adapters"):
        dsee_scale.prune(model, [PruneConfig(score="W"), PruneConfig(score="WABS")])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "first",
    [
        PruneConfig(pattern="heads", sparsity=0.34, score="W"),  # whole groups of 4, wherever they go
        PruneConfig(pattern="neurons", sparsity=0.3, scope="matrix", score="W"),  # 16 of 52 in each layer
    ],
)
def test_units_without_num_per_layer_go_before_n_of_m_where_their_number_fits(first):
    model = adapted("llama")
    modules = ("o_proj", "down_proj")
    dsee_scale.prune(model, [first, PruneConfig(pattern="2:4", modules=modules, score="W")])
    patterns = {
        name: how["pattern"] for name, how in model_state(model).pruned.items() if "down_proj" in name
    }
    assert set(patterns.values()) == {"2:4"}


def test_a_later_step_counts_what_an_earlier_call_removed():
    """36 neurons are left before and after the second `num_per_layer`, which is less than what is gone."""
    model = adapted("llama")
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=16, score="W"))
    dsee_scale.prune(model, [PruneConfig(pattern="neurons", num_per_layer=3, score="W"), TWO_OF_FOUR])


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(folder)]) == 0
    return values, capsys.readouterr().out


@pytest.mark.parametrize(
    "family, reason",
    [("llama", None), ("gpt2", "GPT2Config cannot say a number of heads apart from the hidden size")],
)
def test_inspect_says_what_was_cut_out_and_what_it_gains(tmp_path, capsys, family, reason):
    model = adapted(family)
    base = sum(param.numel() for name, param in model.named_parameters() if "dsee_" not in name)
    units = [
        PruneConfig(pattern="heads", num_per_layer=2 if family == "llama" else 1, score="W"),
        PruneConfig(pattern="neurons", num_per_layer=4, score="W"),
        TWO_OF_FOUR,
    ]
    dsee_scale.prune(model, units)
    save_adapter(model, tmp_path / "adapter")
    report = export_model(model, tmp_path / "out")
    assert report.num_removed == base - report.num_parameters > 0
    assert report.reason == reason and (reason or "cut out of 2 blocks") in str(report)
    values, text = inspected(tmp_path / "out", capsys)
    share = 100 * report.num_removed / base
    assert f"{share:.1f}% of the parameters cut out" in text
    assert (reason or "loads with  transformers") in text
    semi = "14 matrices fit 2:4 kernels"
    if family == "llama":
        assert semi in text and "2:4 (I x O)" not in text
    else:  # the kernels take no Conv1D, whose weights are stored I x O
        assert "2:4 kernels" not in text and "2:4 (I x O)" in text
    values, text = inspected(tmp_path / "adapter", capsys)
    assert values["at export"] == report.structure and "cut out of 2 blocks" in text
    found = {row["name"]: row["pattern"] for row in values["matrices"]}
    assert set(found.values()) == {"heads + 2:4", "neurons + 2:4"}


@pytest.mark.parametrize("experts, number, pattern", [(4, 4, "4:8"), (3, 8, "12:24")])
def test_neurons_of_experts_are_counted_in_each_expert_before_the_first_goes(experts, number, pattern):
    sizes = dict(intermediate_size=32, hidden_size=96)
    model = build(moe_config("mixtral", experts=experts, **sizes))
    before = [param.clone() for param in model.parameters()]
    steps = [
        PruneConfig(pattern="neurons", num_per_layer=number, score="W"),
        PruneConfig(pattern=pattern, score="W", modules=("down_proj",), refit=False),
    ]
    if pattern == "12:24":  # 24 are left in every expert
        assert dsee_scale.prune(model, steps).units["model.layers.0 neurons"] == (8 * experts, 32 * experts)
        return
    with pytest.raises(ConfigError, match="has 28 inputs left, which groups of 8 do not divide"):
        dsee_scale.prune(model, steps)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_units_may_not_shift_groups_that_a_later_pruning_left_what_they_are():
    model = adapted("llama")
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W", refit=False))
    dsee_scale.prune(model, PruneConfig(sparsity=0.6, score="W", scope="global", refit=False))
    assert groups_hold(model.model.layers[0].mlp.down_proj.weight.detach(), 2, 4)
    with pytest.raises(ConfigError, match="is 2:4, and without some of its inputs it would not be"):
        dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=2, score="W"))
