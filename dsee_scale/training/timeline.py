"""Which step belongs to which phase, when weights are pruned, and the learning rate at each step.

One optimizer runs through the whole timeline: steps [0, T1) tune, weights are pruned after step T1, and
steps [T1, T1 + T2) retune. The optimizer's moments go on across the prune, and so does the learning rate's
schedule at twice the rate, unless retune names one of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import TrainingArguments, get_scheduler

from dsee_scale.config import PruneConfig
from dsee_scale.errors import ConfigError, RunError
from dsee_scale.pruning.schedule import CubicSchedule, GradualConfig, schedule_problems
from dsee_scale.recipe.recipe import Recipe
from dsee_scale.recipe.sections import RetuneConfig

PhaseName = Literal["tune", "retune"]

RETUNE_FACTOR = 2.0
"""How far the rate of a schedule that spans both phases is raised after the prune, never beyond its peak."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over some steps."""

    section: str
    """Names the recipe's section in errors."""
    length: int
    """Steps."""
    learning_rate: float
    """Peak learning rate."""
    warmup_steps: float
    """Steps of warm-up; below 1, a fraction of all."""
    name: str
    """Name of the decay, as in TrainingArguments."""
    kwargs: Mapping[str, Any]
    """Its further arguments."""

    def rates(self) -> list[float]:
        """Learning rate of each step."""
        warmup = self.warmup_steps
        warmup = math.ceil(warmup * self.length) if warmup < 1 else int(warmup)
        unit = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=self.learning_rate)
        try:
            scheduler = get_scheduler(self.name, unit, warmup, self.length, dict(self.kwargs))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.section}: lr_scheduler_kwargs {self.kwargs!r}: {error}") from error
        return [self.learning_rate * float(scheduler.lr_lambdas[0](step)) for step in range(self.length)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps [start, stop)."""

    name: PhaseName
    """`tune` or `retune`."""
    start: int
    """First step."""
    stop: int
    """Step after the last one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneEvent:
    """One change of the masks."""

    step: int
    """It happens once this many optimizer steps are done."""
    configs: tuple[PruneConfig, ...]
    """What is set to zero then, in order; sparsity is the total, zeros of earlier events included."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the journal, by which a resumed run knows what was done."""
        return {"step": self.step, "prune": [config.to_dict() for config in self.configs]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A run's steps."""

    phases: tuple[Phase, ...]
    """Phases of at least one step, in order, without gaps."""
    prune_events: tuple[PruneEvent, ...]
    """Changes of the masks, in order."""
    schedules: tuple[Schedule, ...]
    """One after the other, over all steps."""

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.phases[-1].stop if self.phases else 0

    def phase_at(self, step: int) -> Phase:
        """The phase of the optimizer step with this index; the last phase after the end."""
        return next((phase for phase in self.phases if step < phase.stop), self.phases[-1])

    def learning_rates(self) -> list[float]:
        """Learning rate of every step; see `RETUNE_FACTOR`."""
        rates = [rate for schedule in self.schedules for rate in schedule.rates()]
        if len(self.schedules) == 1 < len(self.phases):
            start, peak = self.phases[-1].start, self.schedules[0].learning_rate
            rates[start:] = [min(peak, RETUNE_FACTOR * rate) for rate in rates[start:]]
        return rates

    def check_resumed(self, step: int, done: Sequence[Mapping[str, Any]], where: str) -> None:
        """Refuse to go on from a checkpoint that is beyond this run's end, or that was pruned otherwise.

        Args:
            step: the checkpoint's.
            done: prunings that it has done, as `PruneEvent.to_dict` gives them.
            where: names the checkpoint.

        Raises:
            ConfigError: see above. A pruning due at the very step may be missing: it is made up for.
        """
        if step > self.num_steps:
            raise ConfigError(
                f"{where} is at step {step}, and this run ends at step {self.num_steps}: nothing would be trained. "
                "Lengthen training or retune, or resume an earlier checkpoint"
            )
        due = [event.to_dict() for event in self.prune_events if event.step <= step]
        if list(done) not in (due, [event for event in due if event["step"] < step]):
            raise ConfigError(
                f"{where} is at step {step} and was pruned {_at_steps(done)}; by this recipe it would have been pruned "
                f"{_at_steps(due)}{_otherwise(done, due)}. Resume with the settings that it was made with "
                "(training.max_steps, prune, gradual), or an earlier checkpoint"
            )

    def check_finished(self, step: int, done: Sequence[Mapping[str, Any]]) -> None:
        """Refuse to call a run a success that did not train or prune all that was planned.

        Raises:
            RunError: naming what is missing.
        """
        planned = [event.to_dict() for event in self.prune_events]
        if step != self.num_steps or list(done) != planned:
            raise RunError(
                f"the run stands at step {step} of {self.num_steps} and was pruned {_at_steps(done)}, while "
                f"{_at_steps(planned)} was planned{_otherwise(done, planned)}: nothing was saved or exported from it. "
                "Relaunch with --resume"
            )


def check_planned(
    planned: Sequence[PruneEvent],
    saved: Sequence[Mapping[str, Any]] | None,
    step: int,
    *,
    pruned: bool,
    where: str,
) -> None:
    """Refuse a plan by which a checkpoint's model would have been pruned otherwise. Local.

    Args:
        planned: all prunings of the training that resumes.
        saved: those of the one that saved, as `PruneEvent.to_dict` gives them; None of checkpoints that don't tell.
        step: the checkpoint's; the pruning at that step is in it.
        pruned: whether its model is pruned.
        where: names the checkpoint.

    Raises:
        ConfigError: see above. Prunings after the step may change.
    """
    due = [event.to_dict() for event in planned if event.step <= step]
    if saved is None:
        wrong, other = bool(planned) and pruned != bool(due), ""
        was = "at a step that it does not tell" if pruned else "never"
    else:
        done = [event for event in saved if event["step"] <= step]
        wrong, was, other = done != due, _at_steps(done), _otherwise(done, due)
    if wrong:
        raise ConfigError(
            f"{where} is at step {step} and was pruned {was}; by this DSEECallback it would have been pruned "
            f"{_at_steps(due)}{other}. Resume with the prune, at and max_steps that it was made with (if the "
            "training's length has changed: at as a whole step), or an earlier checkpoint"
        )


def _at_steps(events: Sequence[Mapping[str, Any]]) -> str:
    steps = [str(event.get("step")) for event in events]
    return f"at step {', '.join(steps)}" if steps else "never"


def _otherwise(done: Sequence[Mapping[str, Any]], planned: Sequence[Mapping[str, Any]]) -> str:
    same = [event.get("step") for event in done] == [event.get("step") for event in planned]
    return ", with other settings" if same and list(done) != list(planned) else ""


def build_timeline(recipe: Recipe, args: TrainingArguments, steps_per_epoch: int) -> Timeline:
    """Lay out a run.

    Args:
        recipe: prune, retune and gradual sections; null where there is no such phase.
        args: the tune phase: `max_steps` (0 for none) or, when that is negative, `num_train_epochs`.
        steps_per_epoch: optimizer steps in one pass over the training rows.

    Raises:
        ConfigError: no step at all, or cuts beyond the last step.
    """
    retune = recipe.retune
    tune_steps = args.max_steps if args.max_steps >= 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    phases = [Phase(name="tune", start=0, stop=tune_steps)] if tune_steps else []
    if retune is not None:
        length = retune.max_steps
        if length is None:
            length = math.ceil((retune.num_train_epochs or 0) * steps_per_epoch)
        phases.append(Phase(name="retune", start=tune_steps, stop=tune_steps + length))
    if not phases:
        raise ConfigError("training.max_steps is 0 and there is no retune: the run would train nothing")
    events = _prune_events(recipe.prune, recipe.gradual, tune_steps)
    if events and events[-1].step > phases[-1].stop:
        raise ConfigError(
            f"gradual.num_steps: the last cut is at step {events[-1].step}, after the run's last step "
            f"{phases[-1].stop}; prune in fewer steps or retune longer"
        )
    return Timeline(
        phases=tuple(phases),
        prune_events=events,
        schedules=_schedules(phases, args, retune),
    )


def training_schedule(args: TrainingArguments, length: int) -> Schedule:
    """The schedule that the arguments name, over so many steps."""
    return Schedule(
        section="training",
        length=length,
        learning_rate=args.learning_rate,
        warmup_steps=args.warmup_steps,
        name=str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        kwargs=dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
    )


def _schedules(
    phases: Sequence[Phase], args: TrainingArguments, retune: RetuneConfig | None
) -> tuple[Schedule, ...]:
    """One schedule over all steps, or one for each phase where retune names its own."""
    changes: dict[str, Any] = {}
    if retune is not None:
        changes = {
            "learning_rate": retune.learning_rate,
            "warmup_steps": retune.warmup_steps,
            "name": retune.lr_scheduler_type,
            "kwargs": retune.lr_scheduler_kwargs,
        }
        changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return (training_schedule(args, phases[-1].stop),)
    *before, own = (training_schedule(args, phase.stop - phase.start) for phase in phases)
    return (*before, dataclasses.replace(own, section="retune", **changes))


def _prune_events(
    prune: tuple[PruneConfig, ...], gradual: GradualConfig | None, first: int
) -> tuple[PruneEvent, ...]:
    if gradual is None:
        return (PruneEvent(step=first, configs=prune),) if prune else ()
    if problems := schedule_problems(prune):
        raise ConfigError("section gradual: " + "; ".join(problems))
    config = prune[0]
    final = max((pool.sparsity for pool in config.pools), default=config.sparsity or 0.0)
    schedule = CubicSchedule(**gradual.to_dict(), final_sparsity=final, start_step=first)
    steps = range(first, first + gradual.num_steps + 1)
    return tuple(
        PruneEvent(step=step, configs=(schedule.config(config, step),))
        for step in steps
        if schedule.due(step)
    )


def steps_per_epoch(num_rows: int, args: TrainingArguments) -> int:
    """Optimizer steps in one pass over `num_rows`, counted as the Trainer counts them.

    Raises:
        ConfigError: the rows are too few for a single batch.
    """
    per_step = args.per_device_train_batch_size * args.world_size
    batches = num_rows // per_step if args.dataloader_drop_last else math.ceil(num_rows / per_step)
    if not batches:
        raise ConfigError(
            f"the training data make {num_rows} examples, and training.dataloader_drop_last drops a batch of fewer "
            f"than {per_step} (per_device_train_batch_size * world size): no step would be made. Lower "
            "per_device_train_batch_size, or set dataloader_drop_last to false"
        )
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))
