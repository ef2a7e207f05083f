"""Settings of injection and pruning: frozen dataclasses that reject what makes no sense.

The line under each field is its only documentation; `--help` and the docs are made from it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import ClassVar, Literal

from dsee_scale.settings import JsonConfig, at_least, fraction, regex_problems, tuple_of_str

SupportMethod = Literal["grebsmo", "magnitude", "random"]
DecompositionPreset = Literal["fast", "reference"]
Score = Literal["wanda", "W", "AB", "ABS", "WAB", "WABS", "NAB", "NABS", "random", "reap", "frequency"]
Scope = Literal["global", "matrix", "row"]
PoolSelect = Literal["adapted", "others", "all"]


@dataclasses.dataclass(frozen=True)
class Reads:
    """What a score looks at.

    Attributes:
        weight: the weight itself.
        update: s * B A (`BA`), D = s * (B A + S2) (`D`), or neither.
        reciprocal: whether a large value means little.
        activations: what goes in and out of the layers on calibration batches.
    """

    weight: bool = False
    update: Literal["BA", "D"] | None = None
    reciprocal: bool = False
    activations: bool = False

    @property
    def needs_adapter(self) -> bool:
        """Whether a model without adapters has no such score."""
        return self.update is not None and not self.activations


SCORES: dict[Score, Reads] = {
    "wanda": Reads(weight=True, update="D", activations=True),
    "W": Reads(weight=True),
    "AB": Reads(update="BA"),
    "ABS": Reads(update="D"),
    "WAB": Reads(weight=True, update="BA"),
    "WABS": Reads(weight=True, update="D"),
    "NAB": Reads(update="BA", reciprocal=True),
    "NABS": Reads(update="D", reciprocal=True),
    "random": Reads(),
    "reap": Reads(activations=True),
    "frequency": Reads(activations=True),
}
UNIT_PATTERNS = ("heads", "neurons", "experts")
EXPERT_SCORES = ("reap", "frequency", "random")
DEFAULT_SPARSITY = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecompositionConfig(JsonConfig):
    """How a weight is written as low-rank plus sparse, W ~ L + S."""

    preset: DecompositionPreset = "fast"
    """`fast` (default) or `reference`, the paper's loop entry for entry."""
    rank: int = 48
    """Rank of the low-rank part, at most a quarter of the matrix's smaller side; unused by `reference`."""
    iterations: int = 2
    """Rounds at the full rank, after three in which it doubles; unused by `reference`."""
    clip: float = 6.0
    """L is fitted to residuals clipped at this many times their mean size; unused by `reference`."""
    round_memory_mib: int = 64
    """Whole matrices that one rank receives in one round, in MiB (at least one matrix is received)."""

    def problems(self) -> list[str]:
        """What is out of range."""
        problems = at_least(self, 1, "rank", "iterations", "round_memory_mib")
        if not self.clip > 0:
            problems.append(f"clip must be a positive number, found {self.clip!r}")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class DSEEConfig(JsonConfig):
    """What is put into the model: W*M + s(BA + S2), s = alpha / rank."""

    rank: int = 16
    """Rank R of the low-rank update BA."""
    alpha: float = 32.0
    """Scaling numerator; the update is multiplied by alpha / rank."""
    num_sparse: int | float | None = 64
    """Trainable entries of S2 per matrix: a count, or a fraction of its entries in (0, 1); None or 0 is LoRA alone."""
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Modules to adapt: name suffixes (`q_proj`), patterns (`*.attn.*`), or one regular expression (a string)."""
    output_slices: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Adapt only these parts of fused projections: `{"c_attn": ["q", "v"]}` (GPT-2 alone), or "start:stop" outputs."""
    support: SupportMethod = "grebsmo"
    """How S2's positions are chosen: from the decomposition of each weight, the largest |W|, or at random."""
    decomposition: DecompositionConfig = dataclasses.field(default_factory=DecompositionConfig)
    """Settings of the decomposition behind `support="grebsmo"`."""
    trained_modules: tuple[str, ...] = ()
    """Further modules, trained in full (a classifier head), by suffix or pattern."""
    dropout: float = 0.0
    """Dropout on the adapter's input, in [0, 1)."""
    shared_expert_a: bool = False
    """Whether the experts of a layer share one A, each with its own B and S2; otherwise each has its own A."""
    seed: int = 0
    """Seed of A and of the decomposition; combined with each parameter's name, never with the rank of a process."""

    def __post_init__(self) -> None:
        self.convert("target_modules", tuple_of_str)
        self.convert("trained_modules", tuple_of_str)
        self.convert("output_slices", lambda v: {k: tuple_of_str(s) for k, s in dict(v).items()})
        if isinstance(self.decomposition, Mapping):
            self.convert("decomposition", DecompositionConfig.from_dict)
        super().__post_init__()

    def problems(self) -> list[str]:
        """What is out of range."""
        problems = at_least(self, 1, "rank")
        if self.alpha <= 0:
            problems.append(f"alpha must be a positive number, found {self.alpha!r}")
        n = self.num_sparse
        if n is not None and not (n >= 0 if isinstance(n, int) else 0 < n < 1):
            problems.append(
                f"num_sparse must be a whole number, a fraction in (0, 1), or None or 0 for LoRA alone, found {n!r}"
            )
        if not self.target_modules:
            problems.append("target_modules is empty; name at least one module suffix, e.g. 'q_proj'")
        if isinstance(self.target_modules, str):
            problems += regex_problems("target_modules", self.target_modules)
        return problems + fraction(self, "dropout") + at_least(self, 0, "seed")

    @property
    def scaling(self) -> float:
        """s = alpha / rank."""
        return self.alpha / self.rank

    def num_entries(self, numel: int) -> int:
        """N, the entries of S2 that a matrix of `numel` entries holds."""
        n = self.num_sparse or 0
        return n if isinstance(n, int) else max(1, round(n * numel))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool(JsonConfig):
    """Weights that are ranked together and share one sparsity."""

    name: str
    """Label used in reports and errors."""
    sparsity: float
    """Fraction of the pool's weights that are removed, in [0, 1)."""
    select: PoolSelect = "all"
    """`adapted` matrices, all `others`, or `all`."""
    modules: tuple[str, ...] = ()
    """Restrict the pool to these suffixes or patterns; empty means no restriction."""

    def __post_init__(self) -> None:
        self.convert("modules", tuple_of_str)
        super().__post_init__()

    def problems(self) -> list[str]:
        """What is out of range."""
        return fraction(self, "sparsity")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig(JsonConfig):
    """Which frozen weights are set to zero."""

    sparsity: float | None = None
    """Fraction of the weights, heads, neurons or experts removed, in [0, 1), earlier prunings included: entries that
    went with heads, neurons or experts count as removed weights. None means half, or what the pattern N:M, the pools or
    num_per_layer say."""
    pattern: str = "unstructured"
    """`unstructured`, N:M such as `2:4` (N of each M along the input stay), `heads`, `neurons` or `experts`."""
    scope: Scope | None = None
    """`global`: one threshold over a pool (with `refit`, over entries weighted by how much the loss depends on their
    outputs, while each expert's matrix loses the pool's share); `matrix`: the same sparsity in every matrix (or layer,
    for units); `row`: in every output of every matrix. None means `row` for score `wanda` without `refit`, `matrix` for
    experts, else `global`."""
    num_per_layer: int | None = None
    """Heads or experts removed from every layer, or neurons from every feed-forward or expert; in place of sparsity
    and scope."""
    min_per_layer: int = 1
    """Least number of heads, neurons or experts that scope `global` leaves in every layer. One expert more than the
    number chosen per token stays in any case."""
    score: Score = "wanda"
    """Importance of an entry: wanda = |W + D| times the norm of its input over the calibration data (of a head or
    neuron: the norm of what it adds to the block's output), W = |W|,
    AB = |s BA|, ABS = |D|, WAB = |W + s BA|, WABS = |W + D|, NAB = 1/AB, NABS = 1/ABS, random. Of experts: reap (the
    default) = mean over the expert's tokens of gate value times norm of its output, frequency = how many tokens go
    there, random."""
    refit: bool | None = None
    """Solve the remaining weights again, block by block, so that each pruned layer does what the tuned one did;
    the solver chooses what goes by its own activation-aware criterion, and W + D becomes the new frozen weight.
    Of heads and neurons the score chooses, and the others are solved to make up for them.
    None means yes for score `wanda`."""
    block_steps: int = 0
    """Steps of Adam that `refit` then gives a block's remaining weights, one batch from every rank each, so that the
    block's output meets the tuned model's there. For patterns that cost much, such as 2:4. Every rank holds 17 bytes
    for each linear weight of the block meanwhile, beside the block, and the outputs beside the inputs."""
    gram_memory_mib: int = 4096
    """Gram matrices that a rank collects at a time for `refit`, in MiB, and the factors that all ranks share; at least
    one matrix's. A block whose weights fit in besides is fetched once for all batches of a pass, not for each, if
    every rank has the memory."""
    inputs_on_cpu: bool = False
    """Whether `refit` keeps the blocks' arguments (inputs, attention masks, positions; of all batches) in CPU memory
    rather than where the model computes."""
    pools: tuple[Pool, ...] = ()
    """Pools that are ranked separately, each with its own sparsity; empty means one pool with all weights."""
    modules: tuple[str, ...] = ()
    """Restrict pruning to these suffixes or patterns; empty means every linear weight of the blocks."""
    seed: int = 0
    """Seed of score `random`."""
    mask_update: bool = True
    """Whether the updates of pruned matrices are then trained under the mask, as in the masked export; False leaves
    them unmasked, for a sparse base that is served with a separate adapter."""

    final_sparsity: ClassVar[float | None] = None
    """Of one cut of a schedule, the sparsity at its end: the cuts before may be too small to remove anything."""

    def __post_init__(self) -> None:
        self.convert("modules", tuple_of_str)
        self.convert("pools", lambda ps: tuple(p if isinstance(p, Pool) else Pool.from_dict(p) for p in ps))
        super().__post_init__()

    def problems(self) -> list[str]:
        """What is out of range, or contradicts something else."""
        if self.pattern == "experts" and self.score == "wanda":
            object.__setattr__(self, "score", "reap")
        problems = self._settle_sparsity() + self._pattern_problems()
        problems += self._settle_refit() + self._settle_scope() + at_least(self, 1, "gram_memory_mib")
        names = [pool.name for pool in self.pools]
        if len(set(names)) != len(names):
            problems.append(f"pools need different names, found {names}")
        return problems + at_least(self, 0, "seed", "block_steps")

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, None for the others."""
        found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", str(self.pattern))
        return (int(found[1]), int(found[2])) if found else None

    @property
    def removes_units(self) -> bool:
        """Whether whole heads, neurons or experts are removed."""
        return self.pattern in UNIT_PATTERNS

    def _settle_sparsity(self) -> list[str]:
        """Half unless something else says how much goes; the same said twice must agree."""
        if self.n_of_m is not None:
            n, m = self.n_of_m
            if not 1 <= n < m:
                return [f"pattern {self.pattern!r} keeps {n} of each {m}; expected 1 <= N < M"]
            if self.sparsity is not None and not math.isclose(self.sparsity, 1 - n / m):
                return [
                    f"pattern {self.pattern!r} means a sparsity of {1 - n / m:g}, found {self.sparsity!r}; "
                    "leave sparsity out"
                ]
            object.__setattr__(self, "sparsity", 1 - n / m)
            return []
        if self.pools or self.num_per_layer is not None:
            other = "each pool has its own" if self.pools else "num_per_layer says how many go"
            if self.sparsity is None:
                return []
            return [f"sparsity {self.sparsity!r} has no effect: {other}; leave it out"]
        if self.sparsity is None:
            object.__setattr__(self, "sparsity", DEFAULT_SPARSITY)
        return fraction(self, "sparsity")

    def _settle_scope(self) -> list[str]:
        """What suits the score, else one threshold; refuse a scope that would do nothing."""
        found = self.scope
        if found is None:
            by_row = self.score == "wanda" and self.pattern == "unstructured" and not self.refit
            other = "matrix" if self.pattern == "experts" else "global"
            object.__setattr__(self, "scope", "row" if by_row else other)
            return []
        if found == "row" and self.pattern != "unstructured":
            return [f"scope 'row' goes with pattern 'unstructured', found {self.pattern!r}; leave scope out"]
        if self.min_per_layer != 1 and found != "global":
            return [
                f"min_per_layer goes with scope 'global', found {found!r}; use num_per_layer, or leave it out"
            ]
        return []

    def _settle_refit(self) -> list[str]:
        """On by default wherever it can be done; refuse it where it can't."""
        if self.refit is None:
            object.__setattr__(self, "refit", self.score == "wanda")
        if not self.refit:
            return [] if not self.block_steps else ["block_steps goes with refit; leave it out, or refit"]
        problems = []
        if self.pattern == "experts":
            problems.append("refit does not go with pattern 'experts'; leave it out")
        if self.score != "wanda" and not self.removes_units:
            problems.append(f"refit chooses by activations; leave score {self.score!r} out, or refit")
        return problems

    def _pattern_problems(self) -> list[str]:
        problems = []
        if self.n_of_m is None and self.pattern != "unstructured" and not self.removes_units:
            problems.append(
                f"pattern {self.pattern!r} is unknown; valid: 'unstructured', N:M such as '2:4', "
                "'heads', 'neurons', 'experts'"
            )
        if (self.pattern == "experts" and self.score not in EXPERT_SCORES) or (
            self.pattern != "experts" and self.score in ("reap", "frequency")
        ):
            problems.append(
                f"score {self.score!r} does not go with pattern {self.pattern!r}; scores of experts: "
                f"{', '.join(EXPERT_SCORES)}"
            )
        if self.pattern != "unstructured" and self.pools:
            problems.append(f"pools go with pattern 'unstructured', found {self.pattern!r}")
        if self.removes_units and self.modules:
            problems.append(f"pattern {self.pattern!r} chooses its matrices itself; leave `modules` out")
        if not self.removes_units and (self.num_per_layer is not None or self.min_per_layer != 1):
            problems.append("num_per_layer and min_per_layer go with pattern 'heads', 'neurons' or 'experts'")
        problems += at_least(self, 1, "num_per_layer", "min_per_layer")
        if self.num_per_layer is not None and self.min_per_layer != 1:
            problems.append("give num_per_layer (the same in every layer) or min_per_layer, not both")
        return problems


def paper_pools(adapted: float, others: float) -> tuple[Pool, Pool]:
    """The paper's two pools: the adapted matrices and all other linear weights of the blocks."""
    return (
        Pool(name="adapted", select="adapted", sparsity=adapted),
        Pool(name="others", select="others", sparsity=others),
    )
