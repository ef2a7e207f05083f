"""What is overridden of the Trainer's insides: no more than the table says, and as it is in this transformers."""

from __future__ import annotations

import pytest
from transformers import Trainer

from dsee_scale.errors import ConfigError
from dsee_scale.training.checkpoints import PRIVATE, AdapterCheckpoints, check_trainer
from dsee_scale.training.trainer import DSEETrainer

pytestmark = pytest.mark.unit


def test_the_table_names_every_private_method_that_is_overridden():
    ours = [cls for cls in DSEETrainer.__mro__ if cls.__module__.startswith("dsee_scale.")]
    assert AdapterCheckpoints in ours
    found = {name for cls in ours for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in found if hasattr(Trainer, name)} == set(PRIVATE)


def test_this_transformers_is_known():
    check_trainer(Trainer)


def test_a_trainer_that_moved_a_method_is_refused_by_name():
    class Renamed(Trainer):
        _run_epoch = None  # type: ignore[assignment]

    class Changed(Trainer):
        def _save_checkpoint(self, model, trial, metrics=None):
            """As before transformers 5."""

    for trainer, words in ((Renamed, "no Trainer._run_epoch"), (Changed, "another Trainer._save_checkpoint")):
        with pytest.raises(ConfigError, match=words):
            check_trainer(trainer)
