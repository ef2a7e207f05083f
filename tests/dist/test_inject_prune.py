"""Injection and pruning of partitioned models against the dense path, under the real engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, Pool, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.passes.pools import block_linears
from tests.models import build, gpt2_config, llama_config, partition, token_batch, zero3_config

CONFIGS = {
    "llama": (
        llama_config,
        DSEEConfig(rank=3, num_sparse=7, target_modules=("q_proj", "v_proj", "down_proj")),
    ),
    "gpt2": (
        gpt2_config,
        DSEEConfig(rank=3, num_sparse=7, target_modules=("c_attn",), output_slices={"c_attn": ("q", "v")}),
    ),
}


def fill_adapters(model: torch.nn.Module, seed: int = 1) -> None:
    """Non-zero adapters that depend on names alone, as training would leave them."""
    for index, layer in enumerate(adapted_layers(model).values()):
        generator = torch.Generator().manual_seed(seed + index)
        for param in (layer.dsee_B, layer.dsee_values):
            value = torch.randn(param.shape, generator=generator) * 0.05
            param.data.copy_(value.to(param.dtype))


def make(family: str, dtype: torch.dtype, ds_config: dict[str, Any] | None) -> torch.nn.Module:
    """An injected model with filled adapters, partitioned if there is a DeepSpeed config."""
    config, dsee = CONFIGS[family]
    model = build(config(), dtype)
    if ds_config is not None:
        partition(model, ds_config)
    dsee_scale.inject(model, dsee)
    fill_adapters(model)
    return model


def engine_for(model: torch.nn.Module, ds_config: dict[str, Any]) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=dsee_scale.trainable_parameters(model), config=ds_config
    )
    return engine


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    module = unwrap(model)
    named = dict(module.named_parameters())
    whole = open_partition(module).gather(list(named.values()))
    return {name: value.clone() for name, value in zip(named, whole, strict=True)}


def supports(family: str, dtype: torch.dtype, ds_config: dict[str, Any] | None) -> dict[str, torch.Tensor]:
    model = make(family, dtype, ds_config)
    return {n: torch.stack([m.dsee_rows, m.dsee_cols]) for n, m in adapted_layers(model).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_supports_are_the_same_on_1_2_3_ranks_and_without_deepspeed(pools, family, dtype):
    expected = supports(family, dtype, None)
    assert expected
    for world_size in (1, 2, 3):
        for found in pools(world_size).run(supports, family, dtype, zero3_config(dtype)):
            assert found.keys() == expected.keys()
            for name in expected:
                assert torch.equal(found[name], expected[name]), (world_size, name)


def logits(family: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[str], list[str]]:
    config, dsee = CONFIGS[family]
    ds_config = zero3_config(dtype)
    model = partition(build(config(), dtype), ds_config)
    import deepspeed

    names = [n for n, _ in model.named_parameters()]
    engine, *_ = deepspeed.initialize(model=model, config=ds_config, model_parameters=model.parameters())
    with torch.no_grad():
        before = engine(token_batch()).logits
    engine.destroy()
    model = partition(build(config(), dtype), ds_config)
    dsee_scale.inject(model, dsee)
    engine = engine_for(model, ds_config)
    with torch.no_grad():
        after = engine(token_batch()).logits
    return before, after, names, [n for n, _ in model.named_parameters() if "dsee_" not in n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_injection_changes_no_output_and_no_name_under_zero3(pools, family, dtype):
    for before, after, names, names_after in pools(2).run(logits, family, dtype):
        assert torch.equal(before, after)
        assert names == names_after


def pruned_weights(
    family: str, dtype: torch.dtype, ds_config: dict[str, Any] | None, prune: PruneConfig, with_engine: bool
) -> dict[str, torch.Tensor]:
    model: Any = make(family, dtype, ds_config)
    if with_engine:
        model = engine_for(model, ds_config or {})
    report = dsee_scale.prune(model, prune)
    whole = whole_weights(model)
    zeros = sum(int((whole[f"{name}.weight"] == 0).sum()) for name in report.matrices)
    assert zeros == report.removed
    return {name: value for name, value in whole.items() if "dsee_" not in name}


PRUNINGS = {
    "W": PruneConfig(sparsity=0.5, score="W"),
    "W-matrix": PruneConfig(sparsity=0.37, scope="matrix", score="W"),
    "WABS": PruneConfig(sparsity=0.5, score="WABS"),
    "ABS-paper-pools": PruneConfig(
        score="ABS",
        pools=(
            Pool(name="adapted", select="adapted", sparsity=0.2),
            Pool(name="others", select="others", sparsity=0.4),
        ),
    ),
    "random": PruneConfig(sparsity=0.999, score="random"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("pruning", list(PRUNINGS))
def test_masks_are_the_same_on_1_2_3_ranks_and_without_deepspeed(pools, family, dtype, pruning):
    prune = PRUNINGS[pruning]
    expected = pruned_weights(family, dtype, None, prune, False)
    for world_size in (1, 2, 3):
        for found in pools(world_size).run(pruned_weights, family, dtype, zero3_config(dtype), prune, False):
            for name in expected:
                assert torch.equal(found[name], expected[name]), (world_size, name)


ENGINES = {
    "zero3": {},
    "resident": {"stage3_param_persistence_threshold": 10_000_000},
    "offload": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    "hierarchical": {"zero_hpz_partition_size": 2},
    "hierarchical, resident": {
        "zero_hpz_partition_size": 2,
        "stage3_param_persistence_threshold": 10_000_000,
    },
    "accumulation": {"gradient_accumulation_steps": 2},
}
"""Settings of `zero_optimization`, and the one of DeepSpeed's that stands beside it."""


