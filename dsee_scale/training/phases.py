"""What happens between the phases: measure, prune in place, measure again."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsee_scale.passes.prune_model import prune
from dsee_scale.training.journal import Journal, count_zeros, peak_memory, reset_peak_memory, sparsity
from dsee_scale.training.timeline import Timeline

if TYPE_CHECKING:
    from dsee_scale.training.trainer import DSEETrainer

logger = logging.getLogger(__name__)


class PhaseCallback(TrainerCallback):
    """Prunes at the timeline's events and measures each phase's end on the live engine.

    It acts after an optimizer step and before that step's checkpoint, so a checkpoint of step t holds the
    masks of every event up to t, and a resumed run never prunes twice.
    """

    def __init__(self, timeline: Timeline, journal: Journal) -> None:
        self.timeline = timeline
        self.journal = journal
        self.trainer: DSEETrainer | None = None
        self._phase_started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure the untouched model; prune at once if there is no tune phase."""
        self._phase_started = time.perf_counter()
        if state.global_step == 0:
            self._measure("before", trained=False)
            self._prune_if_due(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Prune if this step is one of the timeline's."""
        events = self.timeline.prune_events
        if events and state.global_step == events[0].step:
            self._measure("tuned")
        self._prune_if_due(state)
        if state.global_step == self.timeline.num_steps:
            last = self.timeline.phases[-1]
            if last.name == "retune":
                self._measure("retuned")
            elif not events:
                self._measure("tuned")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """If the best checkpoint has just been loaded, its quality is the run's, not the last step's."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and self.journal.phases:
            self._measure(self.journal.phases[-1]["phase"], trained=False, step=state.best_global_step)

    def _prune_if_due(self, state: TrainerState) -> None:
        for event in self.timeline.prune_events:
            if event.step != state.global_step:
                continue
            with self.journal.timed("prune"):
                report = prune(self._trainer.model_wrapped, event.config)
            self.journal.matrices = {name: list(counts) for name, counts in report.matrices.items()}
            if event is self.timeline.prune_events[-1]:
                self._measure("pruned", trained=False)
                # A tuned model that is not pruned must never win against the pruned ones.
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _measure(self, name: str, *, trained: bool = True, step: int | None = None) -> None:
        """Collective. Quality, sparsity, time and memory at this point."""
        seconds = time.perf_counter() - self._phase_started
        memory = peak_memory()
        with self.journal.timed("evaluate"):
            quality = self._trainer.quality()
        matrices = count_zeros(self._trainer.model_wrapped)
        self.journal.add_phase(
            name,
            step=self._trainer.state.global_step if step is None else step,
            quality=quality,
            sparsity=sparsity(matrices),
            zeros=sum(zeros for zeros, _ in matrices.values()),
            seconds=seconds if trained else None,
            peak_memory_bytes=memory,
        )
        if trained:
            self.journal.seconds["train"] = self.journal.seconds.get("train", 0.0) + seconds
        if self._trainer.is_world_process_zero():
            words = ", ".join(f"{key} {value:.4g}" for key, value in quality.items())
            logger.info("%s: %s, %.2f%% of block weights are zero", name, words, 100 * sparsity(matrices))
        reset_peak_memory()
        self._phase_started = time.perf_counter()

    @property
    def _trainer(self) -> DSEETrainer:
        assert self.trainer is not None, "set PhaseCallback.trainer before training"
        return self.trainer
