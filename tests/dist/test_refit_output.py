"""The second stage of a re-fit under the real engine against one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.errors import PartitionError
from dsee_scale.partition import unwrap
from dsee_scale.pruning.refit import output
from tests.dist.test_calibrate import ENGINES, live
from tests.dist.test_inject_prune import engine_for, fill_adapters, train, whole_weights
from tests.models import zero3_config
from tests.unit.test_calibrate import batches, make

CONFIG = PruneConfig(sparsity=0.4, scope="matrix", block_steps=8)


def pruned(family: str, ds_config: dict[str, Any], config: PruneConfig) -> dict[str, Any]:
    """After a prune with the same batches on every rank, and after two more steps."""
    engine = live(family, ds_config)
    wanted = {name: param.requires_grad for name, param in unwrap(engine).named_parameters()}
    dsee_scale.prune(engine, config, batches(3))
    assert wanted == {name: param.requires_grad for name, param in unwrap(engine).named_parameters()}
    found = {"pruned": whole_weights(engine)}
    train(engine, steps=2)
    return found | {"trained": whole_weights(engine)}


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("family", ["everything", "gpt2"])
def test_ranks_with_the_same_batches_end_where_one_does(pools, family, engine):
    ds_config, world_size = ENGINES[engine]
    model = make(family)
    report = dsee_scale.prune(model, CONFIG, batches(3))
    expected = whole_weights(model)
    for found in pools(world_size).run(pruned, family, ds_config, CONFIG):
        for name in report.matrices:
            weight, other = found["pruned"][f"{name}.weight"], expected[f"{name}.weight"]
            assert torch.equal(found["trained"][f"{name}.weight"], weight), name
            same = (weight == 0) == (other == 0)
            assert same.float().mean() > 0.99, name
            assert (weight - other)[same].norm() < 0.05 * other.norm(), name
        for name in adapted_layers(model):
            flat = f"{name}.dsee_flat"
            assert not torch.equal(found["trained"][flat], found["pruned"][flat]), name


def encoder() -> torch.nn.Module:
    """A classifier with all linear layers of its blocks adapted, and its head trained."""
    sizes = dict(vocab_size=97, hidden_size=36, intermediate_size=53, num_hidden_layers=2)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(**sizes, num_attention_heads=3, max_position_embeddings=64, num_labels=3)
    ).eval()
    targets = ("query", "key", "value", "dense")
    dsee_scale.inject(
        model, DSEEConfig(rank=3, num_sparse=7, target_modules=targets, trained_modules=("classifier",))
    )
    fill_adapters(model)
    return model


def decoder() -> torch.nn.Module:
    return make("everything")


def replicas(model: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(model)


def under_zero3(model: torch.nn.Module) -> Any:
    return engine_for(model, zero3_config())


REFITS = {
    "by the loss": PruneConfig(sparsity=0.4),
    "2:4": PruneConfig(pattern="2:4", modules=("*.self*",)),
    "with steps": CONFIG,
}


def refitted(
    kind: Callable[[], torch.nn.Module], wrap: Callable[[torch.nn.Module], Any], config: PruneConfig
) -> dict[str, torch.Tensor]:
    """After a prune in which every rank sees its own part of the batches; all of them where each is a step's."""
    model = wrap(kind())
    data = labelled(kind)
    dsee_scale.prune(
        model, config, data if config.block_steps else data[dist.get_rank() :: dist.get_world_size()]
    )
    return whole_weights(model)


def labelled(kind: Callable[[], torch.nn.Module]) -> list[dict[str, torch.Tensor]]:
    labels = {"labels": torch.tensor([0, 2])} if kind is encoder else {}
    return [batch | labels for batch in batches(6)]


@pytest.mark.parametrize("case", list(REFITS))
@pytest.mark.parametrize(
    ("kind", "wrap", "ranks"),
    [(decoder, replicas, 2), (encoder, replicas, 2), (encoder, under_zero3, 2), (encoder, under_zero3, 3)],
)
def test_ddp_and_encoders_end_where_one_process_does(pools, kind, wrap, ranks, case):
    model = kind()
    before = whole_weights(model)
    report = dsee_scale.prune(model, REFITS[case], labelled(kind))
    expected = whole_weights(model)
    assert report.matrices and report.removed
    everywhere = pools(ranks).run(refitted, kind, wrap, REFITS[case])
    for found in everywhere:
        for name, other in expected.items():
            assert torch.equal(found[name], everywhere[0][name]), name
            if name.removesuffix(".weight") not in report.matrices:
                assert torch.equal(found[name], before[name]) or "dsee" in name, name
                continue
            same = (found[name] == 0) == (other == 0)
            assert same.float().mean() > 0.99, name
            assert (found[name] - other)[same].norm() < 0.05 * other.norm(), name
            assert not torch.equal(found[name][found[name] != 0], before[name][found[name] != 0]), name


UNITS = {
    "heads": PruneConfig(pattern="heads", num_per_layer=1, block_steps=4),
    "neurons": PruneConfig(pattern="neurons", num_per_layer=20, block_steps=4),
    "neurons, solved alone": PruneConfig(pattern="neurons", num_per_layer=20),
}


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize(
    ("family", "case"),
    [("gpt2", "heads"), ("everything", "neurons"), ("everything", "neurons, solved alone")],
)
def test_after_heads_and_neurons_too_and_what_is_gone_stays_gone(pools, family, case, engine):
    """Every weight, biases and adapters included; in float32 what is solved differs by rounding alone."""
    ds_config, world_size = ENGINES[engine]
    model = make(family)
    report = dsee_scale.prune(model, UNITS[case], batches(3))
    expected = whole_weights(model)
    for found in pools(world_size).run(pruned, family, ds_config, UNITS[case]):
        for name, other in expected.items():
            weight = found["pruned"][name]
            assert torch.equal(weight == 0, other == 0) or name.endswith("dsee_flat"), name
            assert (weight - other).norm() <= 0.01 * other.norm(), name
            if "dsee" not in name:
                assert torch.equal(found["trained"][name], weight), name
        for name, layer in adapted_layers(model).items():
            if name not in report.matrices:
                continue
            pruned_ab, trained_ab = (
                layer.dsee_spec.split(found[when][f"{name}.dsee_flat"])[:2] for when in ("pruned", "trained")
            )
            gone = [before == 0 for before in pruned_ab]
            assert any(each.any() for each in gone), name  # columns of A or rows of B
            assert not any(after[each].any() for after, each in zip(trained_ab, gone, strict=True)), name


def short_of_memory() -> tuple[str, bool]:
    """Rank 1 has no room for the optimizer."""
    engine = live("llama", zero3_config())
    before = whole_weights(engine)

    def none(*_: Any) -> float:
        raise MemoryError("no room")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(output._Layer, "rms", none)
        with pytest.raises(PartitionError) as caught:
            dsee_scale.prune(engine, CONFIG, batches(2))
    after = whole_weights(engine)
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


def test_a_rank_without_memory_for_the_steps_is_the_same_error_on_every_rank(pools):
    found = pools(2).run(short_of_memory)
    assert found[0] == found[1] and found[0][1]
    assert "block_steps" in found[0][0]
