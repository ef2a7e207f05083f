"""Adapters on the experts of partitioned models against the dense path, under the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.partition import unwrap
from tests.dist.test_inject_prune import engine_for, fill_adapters, train, whole_weights
from tests.models import build, moe_config, partition, token_batch, zero3_config

SETTINGS = dict(rank=3, num_sparse=7, target_modules=("experts", "o_proj"))
PRUNINGS = (
    PruneConfig(sparsity=0.2, scope="global", score="WABS"),
    PruneConfig(sparsity=0.3, scope="matrix", score="WAB", modules=("*.experts.*",)),
    PruneConfig(pattern="2:4", score="WABS", modules=("*.experts.*",)),
)


def make(
    model_type: str, ds_config: dict[str, Any] | None, dtype: torch.dtype, shared: bool, **settings: Any
) -> Any:
    model = build(moe_config(model_type), dtype)
    if ds_config is not None:
        partition(model, ds_config)
    dsee_scale.inject(model, DSEEConfig(**{**SETTINGS, **settings}, shared_expert_a=shared))
    return model


def supports_and_zeros(
    model_type: str, ds_config: dict[str, Any] | None, dtype: torch.dtype, shared: bool
) -> Any:
    """Positions of S2, and the weights after each of several prunings that read the update."""
    model = make(model_type, ds_config, dtype, shared)
    found = [{n: torch.stack([m.dsee_rows, m.dsee_cols]) for n, m in adapted_layers(model).items()}]
    fill_adapters(model)
    whole = model if ds_config is None else engine_for(model, ds_config)
    for config in PRUNINGS:
        report = dsee_scale.prune(whole, config)
        found.append(whole_weights(whole) | {n: torch.tensor(c) for n, c in report.matrices.items()})
    return found


@pytest.mark.parametrize(
    ("model_type", "dtype", "shared"),
    [("qwen3_moe", torch.float32, True), ("gpt_oss", torch.bfloat16, False)],
)
def test_supports_and_zeros_are_the_same_on_2_and_3_ranks_and_without_deepspeed(
    pools, model_type, dtype, shared
):
    expected = supports_and_zeros(model_type, None, dtype, shared)
    assert any(name.endswith("experts.down_proj") for name in expected[0])
    for world_size in (2, 3):
        for found in pools(world_size).run(
            supports_and_zeros, model_type, zero3_config(dtype), dtype, shared
        ):
            for each, other in zip(found, expected, strict=True):
                assert each.keys() == other.keys()
                for name, value in other.items():
                    assert torch.equal(each[name], value), (world_size, name)


def tuned(
    folder: str | None,
    ds_config: dict[str, Any] | None,
    shared: bool,
    reentrant: bool | None,
    targets: tuple[str, ...],
) -> Any:
    """Tune, prune, retune under the mask, save and export; losses, and the last logits."""
    model = make("qwen3_moe", ds_config, torch.float32, shared, target_modules=targets).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    if ds_config is None:
        engine = DenseEngine(model)
        losses = train(engine, 2)
        dsee_scale.prune(model, PRUNINGS[1])
    else:
        engine = engine_for(model, ds_config)
        losses = train(engine, 2)
        dsee_scale.prune(engine, PRUNINGS[1])
    losses += train(engine, 2)
    whole: Any = engine.model if ds_config is None else engine
    with torch.no_grad():
        logits = unwrap(whole).eval()(token_batch()).logits
    if folder is not None:
        dsee_scale.save_adapter(whole, Path(folder) / "adapter")
        dsee_scale.export_model(whole, Path(folder) / "model")
    return losses, logits


class DenseEngine:
    """What `train` needs of an engine, over a plain model and the same optimizer."""

    device = torch.device("cpu")

    def __init__(self, model: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(dsee_scale.trainable_parameters(model), lr=1e-2, weight_decay=0.0)

    def gradient_accumulation_steps(self) -> int:
        return 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize(
    ("shared", "reentrant", "targets"),
    [(False, None, ("experts",)), (True, False, ("experts", "o_proj")), (False, True, ("experts", "o_proj"))],
)  # the first layer's input needs no gradient in the first case, and the block is a leaf module of DeepSpeed
def test_tuning_under_the_mask_on_2_ranks_is_the_dense_one_and_what_is_exported(
    pools, tmp_path, shared, reentrant, targets
):
    expected_losses, expected = tuned(None, None, shared, None, targets)
    ds_config = zero3_config(torch.float32)
    for losses, logits in pools(2).run(tuned, str(tmp_path), ds_config, shared, reentrant, targets):
        assert losses == pytest.approx(expected_losses, abs=2e-5)
        # Adam enlarges the rounding of gradients that are nearly zero.
        assert torch.linalg.vector_norm(logits - expected) < 1e-2 * torch.linalg.vector_norm(expected)
    assert expected_losses[-1] < expected_losses[0]

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(stock(token_batch()).logits, logits, rtol=1e-4, atol=1e-5)
    share = (stock.model.layers[0].mlp.experts.down_proj == 0).float().mean()
    assert share == pytest.approx(0.3, abs=0.01)
    again = build(moe_config("qwen3_moe"))
    dsee_scale.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again.eval()(token_batch()).logits, logits)


def losses_of(
    ds_config: dict[str, Any] | None, targets: tuple[str, ...], trained: tuple[str, ...]
) -> list[float]:
    """Losses of a block that DeepSpeed takes for a leaf, whose own experts stay as they are."""
    model = build(moe_config("qwen2_moe", shared_expert_intermediate_size=16))
    if ds_config is not None:
        partition(model, ds_config)
    dsee_scale.inject(
        model,
        DSEEConfig(
            rank=3, num_sparse=7, target_modules=targets, trained_modules=trained, support="magnitude"
        ),
    )
    return train(DenseEngine(model.train()) if ds_config is None else engine_for(model, ds_config), 3)


@pytest.mark.parametrize(
    ("targets", "trained"),
    [(("gate_proj", "up_proj"), ()), (("layers.1.self_attn.q_proj",), ("mlp.gate",))],
)
def test_the_first_trained_thing_may_be_a_shared_expert_or_a_router(pools, targets, trained):
    expected = losses_of(None, targets, trained)
    assert expected[-1] < expected[0]
    for found in pools(2).run(losses_of, zero3_config(), targets, trained):
        assert found == pytest.approx(expected, abs=2e-5)


def refitted(model_type: str, ds_config: dict[str, Any] | None) -> dict[str, Any]:
    """Weights, supports and adapters after a re-fit with the default settings, and after two more steps."""
    model = make(model_type, ds_config, torch.float32, False)
    fill_adapters(model)
    whole = model if ds_config is None else engine_for(model, ds_config)
    data = [token_batch(batch=2, length=24, seed=seed) for seed in range(6)]
    if ds_config is not None:
        data = data[dist.get_rank() :: dist.get_world_size()]
    found: dict[str, Any] = {"report": dsee_scale.prune(whole, PruneConfig(sparsity=0.4), data)}
    found["weights"] = whole_weights(whole)
    layers, names = adapted_layers(model), {id(p): name for name, p in model.named_parameters()}
    found["supports"] = {n: torch.stack([m.dsee_rows, m.dsee_cols]).long() for n, m in layers.items()}
    found["flats"] = {n: names[id(m.dsee_flat)] for n, m in layers.items()}
    if ds_config is not None:
        train(whole, 2)
        found["trained"] = whole_weights(whole)
    return found


@pytest.mark.parametrize(("model_type", "world_size"), [("qwen3_moe", 2), ("gpt_oss", 3)])
def test_refitted_experts_are_those_of_the_dense_path_and_training_goes_on(pools, model_type, world_size):
    expected = refitted(model_type, None)
    layers = adapted_layers(make(model_type, None, torch.float32, False))
    for found in pools(world_size).run(refitted, model_type, zero3_config()):
        assert found["report"].by_magnitude == expected["report"].by_magnitude
        assert found["report"].removed == expected["report"].removed == round(0.4 * found["report"].total)
        for name, layer in layers.items():
            weight = name if layer.dsee_spec.experts else f"{name}.weight"
            mine, dense = found["weights"][weight], expected["weights"][weight]
            # Sums over ranks round otherwise, and an entry near the threshold may swap with its neighbour.
            assert ((mine == 0) == (dense == 0)).float().mean() > 0.97, name
            assert (mine - dense).norm() < 0.2 * dense.norm(), name
            assert torch.equal(found["trained"][weight], mine), name
            rows, cols = found["supports"][name]
            assert (mine.view(layer.dsee_spec.storage_shape)[rows, cols] != 0).all(), name
            before, after = (found[when][found["flats"][name]] for when in ("weights", "trained"))
            _, b, values = layer.dsee_spec.split(before)
            assert b.any() and not values.any(), name
            assert all(part.any() for part in layer.dsee_spec.split(after)[1:]), name
