"""The package's Trainer for a model that brings its own loss: classifiers and regressors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.errors import ConfigError
from dsee_scale.recipe.sections import SCHEDULES
from dsee_scale.training.base_trainer import AdapterTrainer
from dsee_scale.training.journal import Journal
from dsee_scale.training.timeline import Phase, Timeline, steps_per_epoch, training_schedule
from paper.glue.model import ADAPTER_FOLDER


class Progress(TrainerCallback):
    """Notes in the journal which step, and which batch of an evaluation, a rank is at."""

    def __init__(self, journal: Journal) -> None:
        self._journal, self._batch = journal, 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Name the step that begins."""
        self._journal.doing = f"training, step {state.global_step + 1}"

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Count a batch of an evaluation or a prediction."""
        self._batch += 1
        self._journal.doing = f"{self._work}, batch {self._batch}"

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        """Name again what was done before."""
        self._journal.doing, self._batch = self._work, 0

    def on_predict(self, *_: Any, **__: Any) -> None:
        """Name again what was done before."""
        self._journal.doing, self._batch = self._work, 0

    @property
    def _work(self) -> str:
        return self._journal.doing.partition(", batch ")[0]


class GlueTrainer(AdapterTrainer):
    """The package's Trainer with one phase of training; what it saves as a model is the adapter."""

    def __init__(self, *, args: TrainingArguments, train_dataset: Any = None, **kwargs: Any) -> None:
        timeline = _one_phase(args, len(train_dataset) if train_dataset is not None else 0)
        super().__init__(timeline=timeline, args=args, train_dataset=train_dataset, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Collective. The adapter, the head and the masks; no base weight."""
        save_adapter(
            self.model_wrapped, Path(str(output_dir or self.args.output_dir)) / ADAPTER_FOLDER, overwrite=True
        )


def _one_phase(args: TrainingArguments, num_rows: int) -> Timeline:
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if name not in SCHEDULES:
        raise ConfigError(f"--lr_scheduler_type {name!r} is unknown here; valid: {', '.join(SCHEDULES)}")
    steps = args.max_steps
    if steps <= 0 and num_rows:  # without rows nothing is trained, only evaluated
        steps = -int(-args.num_train_epochs * steps_per_epoch(num_rows, args) // 1)
    phase = Phase(name="tune", start=0, stop=max(1, steps))
    return Timeline(phases=(phase,), prune_events=(), schedules=(training_schedule(args, phase.stop),))
