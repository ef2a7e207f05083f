"""The run's Trainer: loss and metrics at label positions only, pruning between the phases."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsee_scale.errors import ConfigError
from dsee_scale.evaluation.evaluate import EvaluationSet, Tally, evaluate, generate_texts
from dsee_scale.export.export import BASE_FOLDER, save_base
from dsee_scale.passes.label_logits import label_loss, logits_at, predicting
from dsee_scale.pruning.prune import prune
from dsee_scale.training.base_trainer import AdapterTrainer, log_within_step
from dsee_scale.training.journal import (
    count_zeros,
    metric_words,
    peak_memory,
    reset_peak_memory,
    sparsity,
)
from dsee_scale.training.timeline import PruneEvent

logger = logging.getLogger(__name__)


class DSEETrainer(AdapterTrainer):
    """Tunes, prunes and retunes a decoder.

    Beyond its parent: loss and all metrics read logits at label positions only, and weights are pruned in place
    where the timeline says so.
    """

    def __init__(
        self,
        *,
        evaluation: EvaluationSet,
        generation: dict[str, Any],
        calibration_samples: int,
        **kwargs: Any,
    ) -> None:
        self.evaluation, self.generation = evaluation, generation
        self.calibration_samples = calibration_samples
        super().__init__(compute_loss_func=self._label_loss, **kwargs)
        self.phases = PhaseCallback(self)
        self.add_callback(self.phases)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Cross entropy at the labels, divided by the labels of the whole step over all ranks."""
        with logits_at(self.module, predicting(inputs["labels"])):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def calibration(self) -> Iterator[dict[str, Tensor]]:
        """This rank's share of a fixed choice of training rows, the same ones on any number of ranks. Local."""
        rows: Any = self.train_dataset
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed))
        # Rows of about the same length together, so that little of a batch is padding.
        ordered = sorted(
            chosen[: self.calibration_samples].tolist(), key=lambda index: len(rows[index]["input_ids"])
        )
        mine = ordered[self.args.process_index :: self.args.world_size] or ordered[:1]
        size = self.args.per_device_train_batch_size
        for start in range(0, len(mine), size):
            yield self.data_collator([rows[index] for index in mine[start : start + size]])

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Collective. Quality on the validation rows, logged and given to callbacks.

        Raises:
            ConfigError: another data set is asked for.
        """
        if eval_dataset is not None:
            raise ConfigError(
                "DSEETrainer evaluates the recipe's validation rows; evaluation.evaluate takes any"
            )
        started = time.perf_counter()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.quality().items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def quality(self) -> dict[str, float]:
        """Collective. The validation metrics of the live model."""
        batch_size, device = self.args.eval_batch_size, self.args.device
        data = self.evaluation
        tally = evaluate(self.model_wrapped, self.module, data, batch_size=batch_size, device=device)
        if data.generations:
            texts = generate_texts(
                self.module,
                self.processing_class,
                [item.prompt for item in data.generations],
                self.generation,
                pad_id=data.pad_id,
                batch_size=batch_size,
                device=device,
            )
            tally += Tally(hypotheses=texts, references=[item.references for item in data.generations])
        return tally.metrics()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Collective. The parent's; then, whatever `save_strategy` is, a checkpoint before a pruning and at the end."""
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step = self.state.global_step
        if self._saved_step != step and (self.phases.is_due(self.state) or step == self.timeline.num_steps):
            self._save_checkpoint(self.module, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if self.phases.is_due(self.state):
            self._finish_checkpoint()
        self.phases.prune_if_due(self.state)

    def _label_loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        smoothing = self.args.label_smoothing_factor
        return label_loss(outputs["logits"], labels, num_items_in_batch, smoothing)


class PhaseCallback(TrainerCallback):
    """Prunes at the timeline's events and measures each phase's end on the live engine.

    A pruning comes after its step's checkpoint, so nothing that goes wrong in it costs the training before it; the
    journal says which ones are done, and a resumed run makes up for the one that its checkpoint has not.
    """

    def __init__(self, trainer: DSEETrainer) -> None:
        self._trainer, self.timeline, self.journal = trainer, trainer.timeline, trainer.journal
        self._phase_started = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure the untouched model; prune at once if there is no tune phase, or the checkpoint is not pruned yet."""
        self._phase_started = time.perf_counter()
        if state.global_step == 0:
            self._measure("before", trained=False)
        self.prune_if_due(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Measure a phase's end."""
        events = self.timeline.prune_events
        if events and state.global_step == events[0].step:
            self._measure("tuned")
        if not self.is_due(state):
            self._measure_end(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """If the best checkpoint has just been loaded, its quality is the run's, not the last step's."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and self.journal.phases:
            self._measure(self.journal.phases[-1]["phase"], trained=False, step=state.best_global_step)

    def is_due(self, state: TrainerState) -> bool:
        """Whether this step's pruning is still to be done."""
        return any(self._undone(event, state) for event in self.timeline.prune_events)

    def prune_if_due(self, state: TrainerState) -> None:
        """Collective. This step's pruning, unless it is done."""
        for event in self.timeline.prune_events:
            if not self._undone(event, state):
                continue
            with self.journal.timed("prune"):
                report = prune(self._trainer.model_wrapped, event.configs, self._trainer.calibration())
            if any(config.refit for config in event.configs):
                with self.journal.timed("save base"):
                    folder = Path(str(self._trainer.args.output_dir)) / BASE_FOLDER
                    save_base(self._trainer.model_wrapped, folder, tokenizer=self._trainer.processing_class)
            self.journal.prunings.append(event.to_dict())
            self.journal.matrices = {name: list(counts) for name, counts in report.matrices.items()}
            if event is self.timeline.prune_events[-1]:
                self._measure("pruned", trained=False)
                # A tuned model that is not pruned must never win against the pruned ones.
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None
            self._measure_end(state)

    def _undone(self, event: PruneEvent, state: TrainerState) -> bool:
        return event.step == state.global_step and event.to_dict() not in self.journal.prunings

    def _measure_end(self, state: TrainerState) -> None:
        """Collective. What the last phase reached, once its last step and pruning are done."""
        if state.global_step != self.timeline.num_steps:
            return
        last = self.timeline.phases[-1]
        if last.name == "retune":
            self._measure("retuned")
        elif not self.timeline.prune_events:
            self._measure("tuned")

    def _measure(self, name: str, *, trained: bool = True, step: int | None = None) -> None:
        """Collective. Quality, sparsity, time and memory at this point."""
        seconds = time.perf_counter() - self._phase_started
        memory = peak_memory()
        with self.journal.timed("evaluate"):
            quality = self._trainer.quality()
        matrices = count_zeros(self._trainer.model_wrapped)
        removed = sparsity(matrices)
        self.journal.add_phase(
            name,
            step=self._trainer.state.global_step if step is None else step,
            quality=quality,
            sparsity=removed,
            zeros=sum(zeros for zeros, _ in matrices.values()),
            seconds=seconds if trained else None,
            peak_memory_bytes=memory,
        )
        named = {f"{name}_{key}": value for key, value in quality.items()}
        log_within_step(self._trainer, {"sparsity": removed, **named})
        if trained:
            self.journal.seconds["train"] = self.journal.seconds.get("train", 0.0) + seconds
        if self._trainer.is_world_process_zero():
            shown = ", ".join(f"{metric_words(k, self.journal.run)} {v:.4g}" for k, v in quality.items())
            logger.info("%s: %s, %.2f%% of block weights are zero", name, shown, 100 * removed)
        reset_peak_memory()
        self._phase_started = time.perf_counter()
