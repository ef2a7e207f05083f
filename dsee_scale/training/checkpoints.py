"""Checkpoints without base weights for any Hugging Face Trainer: how it saves, and how it goes on.

What is overridden here is all that this package knows of the Trainer's insides; a new transformers that moves them
is met in this one file.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    SaveStrategy,
    TrainOutput,
    get_last_checkpoint,
)

from dsee_scale.adapters.state import model_state
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.checkpoint.files import damaged
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.checkpoint.training_state import (
    KIND,
    STATE_FILE,
    check_state,
    load_training_state,
    start_training_state,
)
from dsee_scale.checkpoint.unfinished import UnfinishedState
from dsee_scale.errors import ConfigError
from dsee_scale.partition.master_weights import keep_masters
from dsee_scale.random_state import SeededSampler, random_state, set_epoch, set_random_state
from dsee_scale.training.journal import to_jsonable
from dsee_scale.training.scheduler_state import plain_scheduler, restore_scheduler, scheduler_record
from dsee_scale.training.survival import check_trained_values, delete_old_checkpoints, set_aside_later
from dsee_scale.training.timeline import PruneEvent, check_planned

if TYPE_CHECKING:
    from transformers import Trainer

    Base = Trainer
else:
    Base = object

logger = logging.getLogger(__name__)

ADAPTER_FOLDER = "adapter"


PRIVATE = {
    "_get_train_sampler": ("train_dataset",),
    "_load_best_model": (),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_rng_state": ("checkpoint",),
    "_maybe_log_save_evaluate": (
        "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time", "learning_rate",
    ),
    "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
    "_run_epoch": (
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial",
        "ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained",
        "steps_trained_in_current_epoch",
    ),
    "_save_checkpoint": ("model", "trial"),
}  # fmt: skip
"""The Trainer's private methods that are overridden, with their parameters: alike in transformers 5.3 to 5.24."""


