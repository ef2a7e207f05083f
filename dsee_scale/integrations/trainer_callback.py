"""Tune, prune and retune in any Hugging Face Trainer, TRL's included, by one callback."""

from __future__ import annotations

import collections
import inspect
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import skip_first_batches
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.config import SCORES, PruneConfig
from dsee_scale.errors import ConfigError, RunError, TargetError
from dsee_scale.export.export import BASE_FOLDER, save_base
from dsee_scale.integrations.callback_settings import setting_problems
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.pruning.checks import check_in_order
from dsee_scale.pruning.prune import prune
from dsee_scale.pruning.schedule import CubicSchedule
from dsee_scale.random_state import random_state, set_epoch, set_random_state
from dsee_scale.training.base_trainer import GradientCallback, log_within_step
from dsee_scale.training.checkpoints import AdapterCheckpoints
from dsee_scale.training.timeline import PruneEvent

logger = logging.getLogger(__name__)

_CLASSES: dict[type, type] = {}


class DSEECallback(GradientCallback):
    """What a Trainer needs for an injected model: small checkpoints, and pruning on the way.

        dsee_scale.inject(model, DSEEConfig(...))
        trainer = SFTTrainer(model, args, train_dataset=data, callbacks=[DSEECallback(prune=PruneConfig(), at=0.3)])

    Its checkpoints hold adapters, masks and optimizer state, never a base weight, and `trainer.save_model` writes the
    adapter. To resume, load `base_of(checkpoint, published)` (a checkpoint saved after a re-fit goes on from
    `output_dir/base`, an earlier one does not), put `load_adapter(model, checkpoint)` where `inject` stands, and
    `trainer.train(resume_from_checkpoint=checkpoint)`, on any number of ranks. The callback must be one that would have
    pruned until then as it was done; what is still to come may change.

    Pruning is collective. It comes after the optimizer step, before that step's checkpoint. What scores look at are
    the model's own last inputs in training, with their labels, each rank's; those before the checkpoint a resumed
    training reads from its data again (other ones where batches depend on more than seed, epoch and place, or the
    number of ranks is another; none of a stream). At step 0 they are the first batches of the data, which the
    training sees again, but for a stream that gives its rows once: give another `at`, or `score="W"`, with one.
    After a re-fit the new base is written to `output_dir/base`.
    """

    def __init__(
        self,
        prune: PruneConfig | Sequence[PruneConfig] | None = None,
        at: float | CubicSchedule | None = None,
        *,
        calibration_batches: int = 64,
    ) -> None:
        """Settings, checked at once.

        Args:
            prune: what to remove; several, one after the other; None only makes checkpoints small.
            at: when: a fraction of the training in [0, 1), a step (a whole number), or a schedule that prunes to a
                rising sparsity.
            calibration_batches: micro-batches that each rank keeps for scores that look at activations.

        Raises:
            ConfigError: settings that make no sense.
        """
        super().__init__()
        one = prune is not None and not isinstance(prune, (list, tuple))
        self.configs: list[Any] = [prune] if one else [*(prune or ())]  # type: ignore[misc]
        self.at, self.calibration_batches = at, calibration_batches
        problems = setting_problems(self.configs, at, calibration_batches)
        if problems:
            raise ConfigError("; ".join(problems))
        self._inputs: collections.deque[dict[str, Tensor]] = collections.deque(maxlen=calibration_batches)
        self._trainer: Any = None
        self._steps: list[int] = []
        self._hook: Any = None
        self._refitted: Any = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Take hold of the Trainer that is being made."""
        trainer = _trainer_that_calls(self)
        if not adapted_layers(trainer.model):
            raise TargetError(
                "DSEECallback found no adapters in the model: call dsee_scale.inject(model, config) before the "
                f"{type(trainer).__name__} is made"
            )
        if args.push_to_hub:
            raise ConfigError(
                "push_to_hub uploads whole models; leave it out, and upload what save_adapter or export_model wrote"
            )
        if self.configs and args.auto_find_batch_size:
            raise ConfigError(
                "auto_find_batch_size starts the training again on a model that is pruned already; leave it out, and "
                "set per_device_train_batch_size"
            )
        keep_checkpoints_small(trainer)
        trainer.planned = self._planned
        self._trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Fix the steps, refuse what can't be pruned then; prune at once where the training is to begin with it."""
        if self._trainer is None:
            raise ConfigError(
                "DSEECallback was added to a finished Trainer; give it as callbacks=[DSEECallback(...)]"
            )
        open_partition(self._trainer.model_wrapped)  # refuses what is split in a way that no pass knows
        super().on_train_begin(args, state, control, model=model, **kwargs)
        events = self._planned(state.max_steps)
        if events and events[-1].step >= state.max_steps:
            raise ConfigError(
                f"the model is to be pruned at step {events[-1].step}, and training ends at step {state.max_steps}: "
                "prune earlier, so that it is retuned"
            )
        started = state.global_step
        if events and not started and self._refitted is unwrap(self._trainer.model):
            raise ConfigError(
                "this training begins anew on a model that its DSEECallback has pruned and re-fitted already; train on "
                "with a Trainer that has a new DSEECallback, without a pruning or with a further one"
            )
        # A checkpoint of a step holds what was removed at it.
        coming = [event for event in events if event.step > started or event.step == started == 0]
        self._steps = [event.step for event in coming]
        for event in coming:
            check_in_order(self._trainer.model, event.configs)
        self._inputs.clear()
        self._watch_inputs()
        if started and self._hook is not None:
            before = random_state()
            self._recall_inputs(started, train_dataloader)
            set_random_state(before)
        self._prune_if_due(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Collective. Prune if this is the step."""
        super().on_step_end(args, state, control, **kwargs)
        self._prune_if_due(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Refuse to call a training a success that was not pruned as planned."""
        if self._steps:
            raise RunError(
                f"training ended at step {state.global_step}, before the pruning at step {self._steps[0]}: "
                "prune earlier, or train longer"
            )

    def _planned(self, max_steps: int) -> list[PruneEvent]:
        """All prunings, in order."""
        if isinstance(self.at, CubicSchedule):
            last = self.at.start_step + self.at.num_steps
            steps = [step for step in range(self.at.start_step, last + 1) if self.at.due(step)]
        elif self.at is None:
            steps = []
        else:
            steps = [round(self.at * max_steps) if isinstance(self.at, float) else self.at]
        return [PruneEvent(step=step, configs=tuple(self._configs(step))) for step in steps]

    def _configs(self, step: int) -> list[PruneConfig]:
        if isinstance(self.at, CubicSchedule):
            return [self.at.config(self.configs[0], step)]
        return self.configs

    def _prune_if_due(self, state: TrainerState) -> None:
        """Collective where it is due."""
        if not self._steps or state.global_step != self._steps[0]:
            return
        trainer, step = self._trainer, self._steps.pop(0)
        configs = self._configs(step)
        report = prune(trainer.model_wrapped, configs, self._calibration() if self._wants_inputs() else None)
        self._watch_inputs()
        if any(config.refit for config in configs):
            self._refitted = unwrap(trainer.model)
            folder = Path(str(trainer.args.output_dir)) / BASE_FOLDER
            save_base(trainer.model_wrapped, folder, tokenizer=trainer.processing_class)
        # A tuned model that is not pruned must never win against the pruned ones.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        log_within_step(trainer, {"sparsity": report.sparsity, "pruned_weights": report.removed})

    def _wants_inputs(self) -> bool:
        return any(config.refit or SCORES[config.score].activations for config in self.configs)

    def _watch_inputs(self) -> None:
        """Note inputs while a pruning is to come that looks at them, and no longer: a note is a copy to the host."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if self._steps and self._wants_inputs():
            self._hook = self._trainer.model.register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        else:
            self._inputs.clear()

    def _calibration(self) -> list[dict[str, Tensor]]:
        """This rank's last inputs; of a training that is to begin with the pruning, its first batches."""
        training = len(self._inputs)
        if not training:
            self._keep_batches(
                itertools.islice(self._trainer.get_train_dataloader(), self.calibration_batches)
            )
        found = list(self._inputs)
        if not training:  # they are no inputs of the training yet
            self._inputs.clear()
        if not found:
            raise ConfigError(
                f"the batches of this {type(self._trainer).__name__} are not inputs of the model, so a pruning before "
                "the first step has nothing to look at: prune at step 1 or later, or by score='W'"
            )
        return found

    def _recall_inputs(self, started: int, loader: Any) -> None:
        """Read again what was noted before the checkpoint of this step and would still be kept at the next pruning."""
        accumulated = self._trainer.args.gradient_accumulation_steps
        if not has_length(loader):  # a stream may give its rows once only
            logger.warning(
                "resumed at step %d, the data is a stream and isn't read again: the pruning at step %d looks at the "
                "batches since",
                started,
                self._steps[0],
            )
            return
        length = len(loader)

        def batches(steps: int) -> int:
            epochs, within = divmod(steps, max(1, math.ceil(length / accumulated)))
            return epochs * length + within * accumulated

        done = batches(started)
        missing = min(done, max(0, self.calibration_batches - (batches(self._steps[0]) - done)))
        at = done - missing
        while at < done:
            epoch, index = divmod(at, length)
            count = min(length - index, done - at)
            self._keep_batches(itertools.islice(_of_epoch(loader, epoch, index), count))
            at += count
        if len(self._inputs) < missing:
            logger.warning(
                "resumed at step %d, %d of %d batches before it cannot be read again as inputs of the model: the "
                "pruning at step %d looks at fewer than it would have",
                started,
                missing - len(self._inputs),
                missing,
                self._steps[0],
            )

    def _keep_batches(self, batches: Iterable[Any]) -> None:
        trainer = self._trainer
        known = _arguments(trainer.model)
        if trainer.label_smoother is not None or trainer.compute_loss_func is not None:
            known = [key for key in known if key != "labels"]  # such a Trainer gives the model none
        for batch in batches:
            self._keep(
                {key: batch[key] for key in known if key in batch} if isinstance(batch, Mapping) else {}
            )

    def _note_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the model is trained on; not what it generates or is evaluated on."""
        if module.training and kwargs.get("past_key_values") is None:
            self._keep(dict(zip(_arguments(module), args, strict=False)) | kwargs)

    def _keep(self, inputs: Mapping[str, Any]) -> None:
        ids, embeds, labels = (inputs.get(key) for key in ("input_ids", "inputs_embeds", "labels"))
        if isinstance(ids, Tensor):
            shape = ids.shape
        elif isinstance(embeds, Tensor):
            shape = embeds.shape[:-1]
        else:
            return
        left_out = {"num_items_in_batch"}
        if isinstance(labels, Tensor) and labels.shape not in (shape, shape[:1]):
            left_out.add("labels")  # of a loss that no calibration knows
        self._inputs.append(
            {
                key: value.detach().to("cpu", copy=True)
                for key, value in inputs.items()
                if isinstance(value, Tensor) and key not in left_out
            }
        )


def keep_checkpoints_small(trainer: Trainer) -> None:
    """Let a Trainer save and load checkpoints as `AdapterCheckpoints` does, in place."""
    own = type(trainer)
    if isinstance(trainer, AdapterCheckpoints):
        return
    if own not in _CLASSES:
        namespace = {"__module__": own.__module__, "__doc__": own.__doc__}
        _CLASSES[own] = type(own.__name__, (AdapterCheckpoints, own), namespace)
    trainer.__class__ = _CLASSES[own]


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _of_epoch(loader: Any, epoch: int, first: int) -> Any:
    """A Trainer's batches of an epoch from the first one on, as `Trainer._run_epoch` orders them when it resumes."""
    part: Any = skip_first_batches(loader, first)  # one of its own: the Trainer's begins anew
    set_epoch(part, epoch)
    return part


def _trainer_that_calls(callback: DSEECallback) -> Any:
    """The Trainer whose constructor is running: transformers (5.23) hands callbacks all of its parts but itself."""
    frame: Any = sys._getframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
        frame = frame.f_back
    raise ConfigError(
        "DSEECallback works in a Hugging Face Trainer: give it as callbacks=[DSEECallback(...)]"
    )