def zero3_engine_config(dtype: torch.dtype, zero: dict[str, Any]) -> dict[str, Any]:
    config = zero3_config(dtype, **zero)
    accumulation = config["zero_optimization"].pop("gradient_accumulation_steps", 1)
    config["gradient_accumulation_steps"] = accumulation
    if "offload_optimizer" in zero:
        config["optimizer"]["params"].pop("torch_adam")
    return config


@pytest.mark.parametrize("kind", list(ENGINES))
def test_pruning_a_live_engine_equals_the_dense_path(pools, kind):
    prune = PRUNINGS["WABS"]
    expected = pruned_weights("llama", torch.bfloat16, None, prune, False)
    config = zero3_engine_config(torch.bfloat16, ENGINES[kind])
    for found in pools(2).run(pruned_weights, "llama", torch.bfloat16, config, prune, True):
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def weights_in_use(zero: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Weights on their way after a forward pass alone; then, pruned, each one's zeros as a forward pass sees them."""
    config = zero3_engine_config(torch.float32, zero)
    model = partition(build(llama_config(num_hidden_layers=6)), config)
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, target_modules=("q_proj", "v_proj")))
    engine = engine_for(model, config)
    train(engine, 3)  # until DeepSpeed has recorded the order and fetches ahead
    engine.eval()
    with torch.no_grad():
        engine(token_batch().to(engine.device))
    engine.train()
    matrices = block_linears(engine.module)
    coming = sum(layer.weight.ds_status.name == "INFLIGHT" for layer in matrices.values())
    dsee_scale.prune(engine, PruneConfig(sparsity=0.5, score="W", scope="matrix"))
    train(engine, 1)
    seen: dict[str, float] = {}
    for name, layer in matrices.items():
        layer.register_forward_pre_hook(
            lambda each, _, name=name: seen.__setitem__(name, float((each.weight == 0).float().mean()))
        )
    train(engine, 1)
    return coming, seen


@pytest.mark.parametrize("zero", [{}, {"zero_hpz_partition_size": 2}], ids=["zero3", "hierarchical"])
def test_a_weight_that_is_on_its_way_is_pruned_for_good(pools, zero):
    """An evaluation leaves fetches for a backward pass that never comes; they hold weights from before the prune."""
    ahead = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 2_000}
    for coming, seen in pools(2).run(weights_in_use, {**zero, **ahead}):
        assert coming
        assert seen and all(abs(share - 0.5) < 0.01 for share in seen.values()), seen


