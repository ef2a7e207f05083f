"""Models and arguments that a user may well pass, and that would give wrong results without a word."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.errors import ConfigError, FormatError, TargetError
from dsee_scale.recipe.sections import ModelConfig
from dsee_scale.training.setup import load_model
from tests.models import build, llama_config
from tests.unit.test_prune import trained

NO_REFIT = PruneConfig(sparsity=0.5, score="W")


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_model_with_adapters_of_peft_is_refused(tmp_path, wrapped):
    model = peft.get_peft_model(build(llama_config()), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model = model if wrapped else model.base_model.model
    before = {name: param.clone() for name, param in model.named_parameters()}
    calls = [
        lambda: dsee_scale.inject(model, DSEEConfig(rank=3)),
        lambda: dsee_scale.prune(model, NO_REFIT),
        lambda: dsee_scale.export_model(model, tmp_path / "out"),
    ]
    for call in calls:
        with pytest.raises(TargetError, match=r"belongs to PEFT.*merge_and_unload\(\)"):
            call()
    assert not (tmp_path / "out").exists()
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_merged_model_of_peft_is_welcome(tmp_path):
    model = peft.get_peft_model(build(llama_config()), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    merged = model.merge_and_unload()
    dsee_scale.inject(merged, DSEEConfig(rank=3, num_sparse=7))
    assert dsee_scale.prune(merged, NO_REFIT).sparsity == pytest.approx(0.5, abs=1e-4)


def test_a_state_dict_that_brings_a_mask_along_is_warned_of():
    pruned, other = trained(), trained()
    dsee_scale.prune(pruned, NO_REFIT)
    state = pruned.state_dict()
    with pytest.warns(UserWarning, match="no state dict says that they are a mask.*load_adapter"):
        other.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned.load_state_dict(state)  # its own record says so
        other.load_state_dict(other.state_dict())
        fresh = trained()
        fresh.load_state_dict(trained().state_dict())


def test_a_recipes_model_is_no_injected_one(tmp_path):
    trained().save_pretrained(tmp_path / "injected")
    with pytest.raises(FormatError, match=r"injected model that save_pretrained wrote.*export_model"):
        load_model(ModelConfig(name=str(tmp_path / "injected")), torch.float32, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [None, {"rank": 4}, peft.LoraConfig(r=4)])
def test_a_config_of_another_kind_is_named(config):
    with pytest.raises(ConfigError, match="expected a DSEEConfig"):
        dsee_scale.inject(build(llama_config()), config)
    with pytest.raises(ConfigError, match="expected PruneConfig"):
        dsee_scale.prune(trained(), config)
    for several in ([NO_REFIT, config], []):
        with pytest.raises(ConfigError, match="expected PruneConfig"):
            dsee_scale.prune(trained(), several)


def test_master_weights_are_an_optimizers():
    with pytest.raises(ConfigError, match="keep_masters got a LlamaForCausalLM; expected an optimizer"):
        dsee_scale.keep_masters(build(llama_config()))


def test_several_prunings_report_what_they_reach_together():
    prunings = [
        PruneConfig(sparsity=0.5, score="W", modules=("q_proj", "k_proj", "v_proj", "o_proj")),
        PruneConfig(sparsity=0.5, score="W", modules=("gate_proj", "up_proj", "down_proj")),
    ]
    report = dsee_scale.prune(trained(), prunings)
    assert report.coverage is not None and report.coverage.covered == report.total == report.coverage.total
