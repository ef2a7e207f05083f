"""Gradual pruning: the sparsity to have at each step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dsee_scale.config import PruneConfig
from dsee_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CubicSchedule:
    """Sparsity that rises fast at first and slowly at the end (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1).

    In a training loop:

        for step, batch in enumerate(loader):
            if schedule.due(step):
                dsee_scale.prune(engine, schedule.config(base_config, step))
    """

    final_sparsity: float
    """Sparsity at the end, in [0, 1)."""
    start_step: int
    """Step of the first pruning."""
    num_steps: int
    """Steps from the first pruning to the final sparsity."""
    initial_sparsity: float = 0.0
    """Sparsity at `start_step`."""
    every: int = 1
    """Prune once in so many steps."""

    def __post_init__(self) -> None:
        if not 0 <= self.initial_sparsity <= self.final_sparsity < 1:
            raise ConfigError(
                "CubicSchedule: expected 0 <= initial_sparsity <= final_sparsity < 1, "
                f"found {self.initial_sparsity} and {self.final_sparsity}"
            )
        if self.num_steps < 1 or self.every < 1 or self.start_step < 0:
            raise ConfigError(
                "CubicSchedule: expected num_steps >= 1, every >= 1 and start_step >= 0, "
                f"found {self.num_steps}, {self.every} and {self.start_step}"
            )

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
        """`config` with this step's sparsity; pools keep their proportion to the final one."""
        sparsity = self.sparsity(step)
        share = sparsity / self.final_sparsity if self.final_sparsity else 0.0
        pools = tuple(dataclasses.replace(pool, sparsity=pool.sparsity * share) for pool in config.pools)
        return dataclasses.replace(config, sparsity=sparsity, pools=pools)
