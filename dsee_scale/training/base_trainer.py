"""A Hugging Face Trainer for adapters: one schedule over all phases, and checkpoints without base weights."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from dsee_scale.adapters.gradients import GradientWatch
from dsee_scale.adapters.state import model_state
from dsee_scale.checkpoint.contents import check_output
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.checkpoint.training_state import (
    KIND,
    STATE_FILE,
    load_training_state,
    random_state,
    save_training_state,
    set_random_state,
)
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import ConfigError
from dsee_scale.partition import unwrap
from dsee_scale.training.journal import Journal, to_jsonable
from dsee_scale.training.survival import RunWatch, check_trained_values, newest_first
from dsee_scale.training.timeline import Timeline

logger = logging.getLogger(__name__)


def read_record(folder: Path) -> dict[str, Any]:
    """What an `AdapterTrainer` noted in one of its checkpoints. Local.

    Raises:
        FormatError: the folder is no whole checkpoint.
        ConfigError: it was saved by another program.
    """
    extra = open_folder(folder, (KIND,)).json(STATE_FILE)["extra"]
    if not {"trainer", "journal", "global_batch"} <= extra.keys():
        raise ConfigError(f"{folder} was saved by another training loop; load it with load_training_state")
    return extra


def delete_old_checkpoints(output: Path, limit: int | None, best: str = "") -> None:
    """Delete a run's checkpoints beyond `limit`: the last one and the best one stay. Local.

    transformers' own way deletes any folder called `checkpoint-*`, with all that is in it.
    """
    found = newest_first(output)
    order = sorted(found, key=lambda folder: (folder != found[0], folder.name != best))
    spared = max(limit or len(found), 2 if best in [folder.name for folder in found[1:]] else 1)
    for folder in order[spared:]:
        try:
            check_output(folder, KIND, overwrite=True)
        except ConfigError as error:
            logger.warning("%s stays, beyond save_total_limit: %s", folder, error)
        else:
            shutil.rmtree(folder)


class GradientCallback(TrainerCallback):
    """Ends a training whose first step leaves an adapter without a gradient. Any Hugging Face Trainer takes it."""

    def __init__(self) -> None:
        self._watch: GradientWatch | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Begin to watch."""
        self._watch = GradientWatch(unwrap(model))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Collective, once. Raise on every rank if an adapter got no gradient."""
        watch, self._watch = self._watch, None
        if watch is not None:
            with raise_on_all_ranks():
                watch.check()


class AdapterTrainer(Trainer):
    """One optimizer and one engine from the first step to the last; loss and evaluation are transformers' own.

    Differences from its parent: the learning rate follows the timeline; a checkpoint holds adapters, optimizer
    state and mask bits, is complete or not there, and can be resumed on another number of processes.
    """

    def __init__(self, *, timeline: Timeline, journal: Journal, **kwargs: Any) -> None:
        self.timeline, self.journal = timeline, journal
        self.watch = RunWatch(timeline, journal)
        callbacks = [self.watch, GradientCallback(), *(kwargs.pop("callbacks", None) or [])]
        super().__init__(callbacks=callbacks, **kwargs)
        self._checkpoint: Path | None = None
        self._saved_step = -1
        self._random_state: dict[str, Tensor] = {}

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer that `training.optim` names, without empty groups (these crash schedulers)."""
        if self.optimizer is None:
            source: Any = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(source))
            trained = [(name, param) for name, param in source.named_parameters() if param.requires_grad]
            groups = [
                {"params": [p for n, p in trained if n in decayed], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
            ]
            optimizer_class, arguments = self.get_optimizer_cls_and_kwargs(self.args, source)
            own = {"params", "model", "optimizer_dict"} & arguments.keys()
            if own:
                raise ConfigError(
                    f"training.optim {self.args.optim} chooses its own parameters ({', '.join(own)}); "
                    "adapters are few, use adamw_torch"
                )
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **arguments)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The timeline's learning rates, whatever the number of steps is said to be."""
        if self.lr_scheduler is None:
            factors = [rate / self.args.learning_rate for rate in self.timeline.learning_rates()]

            def factor(step: int) -> float:
                return factors[min(step, len(factors) - 1)]

            chosen: Any = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The parent's step; whether the loss is a number is looked at once per optimizer step."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.watch.saw(loss)
        return loss

    @property
    def module(self) -> nn.Module:
        """The transformers model, without engine."""
        return self.model  # type: ignore[return-value]

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> TrainOutput:
        """Collective. Run the timeline, from its start or from one of this class's checkpoints.

        Args:
            resume_from_checkpoint: a folder `checkpoint-STEP`. The raw model must have got its adapters and
                masks from it already, by `load_adapter`.
            **kwargs: the parent's.
        """
        with self.watch.obeying_sigterm():
            return self._train(resume_from_checkpoint, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, **kwargs: Any) -> TrainOutput:
        if not resume_from_checkpoint:
            return super().train(None, **kwargs)
        self._checkpoint = Path(str(resume_from_checkpoint))
        record = read_record(self._checkpoint)
        self._check_record(record)
        # The parent reads its counters from a file of its own; ours are inside the checkpoint's one record.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / TRAINER_STATE_NAME).write_text(json.dumps(record["trainer"]))
            return super().train(folder, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Refused: the Trainer's own way writes the frozen base."""
        raise ConfigError("use dsee_scale.save_adapter or dsee_scale.export_model on trainer.model_wrapped")

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """The parent's set-up; what it would read with DeepSpeed's own loader is read here."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            assert self._checkpoint is not None
            extra = load_training_state(
                self.model_wrapped, self._checkpoint, optimizer=self._torch_optimizer()
            )
            self._random_state = random_state()
            self.journal.restore(extra["journal"])
            self._move_scheduler_to(self.state.global_step)
        return prepared

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """The parent would train one step more when a finished run is resumed (to export it again)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _move_scheduler_to(self, step: int) -> None:
        """The learning rate is a function of the step alone, so that a resumed recipe may change it."""
        scheduler: Any = self.lr_scheduler
        while not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            scheduler = scheduler.scheduler
        scheduler.last_epoch = step
        rates = [base * scheduler.lr_lambdas[0](step) for base in scheduler.base_lrs]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing: adapters and masks were put into the raw model, the rest follows when it is prepared."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once the batches of finished steps are skipped, which has used the generators."""
        if checkpoint is not None:
            set_random_state(self._random_state)

    def _load_best_model(self) -> None:
        folder = str(self.state.best_model_checkpoint)
        load_training_state(self.model_wrapped, folder, optimizer=self._torch_optimizer(), generators=False)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Collective. Write `checkpoint-STEP`, then delete old ones beyond `save_total_limit`."""
        check_trained_values(self.model_wrapped)
        self.store_flos()
        output = str(self.args.output_dir)
        folder = Path(output) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(folder)
        if self.is_deepspeed_enabled:
            # accelerate 1.15 steps the engine once per optimizer step, so its count of micro-batches falls behind.
            engine: Any = self.model_wrapped
            engine.micro_steps = self.state.global_step * engine.gradient_accumulation_steps()
        with self.journal.timed("save"):
            save_training_state(
                self.model_wrapped,
                folder,
                optimizer=self._torch_optimizer(),
                extra=self._record(),
                overwrite=True,
            )
        self._saved_step = self.state.global_step
        if self.args.should_save:
            # Who wants no checkpoints gets those that a pruning and the end need, one at a time.
            limit = 1 if self.args.save_strategy == SaveStrategy.NO else self.args.save_total_limit
            delete_old_checkpoints(
                Path(output), limit, best=Path(self.state.best_model_checkpoint or "").name
            )

    def _record(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return to_jsonable(
            {
                "trainer": dataclasses.asdict(self.state),
                "journal": self.journal.to_dict(),
                "phase": self.timeline.phase_at(self.state.global_step).name,
                "global_batch": self._global_batch,
                "dsee": model_state(self.module).config.to_dict(),  # type: ignore[union-attr]
            }
        )

    def _check_record(self, record: dict[str, Any]) -> None:
        if record["global_batch"] != self._global_batch:
            raise ConfigError(
                f"{self._checkpoint} was trained with {record['global_batch']} examples per step, this "
                f"launch has {self._global_batch}: change per_device_train_batch_size or "
                "gradient_accumulation_steps so that their product with the world size stays the same"
            )

    def _torch_optimizer(self) -> Any:
        """The optimizer where there is no engine; an engine has its own."""
        return None if self.is_deepspeed_enabled else getattr(self.optimizer, "optimizer", self.optimizer)

    @property
    def _global_batch(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
