"""A Hugging Face Trainer for adapters: one schedule over all phases, and checkpoints without base weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.distributed import raise_on_all_ranks
from dsee_scale.errors import ConfigError, TargetError
from dsee_scale.partition import unwrap
from dsee_scale.sigterm import shelter_workers
from dsee_scale.training.checkpoints import AdapterCheckpoints
from dsee_scale.training.journal import Journal, to_jsonable
from dsee_scale.training.survival import RunWatch
from dsee_scale.training.timeline import Timeline


class GradientWatch:
    """Notes which adapters get a gradient; works where the gradients themselves are partitioned.

        watch = GradientWatch(model)
        loss = model(**batch).loss; loss.backward()
        watch.check()

    Experts that are modules of their own may get no token in a step, and are not asked for; nor are frozen adapters.

    Args:
        model: an injected model, unwrapped; under an engine the engine's module.
    """

    def __init__(self, model: nn.Module) -> None:
        layers: dict[str, Any] = adapted_layers(model)
        self._seen: set[str] = set()
        self._hooks = {
            name: layer.dsee_flat.register_hook(functools.partial(self._note, name))
            for name, layer in layers.items()
            if layer.dsee_flat.requires_grad and (layer.dsee_spec.experts or "experts" not in name.split("."))
        }

    def _note(self, name: str, gradient: Tensor) -> None:
        self._seen.add(name)

    def check(self) -> None:
        """Call it once, after the first backward pass. Local.

        Raises:
            TargetError: naming the adapters without a gradient.
        """
        missing = [name for name in self._hooks if name not in self._seen]
        for hook in self._hooks.values():
            hook.remove()
        self._hooks = {}
        if missing:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise TargetError(
                f"the adapter of {missing[0]}{others} got no gradient in the first training step: the model uses the "
                "layer's weight without calling the layer, or leaves it out; take it out of target_modules"
            )


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


def log_within_step(trainer: Trainer, values: dict[str, float]) -> None:
    """Log at a step's end and leave the step's own log due: transformers (5.23) takes any log for that one."""
    due = trainer.control.should_log
    trainer.log(values)
    trainer.control.should_log = due


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """One optimizer and one engine from the first step to the last; loss and evaluation are transformers' own.

    Differences from its parents: the learning rate follows the timeline, and its journal travels with checkpoints.
    """

    def __init__(self, *, timeline: Timeline, journal: Journal, **kwargs: Any) -> None:
        self.timeline, self.journal = timeline, journal
        self.watch = RunWatch(timeline, journal)
        callbacks = [self.watch, GradientCallback(), *(kwargs.pop("callbacks", None) or [])]
        super().__init__(callbacks=callbacks, **kwargs)

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
        return super().create_optimizer(model)

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

    def get_train_dataloader(self) -> Any:
        """The parent's, whose workers outlive a SIGTERM until the rank has saved."""
        loader: Any = super().get_train_dataloader()
        shelter_workers(loader)
        return loader

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The parent's step; whether the loss is a number is looked at once per optimizer step."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self.watch.saw(loss)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Collective. Run the timeline, from its start or from one of this class's checkpoints."""
        with self.watch.obeying_sigterm():
            return super().train(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Collective. The time that it takes is noted."""
        with self.journal.timed("save"):
            super()._save_checkpoint(model, trial)
        self.watch.leave_if_told(self.state)

    def _waits_for_disk(self) -> bool:
        return self.watch.stopping or super()._waits_for_disk()

    def _restore(self, record: dict[str, Any]) -> None:
        self.journal.restore(record["journal"])

    def _record(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        own = {
            "journal": self.journal.to_dict(),
            "phase": self.timeline.phase_at(self.state.global_step).name,
        }
        return super()._record() | to_jsonable(own)

    def _check_record(self, record: dict[str, Any]) -> None:
        if "journal" not in record:
            raise ConfigError(f"{self._checkpoint} was saved by another training loop, without a journal")
        super()._check_record(record)
