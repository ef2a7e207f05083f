"""N:M, heads and neurons of partitioned models against the dense path, under the real engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PartitionError, PruneConfig
from dsee_scale.adapters.linear import adapted_layers, is_adapted
from dsee_scale.adapters.removed_units import removed_units
from dsee_scale.adapters.units import find_units
from dsee_scale.algorithms.patterns import groups_hold
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.partition.engine_state import open_optimizer
from tests.dist.test_inject_prune import (
    ENGINES,
    check_hierarchical,
    engine_for,
    fill_adapters,
    train,
    whole_weights,
    zero3_engine_config,
)
from tests.models import build, gpt2_config, llama_config, partition, token_batch, zero3_config


def sized_llama(**changes: Any) -> Any:
    """Shards of two ranks cut groups of 4 in gate and up, those of three ranks in every weight."""
    sizes = dict(
        hidden_size=44, num_attention_heads=4, num_key_value_heads=2, head_dim=10, intermediate_size=49
    )
    return llama_config(**{**sizes, **changes})


BUT_DOWN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
"""49 inputs are in no groups of 4."""
BUT_DOWN_WEIGHTS = tuple(f"{module}.weight" for module in BUT_DOWN)

CONFIGS = {
    "llama": (
        sized_llama,
        DSEEConfig(rank=3, num_sparse=40, target_modules=("q_proj", "v_proj", "o_proj", "up_proj")),
    ),
    "gpt2": (
        gpt2_config,
        DSEEConfig(
            rank=3,
            num_sparse=40,
            target_modules=("c_attn", "attn.c_proj", "c_fc"),
            output_slices={"c_attn": ("q", "v")},
        ),
    ),
}

FOR_EIGHTS = {"llama of 40": (lambda: sized_llama(hidden_size=40), CONFIGS["llama"][1])}
"""Shards of two and three ranks cut groups of 8."""


def make(family: str, dtype: torch.dtype, ds_config: dict[str, Any] | None) -> torch.nn.Module:
    config, dsee = (CONFIGS | FOR_EIGHTS)[family]
    model = build(config(), dtype)
    if ds_config is not None:
        partition(model, ds_config)
    dsee_scale.inject(model, dsee)
    fill_adapters(model)
    return model


def pruned(
    family: str,
    dtype: torch.dtype,
    ds_config: dict[str, Any] | None,
    prunings: tuple[PruneConfig, ...],
    with_engine: bool = False,
) -> tuple[dict[str, torch.Tensor], list[dict[str, tuple[int, int]]]]:
    model: Any = make(family, dtype, ds_config)
    if with_engine:
        model = engine_for(model, ds_config or {})
    reports = [dsee_scale.prune(model, config) for config in prunings]
    return whole_weights(model), [report.matrices | report.units for report in reports]


def check_same_everywhere(
    pools: Any, family: str, dtype: torch.dtype, prunings: tuple[PruneConfig, ...]
) -> dict[str, torch.Tensor]:
    expected, counts = pruned(family, dtype, None, prunings)
    for world_size in (1, 2, 3):
        for found, found_counts in pools(world_size).run(
            pruned, family, dtype, zero3_config(dtype), prunings
        ):
            assert found_counts == counts, world_size
            assert found.keys() == expected.keys()
            for name in expected:
                assert torch.equal(found[name], expected[name]), (world_size, name)
    return expected


# Every score in both dtypes for one pattern; how groups are cut depends on neither, so two cases do for the others.
SCORES = [
    ("llama", "2:4", score, dtype)
    for score in ("W", "WABS", "NABS", "random")
    for dtype in (torch.float32, torch.bfloat16)
]
GROUPS = [
    (*case, *score)
    for case in (("llama", "1:2"), ("llama of 40", "4:8"), ("gpt2", "2:4"), ("gpt2", "5:9"))
    for score in (("WABS", torch.float32), ("random", torch.bfloat16))
]


@pytest.mark.parametrize("family, pattern, score, dtype", SCORES + GROUPS)
def test_n_of_m_is_the_same_on_1_2_3_ranks_and_without_deepspeed(pools, family, pattern, score, dtype):
    llama = family != "gpt2"
    prune = PruneConfig(pattern=pattern, score=score, modules=BUT_DOWN if llama else ())
    weights = check_same_everywhere(pools, family, dtype, (prune,))
    n, m = map(int, pattern.split(":"))
    checked = 0
    for name, weight in weights.items():
        if name.endswith((*BUT_DOWN_WEIGHTS, "c_attn.weight", "c_proj.weight", "c_fc.weight")):
            zeros = int((weight == 0).sum())
            assert groups_hold(weight, n, m, transposed=not llama)
            assert zeros == weight.numel() * (m - n) // m, name
            checked += 1
    assert checked == (12 if llama else 8)


def test_the_sizes_in_these_tests_do_cut_groups(pools):
    for family, size in (("llama", 4), ("llama of 40", 8)):
        assert any(pools(2).run(cuts_groups, family, size)) and any(pools(3).run(cuts_groups, family, size))


def cuts_groups(family: str, size: int) -> bool:
    model = make(family, torch.float32, zero3_config())
    port = open_partition(model)
    shards = [port.shard(p) for n, p in model.named_parameters() if n.endswith(BUT_DOWN_WEIGHTS)]
    return any(shard.start % size for shard in shards)


UNITS = {
    "heads": (PruneConfig(pattern="heads", num_per_layer=2, score="WABS"),),
    "heads-ABS-overall": (PruneConfig(pattern="heads", sparsity=0.4, score="ABS"),),
    "neurons": (PruneConfig(pattern="neurons", sparsity=0.25, scope="matrix", score="W"),),
    "neurons-overall": (PruneConfig(pattern="neurons", sparsity=0.6, min_per_layer=8, score="W"),),
    "both-random": (
        PruneConfig(pattern="heads", num_per_layer=2, score="random"),
        PruneConfig(pattern="neurons", num_per_layer=11, score="random"),
    ),
    "2:4-then-heads": (
        PruneConfig(pattern="2:4", modules=("*attn.*",), score="W"),
        PruneConfig(pattern="heads", num_per_layer=2, score="W"),
    ),
}


@pytest.mark.parametrize("family, dtype", [("llama", torch.bfloat16), ("gpt2", torch.float32)])
@pytest.mark.parametrize("pruning", list(UNITS))
def test_units_are_the_same_on_1_2_3_ranks_and_without_deepspeed(pools, family, pruning, dtype):
    check_same_everywhere(pools, family, dtype, UNITS[pruning])


@pytest.mark.parametrize("kind", list(ENGINES))
def test_patterns_on_a_live_engine_equal_the_dense_path(pools, kind):
    prunings = (
        *UNITS["heads"],
        *UNITS["neurons"],
        PruneConfig(pattern="2:4", score="WABS", modules=BUT_DOWN),
    )
    expected, counts = pruned("llama", torch.bfloat16, None, prunings)
    config = zero3_engine_config(torch.bfloat16, ENGINES[kind])
    for found, found_counts in pools(2).run(pruned, "llama", torch.bfloat16, config, prunings, True):
        assert found_counts == counts
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def zeros_of_units(module: torch.nn.Module, kinds: Any = ("heads", "neurons")) -> dict[str, torch.Tensor]:
    """Entries of parameters that must be zero: by name, in their flat order."""
    port = open_partition(module)
    expected: dict[str, torch.Tensor] = {}
    for kind in kinds:
        for layer in find_units(module, kind, port.shape):
            units = removed_units(module, layer)
            assert units.any()
            for part in layer.parts:
                gone, weight = units[part.unit_of], torch.zeros(part.shape, dtype=torch.bool)
                (weight if part.side == "outputs" else weight.T)[gone] = True
                stored = weight.T if part.transposed else weight
                expected[f"{part.name}.weight"] = stored.reshape(-1)
                if part.side == "outputs" and part.module.bias is not None:
                    expected[f"{part.name}.bias"] = gone
                if not is_adapted(part.module):
                    continue
                mine = part.module
                flat = torch.zeros(port.shape(mine.dsee_flat), dtype=torch.bool)
                a, b, values = mine.dsee_spec.split(flat)
                values[:] = gone[(mine.dsee_rows if part.side == "outputs" else mine.dsee_cols).long()]
                if part.side == "outputs":
                    b[torch.cat([gone[start:stop] for start, stop in mine.dsee_spec.slices])] = True
                else:
                    a[:, gone] = True
                expected[f"{part.name}.dsee_flat"] = flat
    return expected


def retune(family: str, dtype: torch.dtype, ds_config: dict[str, Any], on_stage_3: bool) -> int:
    """Tune, remove heads and neurons, retune; returns the number of adapter entries that had to stay zero."""
    engine = engine_for(make(family, dtype, ds_config if on_stage_3 else None), ds_config)
    train(engine, 3)
    remembered = largest_moments(engine)
    dsee_scale.prune(
        engine, PruneConfig(pattern="heads", num_per_layer=2 if family == "llama" else 1, score="W")
    )
    dsee_scale.prune(engine, PruneConfig(pattern="neurons", sparsity=0.4, score="W"))
    module = unwrap(engine)
    expected = zeros_of_units(module)
    at_prune = whole_weights(engine)
    count = 0
    for step in range(2 * engine.gradient_accumulation_steps()):
        ids = token_batch(seed=20 + step)
        loss = engine(ids, labels=ids).loss
        engine.backward(loss)
        count += check_gradients(module, expected)
        engine.step()
    after = whole_weights(engine)
    kept = open_optimizer(engine)
    masters = dict(zip(kept.sizes, kept.gather([(name, "master") for name in kept.sizes]), strict=True))
    moments = {
        key: dict(zip(kept.sizes, kept.gather([(name, key) for name in kept.sizes]), strict=True))
        for key in kept.moments()
    }
    assert set(moments) == {"exp_avg", "exp_avg_sq"}
    for name, lines in expected.items():
        assert not after[name].reshape(-1)[lines].any(), name
        if "dsee_" not in name:
            assert torch.equal(after[name], at_prune[name]), name
            continue
        assert remembered[name] > 0, name
        assert not torch.equal(after[name], at_prune[name]), name
        for held in (masters, *moments.values()):
            assert not held[name][lines].any(), name
    return count


def largest_moments(engine: Any) -> dict[str, float]:
    kept = open_optimizer(engine)
    whole = kept.gather([(name, "exp_avg") for name in kept.sizes])
    return {name: float(value.abs().max()) for name, value in zip(kept.sizes, whole, strict=True)}


def check_gradients(module: torch.nn.Module, expected: dict[str, torch.Tensor]) -> int:
    from deepspeed.utils import safe_get_full_grad

    count = 0
    for name, param in module.named_parameters():
        if not param.requires_grad:
            continue
        gradient = safe_get_full_grad(param).reshape(-1)
        assert gradient.any(), name
        if name in expected:
            assert not gradient[expected[name].to(gradient.device)].any(), name
            count += int(expected[name].sum())
    return count


RETUNED = [("llama", torch.bfloat16, kind) for kind in ENGINES]
RETUNED += [("gpt2", torch.float32, kind) for kind in ("zero3", "offload", "hierarchical, resident")]


@pytest.mark.parametrize("family, dtype, kind", RETUNED)
def test_the_retune_keeps_removed_units_at_exactly_zero(pools, family, dtype, kind):
    counts = pools(2).run(retune, family, dtype, zero3_engine_config(dtype, ENGINES[kind]), True)
    assert all(count > 100 for count in counts)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_retune_keeps_removed_units_at_zero_under_zero_1_and_2(pools, stage):
    config = stage_config(stage)
    assert all(count > 100 for count in pools(2).run(retune, "llama", torch.bfloat16, config, False))


def stage_config(stage: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    config = zero3_config(dtype)
    if stage < 3:
        config["zero_optimization"] = {"stage": stage}
    return config


def losses_after_patterns(ds_config: dict[str, Any]) -> list[float]:
    engine = engine_for(make("llama", torch.float32, ds_config), ds_config)
    losses = train(engine, 2)
    dsee_scale.prune(engine, PruneConfig(pattern="heads", num_per_layer=2, score="W"))
    dsee_scale.prune(engine, PruneConfig(pattern="neurons", sparsity=0.25, score="W"))
    dsee_scale.prune(engine, PruneConfig(pattern="2:4", modules=BUT_DOWN, score="W"))
    return losses + train(engine, 2)


def test_patterns_reach_the_secondary_shards_of_hierarchical_partitioning(pools):
    check_hierarchical(pools, losses_after_patterns)


def largest_message(pattern: str) -> int:
    """Entries of the largest tensor that a pruning sums over ranks; gathers count as infinite."""
    model = make("llama", torch.float32, zero3_config())
    largest = [0]
    reduce, gather = torch.distributed.all_reduce, torch.distributed.all_gather_into_tensor

    def reducing(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        largest.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    def gathering(*args: Any, **kwargs: Any) -> Any:
        largest.append(10**9)
        return gather(*args, **kwargs)

    torch.distributed.all_reduce, torch.distributed.all_gather_into_tensor = reducing, gathering
    try:
        dsee_scale.prune(
            model, PruneConfig(pattern=pattern, score="WABS", modules=BUT_DOWN if ":" in pattern else ())
        )
    finally:
        torch.distributed.all_reduce, torch.distributed.all_gather_into_tensor = reduce, gather
    return max(largest)


@pytest.mark.parametrize("pattern, limit", [("2:4", 14 * 2 * 4), ("heads", 512), ("neurons", 512)])
def test_patterns_send_edges_and_sums_but_no_weight(pools, pattern, limit):
    assert all(0 < found <= limit for found in pools(2).run(largest_message, pattern))


def without_the_engine() -> str:
    ds_config = zero3_config()
    engine = engine_for(make("llama", torch.float32, ds_config), ds_config)
    before = whole_weights(engine)
    with pytest.raises(PartitionError) as caught:
        dsee_scale.prune(unwrap(engine), PruneConfig(pattern="heads", num_per_layer=2, score="W"))
    after = whole_weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)
    return str(caught.value)


def test_removing_units_behind_an_engines_back_is_refused(pools):
    assert all("pass the engine" in text for text in pools(2).run(without_the_engine))


def test_these_models_are_adapted():
    assert len(adapted_layers(make("llama", torch.float32, None))) == 8
