"""Gradual pruning: the sparsity to have at each step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from dsee_scale.config import PruneConfig
from dsee_scale.errors import ConfigError
from dsee_scale.settings import JsonConfig, at_least, fraction


@dataclass(frozen=True, kw_only=True)
class GradualConfig(JsonConfig):
    """Pruning in small cuts from the end of tune on: what a recipe says of a CubicSchedule."""

    num_steps: int
    """Steps from the first cut to the final sparsity; they belong to retune."""
    every: int = 1
    """Cut once in so many steps."""
    initial_sparsity: float = 0.0
    """Sparsity of the first cut, at most the final one."""

    def problems(self) -> list[str]:
        """What is out of range."""
        return at_least(self, 1, "num_steps", "every") + fraction(self, "initial_sparsity")


@dataclass(frozen=True, kw_only=True)
class CubicSchedule(GradualConfig):
    """Sparsity that rises fast at first and slowly at the end (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1).

    In a training loop, right after a step of the optimizer (heads and neurons are refused while accumulated
    gradients wait for one):

        done = engine.global_steps
        for batch in loader:
            engine.backward(loss_of(engine, batch))
            engine.step()
            if engine.global_steps > done and schedule.due(engine.global_steps):
                dsee_scale.prune(engine, schedule.config(base_config, engine.global_steps), calibration)
            done = engine.global_steps

    With `score="W"` no calibration is needed.
    """

    final_sparsity: float
    """Sparsity at the end, in [0, 1)."""
    start_step: int
    """Step of the first cut."""

    def problems(self) -> list[str]:
        """What is out of range."""
        found = super().problems() + fraction(self, "final_sparsity") + at_least(self, 0, "start_step")
        if self.initial_sparsity > self.final_sparsity:
            found.append(
                f"initial_sparsity {self.initial_sparsity} is above final_sparsity {self.final_sparsity}"
            )
        return found

    def sparsity(self, step: int) -> float:
        """Fraction of the weights that are zero after `step`."""
        if step < self.start_step:
            return 0.0
        left = 1 - min(1.0, (step - self.start_step) / self.num_steps)
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * left**3

    def due(self, step: int) -> bool:
        """Whether to prune at this step: every so many, and at the last one."""
        since = step - self.start_step
        return 0 <= since <= self.num_steps and (since % self.every == 0 or since == self.num_steps)

    def config(self, config: PruneConfig, step: int) -> PruneConfig:
        """`config` with this step's sparsity; pools keep their proportion to the final one.

        Early cuts that are too small for a head, a neuron or an expert remove nothing.

        Raises:
            ConfigError: the pattern removes a fixed number.
        """
        if problems := _fixed_number(config):
            raise ConfigError(problems[0])
        sparsity = self.sparsity(step)
        share = sparsity / self.final_sparsity if self.final_sparsity else 0.0
        pools = tuple(dataclasses.replace(pool, sparsity=pool.sparsity * share) for pool in config.pools)
        cut = dataclasses.replace(config, sparsity=None if pools else sparsity, pools=pools)
        object.__setattr__(cut, "final_sparsity", self.final_sparsity)
        return cut


def schedule_problems(configs: Sequence[PruneConfig]) -> list[str]:
    """Why these prunings cannot follow a schedule; known before the training that would come to them."""
    if len(configs) != 1:
        return [f"a schedule goes with one pruning, found {len(configs)}"]
    problems = _fixed_number(configs[0])
    if configs[0].refit:
        problems.append("a schedule does not go with refit, the default with score 'wanda': turn refit off")
    return problems


def _fixed_number(config: PruneConfig) -> list[str]:
    if config.n_of_m is None and config.num_per_layer is None:
        return []
    return [
        f"a schedule raises a sparsity step by step, and pattern {config.pattern!r} here removes a fixed number"
    ]
