"""Gradual pruning: the sparsity to have at each step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dsee_scale.config import JsonConfig, PruneConfig
from dsee_scale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GradualConfig(JsonConfig):
    """Pruning in small cuts from the end of tune on: what a recipe says of a CubicSchedule."""

    num_steps: int
    """Steps from the first cut to the final sparsity; they belong to retune."""
    every: int = 1
    """Cut once in so many steps."""
    initial_sparsity: float = 0.0
    """Sparsity of the first cut, at most the final one."""

    def __post_init__(self) -> None:
        steps = [
            f"{name} {getattr(self, name)!r}" for name in ("num_steps", "every") if not self._counts(name)
        ]
        problems = [f"{step} is no whole number of at least 1" for step in steps]
        if not isinstance(self.initial_sparsity, (int, float)) or not 0 <= self.initial_sparsity < 1:
            problems.append(f"initial_sparsity must lie in [0, 1), found {self.initial_sparsity!r}")
        if problems:
            raise ConfigError(f"{type(self).__name__}: {'; '.join(problems)}")

    def _counts(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, kw_only=True)
class CubicSchedule(GradualConfig):
    """Sparsity that rises fast at first and slowly at the end (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1).

    In a training loop:

        for step, batch in enumerate(loader):
            if schedule.due(step):
                dsee_scale.prune(engine, schedule.config(base_config, step))
    """

    final_sparsity: float
    """Sparsity at the end, in [0, 1)."""
    start_step: int
    """Step of the first cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.initial_sparsity <= self.final_sparsity < 1 or self.start_step < 0:
            raise ConfigError(
                "CubicSchedule: expected initial_sparsity <= final_sparsity < 1 and start_step >= 0, "
                f"found {self.initial_sparsity}, {self.final_sparsity} and {self.start_step}"
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
