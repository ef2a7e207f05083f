"""Re-fits after heads and neurons, against least squares in float64 and the tuned block's own outputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers, is_adapted
from dsee_scale.adapters.removed_units import removed_units
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.units import UnitLayer, find_units
from dsee_scale.algorithms.refit import DAMPING
from dsee_scale.errors import CalibrationError, ConfigError
from dsee_scale.passes.pools import block_linears
from tests.models import build, gpt2_config, llama_config, moe_config, token_batch
from tests.unit.test_calibrate import ALL, batches, effective, inputs_of
from tests.unit.test_refit_output import block_outputs, error

SIZES = dict(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, intermediate_size=52)
FAMILIES: dict[str, tuple[Any, DSEEConfig | None]] = {
    "llama": (lambda: llama_config(**SIZES), DSEEConfig(rank=3, num_sparse=7, target_modules=ALL)),
    "biased": (
        lambda: llama_config(**SIZES, attention_bias=True, mlp_bias=True),
        DSEEConfig(rank=3, num_sparse=7, target_modules=("q_proj", "down_proj")),
    ),
    "gpt2": (gpt2_config, DSEEConfig(rank=3, num_sparse=7, target_modules=("c_attn", "c_proj", "c_fc"))),
    "not adapted": (lambda: llama_config(**SIZES), None),
}
REMOVED = {
    "heads": {"llama": 2, "biased": 2, "gpt2": 1, "not adapted": 2},
    "neurons": dict.fromkeys(FAMILIES, 20),
}


def make(family: str) -> nn.Module:
    """Adapted, with updates that matter."""
    config, dsee = FAMILIES[family]
    model = build(config())
    if dsee is not None:
        dsee_scale.inject(model, dsee)
    for index, layer in enumerate(adapted_layers(model).values()):
        generator = torch.Generator().manual_seed(index)
        for param in (layer.dsee_B, layer.dsee_values):
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.05)
    return model


def config_for(family: str, kind: str, **settings: Any) -> PruneConfig:
    return PruneConfig(pattern=kind, num_per_layer=REMOVED[kind][family], **settings)


def layers_of(model: nn.Module, kind: Any) -> list[UnitLayer]:
    return find_units(model, kind, lambda param: param.shape)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_left_of_a_block_makes_up_for_its_units_by_least_squares(family: str, kind: str) -> None:
    model, data = make(family), batches(5)
    before, seen = copy.deepcopy(model), inputs_of(model, data)
    dsee_scale.prune(model, config_for(family, kind), data)
    layer = layers_of(model, kind)[0]  # later ones see other inputs
    gone = removed_units(model, layer)
    assert gone.any()
    for part in layer.parts:
        old, new = (effective(each.get_submodule(part.name)) for each in (before, model))
        lost = gone[part.unit_of]
        if part.side == "outputs":
            assert not new[lost].any() and torch.equal(new[~lost], old[~lost])
            continue
        x_TI = seen[part.name].double()
        gram = x_TI.T @ x_TI / len(x_TI)
        gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
        expected = torch.linalg.solve(gram[~lost][:, ~lost], gram[~lost] @ old.T).T
        assert not new[:, lost].any()
        torch.testing.assert_close(new[:, ~lost], expected, rtol=1e-4, atol=1e-6)
        adapter = model.get_submodule(part.name)
        if is_adapted(adapter):
            assert adapter.dsee_B.any() and not adapter.dsee_values.any() and not adapter.dsee_under_mask
            assert not lost[adapter.dsee_cols.long()].any()


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_each_stage_brings_the_model_nearer_to_the_tuned_one(kind: str) -> None:
    data = batches(5)
    tuned = block_outputs(make("llama"), data, -1)
    found = []
    for settings in ({"refit": False}, {}, {"block_steps": 60}):
        model = make("llama")
        report = dsee_scale.prune(model, config_for("llama", kind, **settings), data)
        assert len(report.units) == 2
        found.append(error(model, tuned, data))
        for name, layer in block_linears(model).items():
            assert "forward" not in vars(layer) and layer.weight.grad is None, name
    assert found[1] < 0.9 * found[0] and found[2] < 0.8 * found[1]


def tuned_on(model: nn.Module, data: list[dict[str, Tensor]], optimizer: Any, steps: int = 3) -> None:
    for batch in data[:steps]:
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 10])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_gone_stays_gone_in_retuning_and_the_cut_model_is_the_live_one(
    family: str, steps: int, tmp_path: Any
) -> None:
    model, data = make(family), batches(5)
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-2)
    tuned_on(model, data, optimizer)
    dsee_scale.prune(model, [config_for(family, kind, block_steps=steps) for kind in REMOVED], data)
    tuned_on(model, data, optimizer)
    for kind in REMOVED:
        for layer in layers_of(model, kind):
            gone = removed_units(model, layer)
            for part in layer.parts:
                lost, weight = gone[part.unit_of], effective(model.get_submodule(part.name))
                assert not (weight[lost] if part.side == "outputs" else weight[:, lost]).any(), part.name
    dsee_scale.export_model(model, tmp_path / "model", delta="masked")
    cut, batch = dsee_scale.load_pretrained(tmp_path / "model"), data[0]
    assert sum(p.numel() for p in cut.parameters()) < sum(
        p.numel() for name, p in model.named_parameters() if "dsee_" not in name
    )
    with torch.no_grad():
        counted = batch["attention_mask"].bool()
        found, expected = cut(**batch).logits[counted], model.eval()(**batch).logits[counted]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask_update", [True, False])
def test_zeros_within_the_weights_stay(mask_update: bool) -> None:
    model, data = make("llama"), batches(5)
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, mask_update=mask_update), data)
    zeros = {name: layer.weight == 0 for name, layer in block_linears(model).items()}
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.dsee_B, std=0.05)
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=20, block_steps=5), data)
    for name, layer in adapted_layers(model).items():
        assert not layer.weight[zeros[name]].any(), name
        assert layer.dsee_under_mask == mask_update
        if name.endswith("_proj") and "mlp" in name:
            assert layer.dsee_B.any() == mask_update  # beside the mask it would bring entries back


def test_units_that_are_gone_already_are_no_part_of_the_next_problem() -> None:
    model, data = make("llama"), batches(5)
    dsee_scale.prune(model, config_for("llama", "neurons"), data)
    first = [removed_units(model, layer) for layer in layers_of(model, "neurons")]
    before, seen = copy.deepcopy(model), inputs_of(model, data)
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=30), data)
    layer = layers_of(model, "neurons")[0]
    gone, down = removed_units(model, layer), layer.parts[-1].name
    assert int(gone.sum()) == 30 and (gone | ~first[0]).all()
    live, kept = ~first[0], ~gone
    gram = (x := seen[down].double()).T @ x / len(x)
    gram += DAMPING * gram.diagonal()[live].mean() * torch.eye(len(gram))
    old = effective(before.get_submodule(down))
    expected = torch.linalg.solve(gram[kept][:, kept], gram[kept][:, live] @ old[:, live].T).T
    torch.testing.assert_close(effective(model.get_submodule(down))[:, kept], expected, rtol=1e-4, atol=1e-6)


def test_neurons_of_experts_are_made_up_for_where_tokens_went() -> None:
    data = [token_batch(batch=4, length=24, seed=seed) for seed in range(3)]
    found = {}
    for refit in (True, False):
        model = build(moe_config("qwen3_moe"))
        before = copy.deepcopy(model)
        dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=4, refit=refit), data)
        pruned = model_state(model).pruned
        assert refit == any("content" in how for name, how in pruned.items() if name.endswith("down_proj"))
        found[refit] = {name: param.detach() for name, param in model.named_parameters()}
    name = next(name for name in found[True] if name.endswith("experts.down_proj"))
    old, solved, zeroed = dict(before.named_parameters())[name], found[True][name], found[False][name]
    assert torch.equal(solved == 0, zeroed == 0)
    assert not torch.equal(solved, zeroed)
    assert torch.equal(zeroed[zeroed != 0], old[zeroed != 0])


def test_other_scores_choose_and_the_refit_mends() -> None:
    chosen = []
    for refit in (True, False):
        model, data = make("llama"), batches(5)
        dsee_scale.prune(
            model, config_for("llama", "heads", score="ABS", refit=refit), data if refit else None
        )
        chosen.append([removed_units(model, layer) for layer in layers_of(model, "heads")])
    for one, other in zip(*chosen, strict=True):
        assert torch.equal(one, other)


def test_bad_settings_are_named_and_nothing_changes() -> None:
    with pytest.raises(ConfigError, match="refit does not go with pattern 'experts'"):
        PruneConfig(pattern="experts", refit=True)
    model, data = make("llama"), batches(2)
    before = {name: param.clone() for name, param in model.named_parameters()}
    with pytest.raises(CalibrationError, match="pass calibration=batches"):
        dsee_scale.prune(model, config_for("llama", "heads", score="ABS", refit=True))
    with pytest.raises(CalibrationError, match="refit needs the batches themselves"):
        dsee_scale.prune(model, config_for("llama", "heads"), dsee_scale.calibrate(model, data))
    assert all(torch.equal(before[name], param) for name, param in model.named_parameters())


def test_an_adapter_of_a_refitted_model_belongs_to_its_new_base(tmp_path: Any) -> None:
    model, data = make("llama"), batches(3)
    dsee_scale.prune(model, config_for("llama", "neurons"), data)
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(dsee_scale.DSEEError, match="re-fit"):
        dsee_scale.load_adapter(build(FAMILIES["llama"][0]()), tmp_path / "adapter")
    dsee_scale.export_model(model, tmp_path / "base", delta="none")
    again = dsee_scale.load_pretrained(tmp_path / "base")
    dsee_scale.load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(**data[0]).logits, model(**data[0]).logits, rtol=1e-5, atol=1e-5)
