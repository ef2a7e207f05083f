"""Where DeepSpeed fetches and releases small modules whole (`stage3_module_granularity_threshold`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.checkpoint.training_state import load_training_state, save_training_state
from dsee_scale.errors import PartitionError
from tests.dist.test_checkpoint import batch, contents, train, whole_weights
from tests.models import build, llama_config, partition, zero3_config

THRESHOLDS = {"none": {}, "blocks": {"stage3_module_granularity_threshold": 1500}}
WHOLE = {"stage3_module_granularity_threshold": 5000}


def engine_with(
    dtype: torch.dtype, zero: dict[str, Any], adapter: str | None = None, vocab_size: int = 2000
) -> Any:
    import deepspeed
    from deepspeed.utils import z3_leaf_module

    config = zero3_config(dtype, **zero)
    config["train_micro_batch_size_per_gpu"] = 3
    model = partition(build(llama_config(vocab_size=vocab_size), dtype), config)
    if adapter is None:
        dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=4, target_modules=("q_proj", "up_proj")))
    else:
        dsee_scale.load_adapter(model, adapter)
    params = dsee_scale.trainable_parameters(model)
    engine = deepspeed.initialize(model=model, model_parameters=params, config=config)[0]
    leaves = [module for module in model.modules() if z3_leaf_module(module)]
    assert bool(leaves) == bool(zero) and (model in leaves or model.model in leaves) == (zero is WHOLE)
    return engine


@contextlib.contextmanager
def without_streams() -> Iterator[None]:
    """DeepSpeed tells a stream of each tensor that a leaf releases, which the CPU has none of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        yield


def evaluate(engine: Any) -> None:
    """A forward of whose order DeepSpeed has no trace yet."""
    engine.eval()
    with torch.no_grad():
        engine(batch(1))
    engine.train()


@without_streams()
def written(folder: str, zero: dict[str, Any], refit: bool) -> None:
    engine = engine_with(torch.bfloat16, zero)
    evaluate(engine)
    data = [{"input_ids": batch(5)}] if refit else None
    dsee_scale.prune(engine, PruneConfig(score="wanda" if refit else "W", refit=refit), data)
    save_training_state(engine, f"{folder}/state")
    dsee_scale.export_model(engine, f"{folder}/model")


@pytest.mark.parametrize("refit", [True, False])
def test_files_are_those_of_a_run_without_leaves(pools, tmp_path, refit):
    for name, zero in THRESHOLDS.items():
        pools(2).run(written, str(tmp_path / name), zero, refit)
    expected, found = (contents(tmp_path / name) for name in THRESHOLDS)
    own = [name for name in expected if "random" not in name]
    assert len(own) > 6 and found.keys() == expected.keys()
    assert [name for name in own if found[name] != expected[name]] == []


@without_streams()
def refitted_as_one_leaf() -> tuple[str, bool, int]:
    engine = engine_with(torch.float32, WHOLE)
    before = whole_weights(engine)
    with pytest.raises(PartitionError) as caught:
        dsee_scale.prune(engine, PruneConfig(), [{"input_ids": batch(5)}])
    same = all(torch.equal(before[name], value) for name, value in whole_weights(engine).items())
    return str(caught.value), same, dsee_scale.prune(engine, PruneConfig(score="W", refit=False)).removed


def test_blocks_that_are_fetched_together_are_not_refitted(pools):
    for text, same, removed in pools(2).run(refitted_as_one_leaf):
        assert "as one leaf, by stage3_module_granularity_threshold" in text and same and removed > 1000


@without_streams()
def resumed(folder: str) -> tuple[list[float], list[float]]:
    engine = engine_with(torch.float32, WHOLE, vocab_size=97)
    train(engine, range(2))
    save_training_state(engine, folder)
    losses = train(engine, range(2, 4))
    engine = engine_with(torch.float32, WHOLE, folder, vocab_size=97)
    evaluate(engine)
    load_training_state(engine, folder)
    return losses, train(engine, range(2, 4))


def test_a_state_is_loaded_after_an_evaluation(pools, tmp_path: Path):
    for losses, again in pools(2).run(resumed, str(tmp_path / "state")):
        assert losses == again
