"""Float32 master weights without DeepSpeed, against an optimizer of float32 parameters."""

from __future__ import annotations

import warnings

import bitsandbytes.optim
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from transformers import Trainer, TrainingArguments

import dsee_scale
from dsee_scale import DSEECallback, DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.errors import ConfigError
from dsee_scale.partition.master_weights import MasterWeights
from tests.models import build, llama_config, token_batch


def gradients(step: int) -> torch.Tensor:
    return torch.randn(40, generator=torch.Generator().manual_seed(step)).bfloat16()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, bitsandbytes.optim.AdamW])
def test_small_steps_add_up_as_in_float32(cls):
    weight, wide = nn.Parameter(torch.ones(40, dtype=torch.bfloat16)), nn.Parameter(torch.ones(40))
    optimizer, reference = cls([weight], lr=1e-4), cls([wide], lr=1e-4)
    dsee_scale.keep_masters(optimizer)
    dsee_scale.keep_masters(reference)
    assert isinstance(optimizer, cls) and type(reference) is cls
    for step in range(50):
        weight.grad, wide.grad = gradients(step), gradients(step).float()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
        assert weight.grad is None
    assert torch.equal(optimizer.masters[weight], wide) and (wide != 1).all()
    assert torch.equal(weight, wide.bfloat16())


def test_what_others_set_between_steps_counts():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    dsee_scale.keep_masters(optimizer)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.tolist() == [1.0] * 4  # the step alone is too small for bfloat16
    weight.data[:2] = 0
    optimizer.step()
    assert optimizer.masters[weight].tolist() == pytest.approx([-1e-3, -1e-3, 1 - 2e-3, 1 - 2e-3], abs=1e-6)


def adapted() -> nn.Module:
    model = build(llama_config(), torch.bfloat16)
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, trained_modules=("*norm",)))
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-4)
    dsee_scale.keep_masters(optimizer)
    return optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = token_batch(seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_masters_travel_in_training_states(tmp_path):
    there = adapted()
    before = optimizer_of(there)
    train(there, before, range(3))
    save_training_state(there, tmp_path / "state", optimizer=before)
    train(there, before, range(3, 6))
    here = build(llama_config(), torch.bfloat16)
    dsee_scale.load_adapter(here, tmp_path / "state")
    after = optimizer_of(here)
    load_training_state(here, tmp_path / "state", optimizer=after)
    train(here, after, range(3, 6))
    for one, other in zip(before.masters.values(), after.masters.values(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(there.parameters(), here.parameters(), strict=True):
        assert torch.equal(one, other)


def test_after_a_refit_the_masters_of_s2_start_at_zero_too(tmp_path):
    model = adapted()
    optimizer = optimizer_of(model)
    train(model, optimizer, range(2))
    layer = model.model.layers[0].self_attn.q_proj
    assert optimizer.masters[layer.dsee_flat][-4:].any()
    dsee_scale.prune(model, PruneConfig(sparsity=0.5), [{"input_ids": token_batch(seed=9)}])
    save_training_state(model, tmp_path / "state", optimizer=optimizer)
    assert not layer.dsee_values.any() and not optimizer.masters[layer.dsee_flat][-4:].any()


def test_a_trainer_with_the_callback_moves_norms_in_bfloat16(tmp_path):
    model = adapted()
    rows = Dataset.from_list([{"input_ids": token_batch(seed=i)[0].tolist()} for i in range(8)])
    rows = rows.map(lambda row: {"labels": row["input_ids"]})
    args = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=1e-4, bf16=True, use_cpu=True, report_to="none",
        per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[DSEECallback()])
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, MasterWeights)
    norms = [
        master for param, master in optimizer.masters.items() if param.dim() == 1 and (param > 0.5).all()
    ]
    assert norms and all((norm != 1).any() for norm in norms)


def test_gradients_in_float16_that_would_be_scaled_are_refused():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(4, dtype=torch.float16))])
    with pytest.raises(
        ConfigError, match=r"fp16 without DeepSpeed .* torch.float16; load the model in float32"
    ):
        dsee_scale.keep_masters(optimizer, scaled=True)


def test_an_optimizer_in_use_is_refused():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(ConfigError, match=r"AdamW has made a step with parameters in torch.bfloat16"):
        dsee_scale.keep_masters(optimizer)


def test_a_scheduler_that_was_there_before_steps_the_masters():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    dsee_scale.keep_masters(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            scheduler.step()
    assert optimizer.masters[weight].tolist() == pytest.approx([1 - 3e-3] * 4)


def test_a_replaced_step_is_refused():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1e-3)
    optimizer.step = lambda closure=None: None
    with pytest.raises(ConfigError, match=r"SGD\.step was replaced"):
        dsee_scale.keep_masters(optimizer)


def test_accelerates_wrapper_is_looked_through():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    inner = torch.optim.SGD([weight], lr=1e-3)
    wrapped = Accelerator(cpu=True).prepare_optimizer(inner)
    dsee_scale.keep_masters(wrapped)
    assert isinstance(inner, MasterWeights) and not isinstance(wrapped, MasterWeights)


@pytest.mark.parametrize("pattern", ["heads", "neurons"])
def test_moments_of_removed_units_are_forgotten_by_masters_too(pattern):
    model = build(llama_config(hidden_size=40, num_key_value_heads=5), torch.bfloat16)
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=8, target_modules=("q_proj", "v_proj", "up_proj")))
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4))
    dsee_scale.prune(model, PruneConfig(pattern=pattern, num_per_layer=2, score="W", refit=False))
    zeroed = {name: layer.dsee_flat == 0 for name, layer in adapted_layers(model).items()}
    assert any(lines.any() for lines in zeroed.values())
    train(model, optimizer, range(4, 8))
    for name, layer in adapted_layers(model).items():
        assert not layer.dsee_flat[zeroed[name]].any(), name
