"""What a pruning means by "the weights": no trained, tied or twice counted one, and not a small part unsaid."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig

import dsee_scale
from dsee_scale import ConfigError, DSEEConfig, Pool, PruneConfig, TargetError
from dsee_scale.config import paper_pools
from tests.models import build, gpt2_config, llama_config, token_batch

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MIXTRAL = MixtralConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=4,
    use_cache=False,
)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def unchanged(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], new) for name, new in weights(model).items())


def test_a_module_that_is_trained_in_full_is_refused_on_the_raw_model():
    model = build(llama_config())
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7, trained_modules=("o_proj",)))
    before = weights(model)
    with pytest.raises(TargetError, match=r"o_proj\.weight is being trained.*trained_modules"):
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    assert unchanged(model, before)
    others = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    dsee_scale.prune(model, PruneConfig(sparsity=0.5, modules=others, score="W"))


def test_a_module_that_is_trained_in_full_is_refused_on_accelerates_model_in_one_process():
    from accelerate import Accelerator

    model = build(llama_config())
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7, trained_modules=("o_proj",)))
    trained = [param for param in model.parameters() if param.requires_grad]
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained))
    ids = token_batch()
    accelerator.backward(prepared(ids, labels=ids).loss)
    optimizer.step()
    optimizer.zero_grad()
    before = weights(model)
    with pytest.raises(TargetError, match=r"o_proj\.weight is being trained"):
        dsee_scale.prune(prepared, PruneConfig(sparsity=0.5, score="W"))
    assert unchanged(model, before)


def test_a_model_without_adapters_that_somebody_trains_is_refused():
    model = build(llama_config())
    ids = token_batch()
    model(ids, labels=ids).loss.backward()
    with pytest.raises(TargetError, match="is being trained"):
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    model.zero_grad()
    assert dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W")).sparsity == pytest.approx(
        0.5, abs=1e-4
    )


def test_injection_says_which_matrices_of_the_blocks_it_cannot_reach():
    model = build(MIXTRAL)
    for layer in model.model.layers:
        del layer.mlp.experts.is_transposed  # as in a model whose experts are laid out in a way of its own
    report = dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7))
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert report.coverage.covered == 2 * (32 * 32 + 16 * 32)
    assert sum(report.coverage.missed.values()) >= experts > 0.8 * report.coverage.total
    assert "in no linear layer: model.layers.*.mlp.experts.gate_up_proj (" in str(report)


def test_pruning_a_small_part_of_the_blocks_has_to_be_said():
    model = build(MIXTRAL)
    for layer in model.model.layers:
        del layer.mlp.experts.is_transposed  # as in a model whose experts are laid out in a way of its own
    before = weights(model)
    paper = paper_pools(0.2, 0.4)
    for config in (PruneConfig(sparsity=0.5, score="W"), PruneConfig(pattern="2:4", score="W")):
        with pytest.raises(TargetError, match=r"experts\.gate_up_proj.*set modules=\['k_proj', 'o_proj'"):
            dsee_scale.prune(model, config)
    assert unchanged(model, before)
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7))
    with pytest.raises(TargetError, match=r"experts"):
        dsee_scale.prune(model, PruneConfig(pools=paper, score="W"))
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.5, modules=ATTENTION, score="W"))
    assert report.coverage is not None and report.coverage.covered == report.total
    assert "experts" in str(report)
    pool = Pool(name="attention", sparsity=0.6, modules=ATTENTION)
    dsee_scale.prune(model, PruneConfig(pools=(pool,), score="W"))


@pytest.mark.parametrize("config", [llama_config, gpt2_config])
def test_dense_decoders_are_covered_whole(config):
    report = dsee_scale.prune(build(config()), PruneConfig(sparsity=0.5, score="W"))
    assert report.coverage is not None
    assert report.coverage.share == 1 and not report.coverage.missed


def test_a_head_tied_to_the_embedding_is_refused():
    model = build(llama_config())
    before = weights(model)
    with pytest.raises(
        TargetError, match=r"lm_head\.weight is also model\.embed_tokens\.weight, of a \w*Embedding"
    ):
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, modules=("lm_head",), score="W"))
    assert unchanged(model, before)
    untied = build(llama_config(tie_word_embeddings=False))
    assert (
        dsee_scale.prune(untied, PruneConfig(sparsity=0.5, modules=("lm_head",), score="W")).total == 97 * 40
    )


@pytest.mark.parametrize("scope", ["global", "matrix"])
def test_a_weight_that_two_layers_share_counts_once(scope):
    model = build(llama_config())
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    report = dsee_scale.prune(model, PruneConfig(sparsity=0.5, scope=scope, score="W"))
    linears = {id(p): p for n, p in model.named_parameters() if n.endswith("proj.weight")}
    assert report.total == sum(p.numel() for p in linears.values())
    assert report.removed == sum(int((p == 0).sum()) for p in linears.values())
    assert report.sparsity == pytest.approx(0.5, abs=1e-4)
    pool = Pool(name="second", sparsity=0.5, modules=("layers.1.mlp.up_proj",))
    with pytest.raises(ConfigError, match="matches no weight"):
        dsee_scale.prune(model, PruneConfig(pools=(pool,), score="W"))
