"""A resumed training sees the rows that the uninterrupted one would have seen, in whatever order they come."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dsee_scale
from dsee_scale import DSEECallback, PruneConfig
from tests.unit.test_trainer_callback import CONFIG, model_of, trainer_of

PRUNINGS = {
    "no pruning": (None, None),
    "inputs read again": (PruneConfig(refit=False), 9),
}


def seen_batches(
    folder: Path, strategy: str, pruning: str, checkpoint: Path | None = None
) -> list[list[list[int]]]:
    """The token ids of each step's batch: six steps an epoch, ten in all, checkpoints at 2, 4, ..."""
    model = model_of()
    if checkpoint is None:
        dsee_scale.inject(model, CONFIG)
    else:
        dsee_scale.load_adapter(model, checkpoint)
    prune, at = PRUNINGS[pruning]
    callback = DSEECallback(prune, at, calibration_batches=6)
    trainer = trainer_of(model, folder, callback, max_steps=10, train_sampling_strategy=strategy)
    seen, step = [], trainer.training_step

    def noting(module, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"].tolist())
        return step(module, inputs, *args, **kwargs)

    trainer.training_step = noting  # type: ignore[method-assign]
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return seen


@pytest.mark.parametrize("pruning", list(PRUNINGS))
@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_the_order_goes_on_in_any_epoch(tmp_path, strategy, pruning):
    whole = seen_batches(tmp_path, strategy, pruning)
    assert whole[:4] != whole[6:]
    for step in (8, 4):  # in the second epoch, and in the first
        assert seen_batches(tmp_path, strategy, pruning, tmp_path / f"checkpoint-{step}") == whole[step:], (
            step
        )


def test_an_order_that_a_users_sampler_draws_goes_on_in_the_first_epoch(tmp_path, monkeypatch):
    """From PyTorch's global generator, as it is when training starts."""

    class Drawn(torch.utils.data.Sampler):
        def __len__(self) -> int:
            return 24

        def __iter__(self):
            return iter(torch.randperm(24).tolist())

    monkeypatch.setattr("transformers.Trainer._get_train_sampler", lambda self, train_dataset=None: Drawn())
    for pruning in PRUNINGS:
        whole = seen_batches(tmp_path / pruning, "random", pruning)
        checkpoint = tmp_path / pruning / "checkpoint-4"
        assert seen_batches(tmp_path / pruning, "random", pruning, checkpoint)[:2] == whole[4:6], pruning
