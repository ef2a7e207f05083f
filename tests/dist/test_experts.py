"""Experts of partitioned mixtures of experts against the dense path, under the real engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.checkpoint.adapter import load_adapter, save_adapter
from dsee_scale.export.export import export_model
from dsee_scale.partition import open_partition
from tests.dist.test_inject_prune import engine_for, fill_adapters, train, whole_weights
from tests.models import build, llama_config, moe_config, partition, token_batch, zero3_config

ATTENTION = {"deepseek_v3": ("o_proj", "kv_b_proj"), "gpt_oss": ("q_proj", "v_proj")}


def make(model_type: str, ds_config: dict[str, Any] | None) -> Any:
    """A mixture of experts with adapted attention, under an engine if there is a DeepSpeed config."""
    model = build(moe_config(model_type))
    if ds_config is not None:
        partition(model, ds_config)
    targets = ATTENTION.get(model_type, ("q_proj", "o_proj"))
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7, target_modules=targets))
    fill_adapters(model)
    return model if ds_config is None else engine_for(model, ds_config)


WITHIN = (
    PruneConfig(sparsity=0.3, scope="global", score="WABS"),
    PruneConfig(sparsity=0.4, scope="row", score="W", modules=("*.experts.*",)),
    PruneConfig(sparsity=0.5, scope="matrix", score="random", modules=("*.experts.*",)),
    PruneConfig(pattern="neurons", num_per_layer=4, refit=False),
    PruneConfig(pattern="2:4", score="W", modules=("*.experts.*",)),
    PruneConfig(sparsity=0.6, refit=False, modules=("*.experts.*",)),
    PruneConfig(pattern="experts", num_per_layer=1),
    PruneConfig(pattern="experts", sparsity=0.4, scope="global", score="frequency"),
)
BATCHES = [token_batch(batch=2, length=24, seed=seed) for seed in range(6)]


def pruned_within(model_type: str, ds_config: dict[str, Any] | None) -> Any:
    model = make(model_type, ds_config)
    mine = BATCHES[dist.get_rank() :: dist.get_world_size()] if ds_config is not None else BATCHES
    found = []
    for config in WITHIN:
        report = dsee_scale.prune(model, config, mine)
        found.append((whole_weights(model), report.matrices | report.units))
    return found


def retuned(folder: str, model_type: str) -> list[torch.Tensor]:
    """Remove experts under ZeRO-3, retune, save and export; logits of the live engine, and after loading again."""
    engine = make(model_type, zero3_config())
    train(engine, 1)
    dsee_scale.prune(engine, PruneConfig(pattern="experts", num_per_layer=2), BATCHES)
    dsee_scale.prune(engine, PruneConfig(sparsity=0.3, score="W", modules=("*.experts.*",)))
    train(engine, 2)
    save_adapter(engine, f"{folder}/adapter")
    export_model(engine, f"{folder}/model")
    again = partition(build(moe_config(model_type)), zero3_config())
    load_adapter(again, f"{folder}/adapter")
    found = []
    for each in (engine, engine_for(again, zero3_config())):
        each.eval()
        with torch.no_grad():
            found.append(each(BATCHES[0]).logits.clone())
    return found


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_a_model_retuned_without_some_experts_is_exported_as_a_stock_model(pools, tmp_path, model_type):
    everyone = pools(2).run(retuned, str(tmp_path), model_type)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        found = stock(BATCHES[0]).logits
    for logits in everyone:
        for expected in logits:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_are_pruned_the_same_on_1_2_3_ranks_and_without_deepspeed(pools, model_type):
    expected = pruned_within(model_type, None)
    for world_size in (1, 2, 3):
        for found in pools(world_size).run(pruned_within, model_type, zero3_config()):
            for (weights, counts), (expected_weights, expected_counts) in zip(found, expected, strict=True):
                assert counts == expected_counts, world_size
                for name, weight in expected_weights.items():
                    assert torch.equal(weights[name], weight), (world_size, name)


def without_neurons(model_type: str, ds_config: dict[str, Any] | None) -> Any:
    model = make(model_type, ds_config)
    mine = BATCHES[dist.get_rank() :: dist.get_world_size()] if ds_config is not None else BATCHES
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=4), mine)
    return whole_weights(model)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_without_some_neurons_are_refitted_alike_on_1_2_3_ranks(pools, model_type):
    """What is solved differs by the rounding of sums over ranks alone."""
    expected = without_neurons(model_type, None)
    for world_size in (1, 2, 3):
        for found in pools(world_size).run(without_neurons, model_type, zero3_config()):
            for name, weight in expected.items():
                assert torch.equal(found[name] == 0, weight == 0), (world_size, name)
                torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


class Chosen(torch.nn.Module):
    """Experts that are modules of their own, of which a caller chooses one."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return self.experts[which](x)


