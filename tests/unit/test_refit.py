"""Re-fitting over a Gram matrix, against plain references in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsee_scale.algorithms.refit import refit_kept, sparsegpt, to_storage
from dsee_scale.algorithms.sweep import BLOCK, Count, Groups

pytestmark = pytest.mark.unit
SHAPES = [(24, 40), (17, 300), (1, 64), (33, 1), (40, BLOCK), (64, 2 * BLOCK + 5)]


def problem(outputs: int, inputs: int, tokens: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / math.sqrt(inputs) + torch.eye(inputs)
    scale = torch.rand(inputs, generator=generator).mul(3).exp()
    found = (torch.randn(tokens, inputs, generator=generator) @ mix) * scale
    return torch.randn(outputs, inputs, generator=generator), found.T @ found


def error(weight: Tensor, solved: Tensor, gram: Tensor, added: float = 0.0) -> float:
    damped = gram.double() + added * torch.eye(len(gram), dtype=torch.float64)
    change = weight.double() - solved.double()
    return float(((change @ damped) * change).sum())


def added(gram: Tensor) -> float:
    return 0.01 * float(gram.diagonal().double().mean())


def least_squares(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """Row by row, in float64, of the damped problem."""
    damped = gram.double() + added(gram) * torch.eye(len(gram), dtype=torch.float64)
    target = weight.double() @ damped
    solved = torch.zeros_like(target)
    for row, places in enumerate(kept):
        solved[row, places] = torch.linalg.solve(damped[places][:, places], target[row, places])
    return solved


def plain_sparsegpt(weight: Tensor, gram: Tensor, per_block: list[int]) -> Tensor:
    """The paper's loop over columns, in float64, the choice made per block as in its released code."""
    damped = gram.double() + added(gram) * torch.eye(len(gram), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    w = weight.double().clone()
    for block, num_remove in enumerate(per_block):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, w.shape[1])
        costs = (w[:, start:stop] / upper.diagonal()[start:stop]) ** 2
        gone = torch.zeros(costs.numel(), dtype=torch.bool)
        gone[costs.flatten().argsort(stable=True)[:num_remove]] = True
        gone = gone.view(costs.shape)
        for column in range(start, stop):
            change = w[:, column] * gone[:, column - start] / upper[column, column]
            w[:, column:] -= change[:, None] * upper[column, column:]
            w[gone[:, column - start], column] = 0
    return w


