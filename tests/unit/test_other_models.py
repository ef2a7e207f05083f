"""Layers, parts of models and states that look like what a pass expects and aren't: refused, or done right."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.falcon.modeling_falcon import FalconLinear

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.errors import ConfigError, FormatError, TargetError
from tests.models import build, llama_config, token_batch

CONFIG = DSEEConfig(rank=2, num_sparse=5, target_modules=("q_proj", "down_proj"), support="magnitude")
BY_MAGNITUDE = PruneConfig(score="W")


class Scaled(nn.Linear):
    """One with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def with_layers(kind: type[nn.Linear], config: DSEEConfig | None = CONFIG) -> nn.Module:
    """A Llama whose q_proj are of that kind; adapted where there is a config."""
    model = build(llama_config())
    for block in model.model.layers:
        block.self_attn.q_proj.__class__ = kind
    if config is not None:
        dsee_scale.inject(model, config)
    return model


def set_adapters(model: nn.Module, size: float = 0.05) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in dsee_scale.trainable_parameters(model):
            param.copy_(size * torch.randn(param.shape, generator=generator))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(token_batch()).logits


@pytest.mark.parametrize("adapted", [True, False])
def test_a_layer_with_a_forward_of_its_own_is_not_taken_for_a_product(adapted):
    model = with_layers(Scaled, CONFIG if adapted else None)
    weights = {name: param.clone() for name, param in model.named_parameters()}
    batches = [{"input_ids": token_batch()}]
    wrong = [PruneConfig(refit=True), *([BY_MAGNITUDE] if adapted else [])]
    for config in wrong:
        with pytest.raises(TargetError, match=r"q_proj is a Scaled, whose forward is its own.*refit=False"):
            dsee_scale.prune(model, config, batches if config.refit else None)
    assert all(torch.equal(param, weights[name]) for name, param in model.named_parameters())
    if adapted:
        set_adapters(model)
    before = logits(model)
    dsee_scale.prune(model, PruneConfig(score="W", sparsity=0.0, mask_update=False))
    torch.testing.assert_close(logits(model), before)


def test_a_class_that_computes_the_product_otherwise_is_trained_under_its_mask():
    model = set_adapters(with_layers(FalconLinear))
    before = logits(model)
    dsee_scale.prune(model, PruneConfig(score="W", sparsity=0.0))
    torch.testing.assert_close(logits(model), before)
    assert "under mask" in repr(model)


def test_a_refit_within_inference_mode_is_refused():
    model = build(llama_config())
    with (
        torch.inference_mode(),
        pytest.raises(ConfigError, match=r"inference_mode rules out; call prune outside"),
    ):
        dsee_scale.prune(model, PruneConfig(), [{"input_ids": token_batch()}])
    assert all(param.all() for name, param in model.named_parameters() if name.endswith("proj.weight"))


def test_a_weight_that_is_computed_is_refused():
    model = build(llama_config())
    parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(
        TargetError, match=r"weight of model.layers.0.self_attn.q_proj is computed at each use"
    ):
        dsee_scale.inject(model, CONFIG)
    model = build(llama_config())
    dsee_scale.inject(model, CONFIG)
    parametrizations.weight_norm(model.model.layers[0].self_attn.q_proj)
    with pytest.raises(
        TargetError, match=r"weight of model.layers.0.self_attn.q_proj is computed at each use"
    ):
        dsee_scale.prune(model, PruneConfig(score="W", modules=("q_proj",)))


def test_a_weight_that_someone_thaws_under_its_mask_is_named():
    model = build(llama_config())
    dsee_scale.inject(model, CONFIG)
    dsee_scale.prune(model, BY_MAGNITUDE)
    model.requires_grad_(True)
    with pytest.raises(TargetError, match="its weight is trained as well"):
        logits(model)


def test_adapters_after_a_pruning_are_trained_under_its_mask(tmp_path):
    model = build(llama_config())
    dsee_scale.prune(model, BY_MAGNITUDE)
    dsee_scale.inject(model, CONFIG)
    set_adapters(model)
    dsee_scale.export_model(model, tmp_path / "masked")
    stock = type(model).from_pretrained(tmp_path / "masked")
    torch.testing.assert_close(logits(stock), logits(model))


@pytest.mark.parametrize("part_first", [True, False])
def test_a_part_of_a_model_is_not_taken_for_it(tmp_path, part_first):
    model = build(llama_config())
    injected, other = (model.model, model) if part_first else (model, model.model)
    dsee_scale.inject(injected, CONFIG)
    weights = {name: param.clone() for name, param in model.named_parameters()}
    where = "its part 'model'" if part_first else "a model that this is a part of"
    for call in (
        lambda: dsee_scale.prune(other, BY_MAGNITUDE),
        lambda: dsee_scale.prune(other, PruneConfig(), [{"input_ids": token_batch()}]),
        lambda: dsee_scale.save_adapter(other, tmp_path / "adapter"),
        lambda: save_training_state(other, tmp_path / "state"),
        lambda: dsee_scale.export_model(other, tmp_path / "model"),
    ):
        with pytest.raises(TargetError, match=f"inject was called on {where}"):
            call()
    assert not any(tmp_path.iterdir())
    assert all(torch.equal(param, weights[name]) for name, param in model.named_parameters())


@pytest.mark.parametrize("pruned_before", [True, False])
def test_zeros_are_not_taken_back(tmp_path, pruned_before):
    model = build(llama_config())
    dsee_scale.inject(model, CONFIG)
    if pruned_before:
        dsee_scale.prune(model, PruneConfig(score="W", sparsity=0.3))
    set_adapters(model)
    save_training_state(model, tmp_path / "state")
    load_training_state(model, tmp_path / "state")
    dsee_scale.prune(model, PruneConfig(score="W", sparsity=0.5))
    now = set_adapters(model, 0.1).state_dict()
    before = {name: value.clone() for name, value in now.items()}
    with pytest.raises(FormatError, match=r"weight was pruned after this state was saved"):
        load_training_state(model, tmp_path / "state")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