class WithModules(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.block = torch.nn.Linear(8, 8), Chosen()

    def forward(self, x: torch.Tensor, which: int) -> torch.Tensor:
        return self.block(self.first(x), which).square().mean()


def each_rank_its_own_expert() -> list[float]:
    model = partition(WithModules(), zero3_config())
    targets = ("first", "experts.0", "experts.1")
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, target_modules=targets))
    engine = engine_for(model, zero3_config())
    losses = []
    for _ in range(3):
        loss = engine(torch.ones(2, 8), dist.get_rank() % 2)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def one_token_over_and_over(checkpointing: bool) -> tuple[list[float], int]:
    """Rank 0's batch is one token: most experts get nothing there. Losses, and how many experts were used."""
    model = build(moe_config("qwen3_moe"))
    partition(model, zero3_config())
    if checkpointing:
        model.gradient_checkpointing_enable()
    targets = ("q_proj", "gate_up_proj", "down_proj")
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=5, target_modules=targets))
    engine: Any = engine_for(model, zero3_config())
    used: set[int] = set()
    experts = engine.module.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: used.update(args[1].unique().tolist()))
    ids = torch.full((2, 1), 5) if dist.get_rank() == 0 else BATCHES[1]
    losses = []
    for _ in range(3):
        loss = engine(ids.repeat(1, 2), labels=ids.repeat(1, 2)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses, len(used)


def test_ranks_whose_tokens_avoid_an_expert_wait_for_nobody(pools):
    for losses in pools(2).run(each_rank_its_own_expert):
        assert losses[-1] < losses[0]
    found = [pools(2).run(one_token_over_and_over, on) for on in (False, True)]
    for (plain, used), (checkpointed, _) in zip(*found, strict=True):
        assert plain[-1] < plain[0] and used >= 2
        torch.testing.assert_close(torch.tensor(checkpointed), torch.tensor(plain), rtol=1e-5, atol=1e-6)
    assert found[0][0][1] < 5, "rank 0 uses every expert, so the test shows nothing"


def refused_on(rank: int) -> list[str]:
    """What bad inputs say on one rank, while the other one does nothing at all."""
    mixture = partition(build(moe_config("qwen3_moe")), zero3_config())
    plain = partition(build(llama_config()), zero3_config())
    if dist.get_rank() != rank:
        return []
    shards = [open_partition(each).shard(p).data for each in (mixture, plain) for p in each.parameters()]
    before = [shard.clone() for shard in shards]
    whole, adapter = dict(pattern="experts", score="random"), dict(rank=2, num_sparse=3)
    bad: list[Callable[[], Any]] = [
        lambda: dsee_scale.prune(mixture, PruneConfig(num_per_layer=3, **whole)),
        lambda: dsee_scale.prune(mixture, PruneConfig(sparsity=0.8, scope="global", **whole)),
        lambda: dsee_scale.prune(plain, PruneConfig(num_per_layer=1, **whole)),
        lambda: dsee_scale.inject(mixture, DSEEConfig(target_modules=("q_proj", "mlp.gate"), **adapter)),
        lambda: dsee_scale.inject(plain, DSEEConfig(target_modules=("q_proj", "experts"), **adapter)),
    ]
    found = []
    for call in bad:
        with pytest.raises(dsee_scale.DSEEError) as caught:
            call()
        found.append(str(caught.value))
    assert all(map(torch.equal, shards, before))
    return found


def test_bad_inputs_are_the_same_error_on_every_rank_without_waiting_for_the_others(pools):
    texts = [pools(2).run(refused_on, rank)[rank] for rank in range(2)]
    assert texts[0] == texts[1]
    patterns = (
        r"removes 3 of 5 experts of model.layers.0 .* at least 3, one more than the 2 that each token",
        r"sparsity 0.8 removes 8 of 10 units, but with at least 3 experts in every layer only 4 can go",
        r"LlamaForCausalLM has no experts, .* choose 'heads' or 'neurons'",
        r"target model.layers.0.mlp.gate is a router .* adapt the experts",
        r"target module 'experts' matches no module",
    )
    for text, pattern in zip(texts[0], patterns, strict=True):
        assert re.search(pattern, text), text