@pytest.mark.parametrize("shape", SHAPES)
def test_sweep_is_the_papers_loop(shape: tuple[int, int]) -> None:
    weight, gram = problem(*shape)
    outputs, inputs = shape
    ends = [min(stop, inputs) * outputs // 2 for stop in range(BLOCK, inputs + BLOCK, BLOCK)]
    found = sparsegpt(weight, gram, Count(outputs * inputs // 2), damping=0.01, num_steps=0).weight
    expected = plain_sparsegpt(weight, gram, [b - a for a, b in zip([0, *ends], ends, strict=False)])
    # A near-tie may fall differently in float32; the values of all other rows agree.
    same = ((found == 0) == (expected == 0)).all(dim=1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found[same].double(), expected[same], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scope", ["matrix", "row"])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_exactly_the_asked_number_goes(shape: tuple[int, int], scope: str, num_steps: int) -> None:
    weight, gram = problem(*shape)
    total = weight.numel() if scope == "matrix" else weight.shape[1]
    for num_remove in {0, 1, total // 3, round(0.7 * total), total}:
        found = sparsegpt(weight, gram, Count(num_remove, scope), num_steps=num_steps).weight  # type: ignore[arg-type]
        zeros = found == 0
        counted = zeros.sum()[None] if scope == "matrix" else zeros.sum(dim=1)
        assert (counted == num_remove).all()
        if num_remove == 0:
            torch.testing.assert_close(found, weight)


@pytest.mark.parametrize("scope", ["matrix", "row"])
def test_ties_go_by_position(scope: str) -> None:
    weight = torch.ones(6, 20)
    found = sparsegpt(weight, torch.eye(20), Count(40 if scope == "matrix" else 7, scope)).weight  # type: ignore[arg-type]
    expected = torch.ones(6, 20)
    if scope == "matrix":
        expected.view(-1)[:40] = 0
    else:
        expected[:, :7] = 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("n", "m", "inputs"), [(2, 4, 300), (1, 4, 8), (4, 8, 136), (16, 32, 64), (0, 4, 12)]
)
def test_groups_keep_n_of_m(n: int, m: int, inputs: int) -> None:
    weight, gram = problem(30, inputs)
    found = sparsegpt(weight, gram, Groups(n, m), num_steps=2).weight
    assert ((found.view(30, -1, m) != 0).sum(dim=-1) == n).all()
    # Better than to keep the largest and change nothing else.
    best = weight.view(30, -1, m).abs().argsort(dim=-1, descending=True).argsort(dim=-1) < n
    if n:
        assert error(weight, found, gram) < 0.5 * error(weight, weight * best.view(30, inputs), gram)


def test_zeros_of_an_earlier_prune_stay_and_count() -> None:
    weight, gram = problem(40, 300)
    for removal in (Count(6000), Count(150, "row"), Groups(2, 4)):
        first = sparsegpt(weight, gram, removal).weight
        again = sparsegpt(first, gram, removal).weight
        torch.testing.assert_close(again, first)
        more = {Count: Count(9000), Groups: Groups(1, 4)}[type(removal)]
        if removal == Count(150, "row"):
            more = Count(225, "row")
        second = sparsegpt(first, gram, more).weight
        assert (second[first == 0] == 0).all()
        assert (second == 0).sum() == 9000
    uneven = weight.clone()
    uneven[:, 100:290] = 0
    found = sparsegpt(uneven, gram, Count(200, "row")).weight
    assert (found[:, 100:290] == 0).all()
    assert ((found == 0).sum(dim=1) == 200).all()
    # More zeros than asked for: none is added and none comes back.
    found = sparsegpt(uneven, gram, Count(100)).weight
    assert torch.equal(found == 0, uneven == 0)


def test_given_mask_ends_at_least_squares() -> None:
    weight, gram = problem(24, 200)
    kept = torch.rand(24, 200, generator=torch.Generator().manual_seed(1)) < 0.5
    kept[3], kept[4] = False, True
    best = least_squares(weight, gram, kept)
    lowest = error(weight, best, gram, added(gram))
    before = math.inf
    for num_steps in (0, 5, 20, 200):
        found = refit_kept(weight, gram, kept, damping=0.01, num_steps=num_steps)
        now = error(weight, found.weight, gram, added(gram))
        assert now <= before * (1 + 1e-6)
        assert torch.equal(found.weight != 0, kept)
        before = now
    assert now <= lowest * (1 + 1e-4)
    assert error(weight, weight * kept, gram) > 1.3 * lowest


def test_outputs_solved_a_few_at_a_time_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram = problem(50, 130)
    for removal in (Count(3250), Groups(2, 4)):
        whole = sparsegpt(weight[:, :128], gram[:128, :128], removal).weight
        monkeypatch.setattr("dsee_scale.algorithms.refit.COLUMNS", 7)
        torch.testing.assert_close(sparsegpt(weight[:, :128], gram[:128, :128], removal).weight, whole)
        monkeypatch.undo()


@pytest.mark.parametrize("removal", [Count(3000), Count(100, "row"), Groups(2, 4)])
@pytest.mark.parametrize("num_steps", [0, 5])
@pytest.mark.parametrize("tokens", [0, 1, 30])
def test_fewer_tokens_than_channels_and_dead_channels(
    removal: Count | Groups, num_steps: int, tokens: int
) -> None:
    weight, _ = problem(30, 200)
    inputs = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(2))
    inputs[:, 50:60] = 0
    found = sparsegpt(weight, inputs.T @ inputs, removal, num_steps=num_steps)
    assert torch.isfinite(found.weight).all()
    assert (found.weight == 0).sum() == 3000
    assert found.record.num_dead == (10 if tokens else 200)
    if not tokens:  # By magnitude, where nothing else is known.
        assert torch.equal(found.weight, torch.where(found.weight == 0, 0.0, weight))


def test_a_weight_of_zeros_stays_zero() -> None:
    _, gram = problem(1, 40)
    for num_steps in (0, 2):
        found = sparsegpt(torch.zeros(8, 40), gram, Count(100), num_steps=num_steps)
        assert not found.weight.any()


def test_damping_grows_until_the_factorisation_holds() -> None:
    weight, _ = problem(8, 60)
    gram = torch.full((60, 60), 1e4)
    gram.diagonal().sub_(300)  # Indefinite, as rounding can make it: the lowest eigenvalue is -300.
    found = sparsegpt(weight, gram, Count(240), damping=0.01)
    assert found.record.num_retries == 1
    assert found.record.damping == pytest.approx(0.1)
    assert torch.isfinite(found.weight).all()
    with pytest.raises(ValueError, match="not positive semidefinite"):
        sparsegpt(weight, torch.eye(60) - 2 * torch.ones(60, 60) / 1e-6, Count(240))


@pytest.mark.parametrize("power", [-49, -20, 20, 60])
@pytest.mark.parametrize("removal", [Count(2000), Groups(2, 4)])
def test_the_scale_of_the_inputs_makes_no_difference(removal: Count | Groups, power: int) -> None:
    """Exact powers of two: the same bit for bit. Mean diagonals from 1e-30 to 1e36."""
    weight, gram = problem(30, 140)
    gram /= gram.diagonal().mean()
    kept = weight.abs() > 0.5
    scaled = gram * 4.0**power
    expected, found = (sparsegpt(weight, each, removal) for each in (gram, scaled))
    assert torch.equal(found.weight, expected.weight) and found.record == expected.record
    expected, found = (refit_kept(weight, each, kept) for each in (gram, scaled))
    assert torch.equal(found.weight, expected.weight) and found.record == expected.record
    torch.testing.assert_close(
        sparsegpt(weight, scaled * 2, removal).weight, sparsegpt(weight, gram, removal).weight
    )


@pytest.mark.parametrize("scale", [1e-31, 1e-38, 1e-40, 1e-44])
def test_inputs_that_are_next_to_nothing_count_as_none(scale: float) -> None:
    weight, gram = problem(30, 140)
    gram *= scale / gram.diagonal().mean()
    none = torch.zeros_like(gram)
    found = sparsegpt(weight, gram, Count(2000))
    torch.testing.assert_close(found.weight, sparsegpt(weight, none, Count(2000)).weight)
    assert found.record == sparsegpt(weight, none, Count(2000)).record
    kept = weight.abs() > 0.5
    torch.testing.assert_close(refit_kept(weight, gram, kept).weight, weight * kept)


def test_inputs_that_make_no_sense_are_refused() -> None:
    weight, gram = problem(8, 12)
    with pytest.raises(ValueError, match="Gram matrix of shape"):
        sparsegpt(weight, gram[:-1], Count(3))
    with pytest.raises(ValueError, match="Gram matrix holds NaN"):
        sparsegpt(weight, gram * math.nan, Count(3))
    with pytest.raises(ValueError, match="weight or its update holds NaN"):
        refit_kept(weight / 0, gram, weight > 0)
    with pytest.raises(ValueError, match="13 entries of a row cannot go"):
        sparsegpt(weight, gram, Count(13, "row"))
    with pytest.raises(ValueError, match="2:5 does not fit"):
        sparsegpt(weight, gram, Groups(2, 5))
    with pytest.raises(ValueError, match="kept entries of shape"):
        refit_kept(weight, gram, weight[1:] > 0)


def test_inputs_stay_as_they_were() -> None:
    weight, gram = problem(8, 40)
    before, gram_before = weight.clone(), gram.clone()
    sparsegpt(weight, gram, Groups(2, 4), num_steps=2)
    refit_kept(weight, gram, weight > 0, num_steps=2)
    assert torch.equal(weight, before)
    assert torch.equal(gram, gram_before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_storage_keeps_what_is_not_zero(dtype: torch.dtype) -> None:
    weight = torch.tensor([0.0, 1.5, -1e-30, 1e-42, -1e-45, -0.0, 3e-8, -2.25])
    stored = to_storage(weight, dtype)
    assert stored.dtype is dtype
    assert torch.equal(stored != 0, weight != 0)
    assert torch.equal(stored[weight != 0].sign().float(), weight[weight != 0].sign())
    assert torch.equal(stored[[1, 7]].float(), weight[[1, 7]])
    assert stored.abs()[4] in (torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal, weight.abs()[4])
    with pytest.raises(ValueError, match="too large"):
        to_storage(torch.tensor([math.inf]), dtype)