def check_trainer(trainer: type) -> None:
    """Refuse a transformers whose Trainer has moved what is overridden: a checkpoint would be passed over in silence.

    Raises:
        ConfigError: naming the method.
    """
    for name, expected in PRIVATE.items():
        method = getattr(trainer, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if found != expected:
            raise ConfigError(
                f"transformers {transformers.__version__} has {'no' if method is None else 'another'} Trainer.{name}, "
                "with which checkpoints are saved and resumed; expected a version from 5.13 on that this dsee_scale "
                "knows: install transformers 5.24, or a newer dsee_scale"
            )


def read_record(folder: Path) -> dict[str, Any]:
    """What a Trainer with `AdapterCheckpoints` noted in one of its checkpoints. Local.

    Raises:
        FormatError: the folder is no whole checkpoint.
        ConfigError: it was saved by another program.
    """
    values = open_folder(folder, (KIND,)).json(STATE_FILE)
    check_state(values, folder / STATE_FILE)
    extra: dict[str, Any] = values["extra"]
    if not {"trainer", "global_batch"} <= extra.keys():
        raise ConfigError(f"{folder} was saved by another training loop; load it with load_training_state")
    with damaged(folder / STATE_FILE):
        step, done = extra["trainer"]["global_step"], extra.get("journal", {}).get("prunings", [])
        if not isinstance(step, int) or not all(isinstance(each, dict) for each in done):
            raise ValueError("its record of the trainer or the journal is invalid")
    return extra


class AdapterCheckpoints(Base):
    """Stands before a Trainer: a checkpoint holds adapters, optimizer state and mask bits, is complete or not there,
    and can be resumed on another number of processes.

    It is hashed and brought to the disk while the next step computes, and appears when that is done."""

    _checkpoint: Path | None = None
    _unfinished: UnfinishedState | None = None
    _saved_step = -1
    planned: Callable[[int], list[PruneEvent]] | None = None
    """What a callback prunes in a training of so many steps; None where no callback does."""
    _kept: set[Path]  # what could not be deleted; set before it is used
    _random_state: dict[str, Tensor]  # set before it is used

    @property
    def module(self) -> nn.Module:
        """The transformers model, without engine."""
        return self.model  # type: ignore[return-value]

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Collective. The parent's training, from its start or from a checkpoint.

        Args:
            resume_from_checkpoint: a folder `checkpoint-STEP`, or True for the last one. The raw model must have
                got its adapters and masks from it already, by `load_adapter`.
            *args: the parent's.
            **kwargs: the parent's.
        """
        check_trainer(transformers.Trainer)
        self._unfinished, self._kept = None, set()
        try:
            return self._train(resume_from_checkpoint, *args, **kwargs)
        except BaseException:
            if self.args.world_size == 1:  # other ranks may have met no error, and would not join
                self._finish_checkpoint()
            raise

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        if not resume_from_checkpoint:
            return super().train(None, *args, **kwargs)
        if resume_from_checkpoint is True:
            output = str(self.args.output_dir)
            resume_from_checkpoint = get_last_checkpoint(output)
            if resume_from_checkpoint is None:
                raise ConfigError(f"{output} holds no checkpoint to resume; train from the start")
        self._checkpoint = Path(str(resume_from_checkpoint))
        record = read_record(self._checkpoint)
        self._check_record(record)
        # The parent reads its counters from a file of its own; ours are inside the checkpoint's one record.
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / TRAINER_STATE_NAME).write_text(json.dumps(record["trainer"]))
            return super().train(folder, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The parent's, with float32 master weights of what is in half precision, as DeepSpeed's have anyway."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if not self.is_deepspeed_enabled and not optimizer.state:
            keep_masters(optimizer, scaled=self.args.fp16)
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Collective. Write the adapter; the Trainer's own way writes the frozen base."""
        folder = Path(output_dir or str(self.args.output_dir))
        if folder.resolve() == Path(str(self.args.output_dir)).resolve():
            folder /= ADAPTER_FOLDER  # beside the checkpoints, which an overwrite would delete
        save_adapter(self.model_wrapped, folder, overwrite=True)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """The parent's set-up; what it would read with DeepSpeed's own loader is read here."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is not None:
            assert self._checkpoint is not None
            before = random_state()
            extra = load_training_state(
                self.model_wrapped, self._checkpoint, optimizer=self._torch_optimizer()
            )
            self._random_state = random_state()
            set_random_state(before)  # an epoch's order may be drawn from it, as at the start
            if extra.get("scaler") and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(extra["scaler"])
            self._restore(extra)
            if self.planned is not None:
                saved, pruned = extra.get("planned"), bool(model_state(self.module).pruned)
                step, where = self.state.global_step, str(self._checkpoint)
                check_planned(self.planned(max_steps), saved, step, pruned=pruned, where=where)
            scheduler, where = plain_scheduler(self.lr_scheduler), str(self._checkpoint)
            restore_scheduler(scheduler, extra.get("lr_scheduler"), self.state.global_step, where)
        if self.args.save_strategy != SaveStrategy.NO:  # refused now rather than at the first checkpoint
            scheduler_record(plain_scheduler(self.lr_scheduler))
        if resume_from_checkpoint is not None:
            assert self._checkpoint is not None
            set_aside_later(Path(str(self.args.output_dir)), self.state.global_step, self._checkpoint)
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The parent's forward and backward pass, which a checkpoint of the step before had the time of."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._finish_checkpoint()
        return loss

    def _restore(self, record: dict[str, Any]) -> None:
        """What a subclass noted in `_record`."""

    def _run_epoch(self, **kwargs: Any) -> None:  # type: ignore[override]
        """The parent would train one step more when a finished run is resumed (to export it again)."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        set_epoch(kwargs["train_dataloader"], kwargs["epoch"])
        super()._run_epoch(**kwargs)
        # A callback may have ended training after the last step was saved, and what follows reads checkpoints.
        if self.control.should_training_stop or kwargs["epoch"] + 1 >= self.state.num_train_epochs:
            self._finish_checkpoint()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The parent's; its order by length would hang on the global generator and on the rank's part of a batch."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler) and sampler.generator is None:
            sampler.batch_size = self._global_batch
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            return SeededSampler(sampler, seed)
        return sampler

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
        """Collective. Write `checkpoint-STEP`; it appears with the next step at the latest, see `_waits_for_disk`."""
        self._finish_checkpoint()
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
        self._unfinished = start_training_state(
            self.model_wrapped,
            folder,
            optimizer=self._torch_optimizer(),
            extra=self._record(),
            overwrite=True,
        )
        self._saved_step = self.state.global_step
        if self._waits_for_disk():
            self._finish_checkpoint()

    def _waits_for_disk(self) -> bool:
        """Whether a checkpoint must be there at once: after the last step, or for callbacks that are told of it."""
        over = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        callbacks: list[TrainerCallback] = self.callback_handler.callbacks
        return over or any(type(each).on_save is not TrainerCallback.on_save for each in callbacks)

    def _finish_checkpoint(self) -> None:
        """Collective. Put a started checkpoint in its place, then delete old ones beyond `save_total_limit`."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is None:
            return
        unfinished.finish()
        if self.args.should_save:
            # Who wants no checkpoints gets those that a pruning and the end need, one at a time.
            limit = 1 if self.args.save_strategy == SaveStrategy.NO else self.args.save_total_limit
            best = Path(self.state.best_model_checkpoint or "").name
            output = Path(str(self.args.output_dir))
            delete_old_checkpoints(output, limit, step=self._saved_step, best=best, told=self._kept)

    def _record(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        config = model_state(self.module).config
        callbacks: Any = self.state.stateful_callbacks  # a dict, whatever its type says
        callbacks.update(self._callback_states())
        planned = None if self.planned is None else self.planned(self.state.max_steps)
        scaler = self.accelerator.scaler  # of `fp16` without DeepSpeed
        return to_jsonable(
            {
                "scaler": None if scaler is None else scaler.state_dict(),
                "planned": None if planned is None else [event.to_dict() for event in planned],
                "trainer": dataclasses.asdict(self.state),
                "global_batch": self._global_batch,
                "lr_scheduler": scheduler_record(plain_scheduler(self.lr_scheduler)),
                "dsee": None if config is None else config.to_dict(),
            }
        )

    def _callback_states(self) -> dict[str, Any]:
        """By class: the state of its one callback, or those of all in a list, as the parent reads them."""
        states: dict[str, list[Any]] = {}
        for each in [*self.callback_handler.callbacks, self.control]:
            if isinstance(each, ExportableState):
                states.setdefault(type(each).__name__, []).append(each.state())
        return {name: found if len(found) > 1 else found[0] for name, found in states.items()}

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
