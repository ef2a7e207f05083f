"""Models and arguments that a user may well pass, and that would give wrong results without a word."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from accelerate.utils import compile_regions
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.checkpoint.training_state import save_training_state
from dsee_scale.errors import ConfigError, FormatError, TargetError
from dsee_scale.export.lora import export_lora
from dsee_scale.recipe.sections import ModelConfig
from dsee_scale.training.setup import load_model
from tests.models import build, llama_config, token_batch
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


def compile_each(layers: torch.nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer, backend="eager")


def checkpoint_each(layers: torch.nn.ModuleList) -> None:
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)


WRAPPED = {
    compile_each: r"model\.layers\.0 is wrapped by torch\.compile.*_orig_mod.*\.compile\(\)",
    checkpoint_each: r"model\.layers\.0 is wrapped by torch's CheckpointWrapper.*gradient_checkpointing_enable\(\)",
}


@pytest.mark.parametrize(("wrap", "message"), WRAPPED.items())
def test_a_model_with_wrappers_inside_is_refused_before_anything_changes(tmp_path, wrap, message):
    adapted, base = trained(), build(llama_config())
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(adapted))
    dsee_scale.save_adapter(trained(), tmp_path / "saved")
    wrap(adapted.model.layers)
    wrap(base.model.layers)
    before = [{n: p.clone() for n, p in model.named_parameters()} for model in (adapted, base)]
    calls = [
        lambda: dsee_scale.inject(base, DSEEConfig(rank=3)),
        lambda: dsee_scale.load_adapter(base, tmp_path / "saved"),
        lambda: dsee_scale.prune(adapted, NO_REFIT),
        lambda: dsee_scale.prune(adapted, PruneConfig(), [{"input_ids": token_batch()}]),
        lambda: dsee_scale.calibrate(adapted, [{"input_ids": token_batch()}]),
        lambda: dsee_scale.save_adapter(adapted, tmp_path / "out"),
        lambda: save_training_state(adapted, tmp_path / "out", optimizer=optimizer),
        lambda: dsee_scale.export_model(adapted, tmp_path / "out"),
        lambda: export_lora(adapted, tmp_path / "out", base="the/base"),
    ]
    for call in calls:
        with pytest.raises(TargetError, match=message):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    for model, values in zip((adapted, base), before, strict=True):
        assert {n for n, _ in model.named_parameters()} == values.keys()
        assert all(torch.equal(param, values[name]) for name, param in model.named_parameters())


def test_a_wrapper_around_the_whole_model_is_refused_if_it_is_no_compilers(tmp_path):
    with pytest.raises(TargetError, match="the model is wrapped by torch's CheckpointWrapper"):
        dsee_scale.save_adapter(checkpoint_wrapper(trained()), tmp_path / "out")


@pytest.mark.parametrize("compiled", [lambda model: torch.compile(model, backend="eager"), compile_regions])
def test_a_compiled_model_whose_own_modules_are_unwrapped_is_saved(tmp_path, compiled):
    """accelerate compiles the layers of a copy, and leaves the model as it was."""
    dsee_scale.save_adapter(compiled(trained()), tmp_path / "out")
    record = dsee_scale.load_adapter(build(llama_config()), tmp_path / "out")
    assert not any("_orig_mod" in name for name in record.modules)


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
