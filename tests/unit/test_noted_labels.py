"""A pruning in a Trainer looks at the loss that is trained: at the labels that the user's batches have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import dsee_scale
from dsee_scale import DSEECallback, DSEEConfig, PruneConfig
from tests.models import token_batch
from tests.unit.test_trainer_callback import CONFIG, model_of


def train(
    model: Any, rows: Any, folder: Path, at: int, checkpoint: Path | None = None, **changes: Any
) -> Any:
    """What a pruning looked at in a training of four batches an epoch."""
    callback, found = DSEECallback(PruneConfig(), at), []
    calibration = callback._calibration
    callback._calibration = lambda: found.extend(calibration()) or found  # type: ignore[method-assign]
    settings: dict[str, Any] = dict(max_steps=5, save_steps=2, report_to="none", seed=3) | changes
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True, **settings
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return found


def completions() -> list[dict[str, torch.Tensor]]:
    """Sixteen prompts of six tokens, of which nothing is learned, with completions of four."""
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in token_batch(batch=16, length=10)]
    for row in rows:
        row["labels"][:6] = -100
    return rows


@pytest.mark.parametrize("at", [0, 3])
def test_a_classifiers_pruning_sees_its_labels(tmp_path, caplog, at):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertForSequenceClassification(BertConfig(vocab_size=97, **sizes))  # type: ignore[arg-type]
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, target_modules=("query",)))
    rows = [{"input_ids": ids, "labels": n % 2} for n, ids in enumerate(token_batch(batch=16, length=8))]
    found = train(model, rows, tmp_path, at)
    assert all(batch["labels"].shape == (4,) for batch in found)
    assert "no labels" not in caplog.text


def test_prompts_are_not_weighed_as_if_they_were_learned(tmp_path):
    """Nor after a resume, and nothing that the Trainer adds to a batch is kept."""
    model_of().save_pretrained(tmp_path / "published")
    model = model_of(tmp_path / "published")
    dsee_scale.inject(model, CONFIG)
    found = train(model, completions(), tmp_path / "run", 3)
    assert len(found) == 3
    for batch in found:
        assert set(batch) == {"input_ids", "labels"}
        assert (batch["labels"][:, :6] == -100).all()
        assert torch.equal(batch["labels"][:, 6:], batch["input_ids"][:, 6:])
    again = model_of(tmp_path / "published")
    dsee_scale.load_adapter(again, tmp_path / "run" / "checkpoint-2")
    resumed = train(again, completions(), tmp_path / "run", 3, tmp_path / "run" / "checkpoint-2")
    for one, other in zip(resumed, found, strict=True):
        assert set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


def test_batches_of_a_trainer_that_keeps_its_labels_to_itself_are_alike_after_a_resume(tmp_path):
    """With label smoothing the model gets none."""
    model = model_of()
    dsee_scale.inject(model, CONFIG)
    smoothed = dict(label_smoothing_factor=0.1)
    found = train(model, completions(), tmp_path / "run", 3, **smoothed)
    again = model_of()
    dsee_scale.load_adapter(again, tmp_path / "run" / "checkpoint-2")
    resumed = train(again, completions(), tmp_path / "run", 3, tmp_path / "run" / "checkpoint-2", **smoothed)
    assert [set(batch) for batch in resumed] == [set(batch) for batch in found] == [{"input_ids"}] * 3


def test_labels_of_another_shape_than_the_inputs_are_left_out(tmp_path):
    """Several labels for each row: the pruning goes on without them."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = BertConfig(vocab_size=97, num_labels=3, problem_type="multi_label_classification", **sizes)  # type: ignore[arg-type]
    model = BertForSequenceClassification(config)
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, target_modules=("query",)))
    rows = [{"input_ids": ids, "labels": [1.0, 0.0, 1.0]} for ids in token_batch(batch=16, length=8)]
    found = train(model, rows, tmp_path, 3)
    assert [set(batch) for batch in found] == [{"input_ids"}] * 3