def train(engine: Any, steps: int) -> list[float]:
    losses = []
    for _ in range(steps * engine.gradient_accumulation_steps()):
        ids = token_batch().to(engine.device)
        loss = engine(ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def tune_prune_retune(dtype: torch.dtype, ds_config: dict[str, Any]) -> tuple[dict, dict, list[float]]:
    engine = engine_for(make("llama", dtype, ds_config), ds_config)
    before = whole_weights(engine)
    losses = train(engine, 3)
    dsee_scale.prune(engine, PruneConfig(sparsity=0.5, score="W"))
    at_prune = whole_weights(engine)
    losses += train(engine, 4)
    after = whole_weights(engine)
    for name in before:
        trained = "dsee_" in name
        assert trained != torch.equal(after[name], at_prune[name]), name
        if not trained:
            kept = at_prune[name] != 0
            assert torch.equal(at_prune[name][kept], before[name][kept]), name
    zeros = sum(int((after[n] == 0).sum()) for n in after if n.endswith("proj.weight"))
    total = sum(after[n].numel() for n in after if n.endswith("proj.weight"))
    assert zeros == round(total / 2)
    return before, after, losses


@pytest.mark.parametrize(
    "dtype, kind",
    [(torch.bfloat16, kind) for kind in ENGINES] + [(torch.float32, kind) for kind in ("zero3", "offload")],
)
def test_zeros_stay_zero_through_the_retune_and_nothing_else_changes(pools, kind, dtype):
    results = pools(2).run(tune_prune_retune, dtype, zero3_engine_config(dtype, ENGINES[kind]))
    assert results[0][2] == results[1][2]
    assert results[0][2][-1] < results[0][2][0]


def losses_after_prune(ds_config: dict[str, Any]) -> list[float]:
    engine = engine_for(make("llama", torch.float32, ds_config), ds_config)
    losses = train(engine, 2)
    dsee_scale.prune(engine, PruneConfig(sparsity=0.5, score="WABS"))
    return losses + train(engine, 2)


def check_hierarchical(pools, losses_around_a_prune) -> None:
    """Told by the losses: a gather shows the edit even when training goes on with the old weights."""
    plain = pools(2).run(losses_around_a_prune, zero3_config())
    for kind in ("hierarchical", "hierarchical, resident"):
        assert pools(2).run(losses_around_a_prune, zero3_config(**ENGINES[kind])) == plain, kind
    assert abs(plain[0][2] - plain[0][1]) > 1e-4


def test_pruning_reaches_the_secondary_shards_of_hierarchical_partitioning(pools):
    check_hierarchical(pools, losses_after_prune)


def bad_weight(rank_with_nan: int) -> str:
    model = partition(build(llama_config()), zero3_config())
    param = model.model.layers[1].self_attn.v_proj.weight
    shard = open_partition(model).shard(param)
    if torch.distributed.get_rank() == rank_with_nan:
        shard.data[0] = float("nan")
    try:
        dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7))
    except dsee_scale.TargetError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_weight_with_nan_is_named_on_every_rank(pools, rank):
    texts = pools(3).run(bad_weight, rank)
    assert len(set(texts)) == 1
    assert "model.layers.1.self_attn.v_proj.weight" in texts[0]


def bad_weight_in_prune() -> tuple[str, int]:
    model = make("llama", torch.float32, zero3_config())
    shard = open_partition(model).shard(model.model.layers[1].mlp.up_proj.weight)
    if torch.distributed.get_rank() == 1:
        shard.data[3] = float("inf")
    try:
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="W"))
    except dsee_scale.TargetError as error:
        zeros = sum(
            int((open_partition(model).shard(p).data == 0).sum()) for n, p in model.named_parameters()
        )
        return str(error), zeros
    return "no error", 0


def test_pruning_a_weight_with_infinity_names_it_and_removes_nothing(pools):
    for text, zeros in pools(2).run(bad_weight_in_prune):
        assert "model.layers.1.mlp.up_proj.weight" in text
        assert zeros == 0


def inject_into_engine() -> str:
    ds_config = zero3_config()
    engine = engine_for(make("llama", torch.float32, ds_config), ds_config)
    with pytest.raises(dsee_scale.TargetError) as caught:
        dsee_scale.inject(engine, DSEEConfig())
    return str(caught.value)


def test_injecting_into_an_engine_is_refused(pools):
    assert all("before" in text and "initialize" in text for text in pools(2).run(inject_into_engine))
