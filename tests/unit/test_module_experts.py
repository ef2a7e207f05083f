"""Experts that are modules, as models of remote code have them: only some of a batch's tokens reach each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.partition import open_partition
from dsee_scale.passes.blocks import find_blocks
from dsee_scale.passes.pools import block_linears
from dsee_scale.passes.sensitivity import Sensitivity, output_gradients
from tests.models import build, llama_config
from tests.unit.test_sensitivity import labelled

pytestmark = pytest.mark.unit
EXPERTS, CHOSEN = 4, 2


class Mixture(nn.Module):
    """As Mixtral's own code before transformers 5."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, EXPERTS, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(EXPERTS))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.reshape(-1, hidden.shape[-1])
        gates, chosen = self.gate(x).softmax(-1).topk(CHOSEN, -1)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            at, rank = (chosen == number).nonzero(as_tuple=True)
            if len(at):
                total = total.index_add(0, at, expert(x[at]) * gates[at, rank, None])
        return total.view_as(hidden)


def mixture() -> nn.Module:
    model = build(llama_config(num_hidden_layers=3, tie_word_embeddings=False))
    for layer in model.model.layers:
        layer.mlp = Mixture(model.config)
    for param in model.parameters():
        if param.dim() == 2:
            nn.init.normal_(param, std=0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize("scale", [0.02, 50.0])
def test_under_one_threshold_an_expert_without_tokens_loses_the_same_share(scale):
    """However large the inputs are, by which what others lose is multiplied."""
    model = mixture()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            nn.init.constant_(norm.weight, scale)
    batches = [{"input_ids": torch.randint(0, 97, (1, 2), generator=torch.Generator().manual_seed(0))}]
    report = dsee_scale.prune(model, PruneConfig(refit=False, scope="global"), batches)
    assert report.by_magnitude
    for name in report.by_magnitude:
        gone, numel = report.matrices[name]
        assert gone == round(numel / 2), name
    assert report.removed == round(report.total / 2)


CONFIGS = {
    "loss": PruneConfig(sparsity=0.5),
    "2:4": PruneConfig(pattern="2:4", modules=("*gate_proj", "*attn*")),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
@pytest.mark.parametrize("tokens", [12, 2])
def test_a_re_fit_goes_through_all_blocks_although_pruning_changes_the_routes(config, tokens):
    """Of two tokens both may reach an expert, and fewer of them once earlier layers are pruned."""
    model = mixture()
    ids = torch.randint(0, 97, (1, tokens), generator=torch.Generator().manual_seed(0))
    reached = dsee_scale.calibrate(model, [{"input_ids": ids}]).tokens
    report = dsee_scale.prune(model, config, [{"input_ids": ids}])
    first = {name for name in report.matrices if ".layers.0." in name}
    assert first & {*report.by_magnitude} == {name for name in first if not reached[name]}
    assert (tokens == 12) == (not first & {*report.by_magnitude})
    assert any(".2.mlp.experts.1." in name for name in report.matrices)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)


def measured(model: nn.Module, only: str) -> Sensitivity:
    """Of the layers whose names hold this."""
    layers = {name: layer for name, layer in block_linears(model).items() if only in name}
    widths = {name: len(layer.weight) for name, layer in layers.items()}
    blocks = find_blocks(model, list(layers))
    return output_gradients(model, layers, widths, blocks, labelled(), open_partition(model))


def test_tokens_count_at_layers_that_all_of_them_reach_and_means_go_over_all():
    model = mixture()
    whole, experts = measured(model, "layers"), measured(model, ".experts.")
    assert whole.tokens.keys() == {name for name in whole.outputs if ".experts." not in name}
    assert experts.outputs and not experts.tokens
    for name, value in experts.outputs.items():
        torch.testing.assert_close(value, whole.outputs[name])
