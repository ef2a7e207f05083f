"""Low-rank plus sparse: what is found, that the choice is exact, and what it costs in memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsee_scale.algorithms import decompose
from dsee_scale.algorithms.decompose import Support, find_support, low_rank, validate
from dsee_scale.algorithms.reference import reference_low_rank
from dsee_scale.algorithms.score import all_finite
from dsee_scale.config import DecompositionConfig
from dsee_scale.errors import ConfigError
from tests.golden.grebsmo import COUNT, GOLDEN, SEED, largest, naive_loop, noisy_low_rank, start_row

pytestmark = pytest.mark.unit
FAST = DecompositionConfig()
REFERENCE = DecompositionConfig(preset="reference")


def seeded(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(support: Support, weight: Tensor) -> Tensor:
    return support.rows.long() * weight.shape[1] + support.cols


def chosen(weight: Tensor, count: int, method="grebsmo", config=FAST, seed: int = SEED) -> Tensor:
    return flat(find_support(weight, count, method, config, seeded(seed)), weight)


def test_reference_preset_gives_the_golden_support_entry_for_entry():
    golden = load_file(GOLDEN)
    torch.testing.assert_close(start_row(768), golden["start"], msg="torch draws other numbers now")
    weight, _ = noisy_low_rank(768, 768)
    assert torch.equal(chosen(weight, COUNT, config=REFERENCE), golden["positions"])


@pytest.mark.parametrize("shape", [(96, 96), (60, 150), (150, 60), (3, 40), (40, 3)])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_reference_preset_equals_the_naive_loop(shape, rounds):
    weight, _ = noisy_low_rank(*shape, outliers=20)
    left, right = reference_low_rank(weight, seeded(), rounds)
    expected = naive_loop(weight, start_row(shape[1]), rounds)
    torch.testing.assert_close(left @ right, expected, rtol=0, atol=1e-11)
    if min(shape) > 5 * rounds:
        assert torch.equal(largest(weight - left @ right, 20), largest(weight - expected, 20))


def test_reference_preset_names_an_overflow():
    with pytest.raises(ConfigError, match=r"overflows.*use preset 'fast'"):
        find_support(torch.randn(30, 30) * 1e30, 3, "grebsmo", REFERENCE, seeded())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_default_finds_planted_entries_that_hide_below_the_largest_low_rank_ones(dtype):
    weight, planted = noisy_low_rank(768, 768)
    weight = weight.to(dtype)
    assert torch.isin(chosen(weight, 64, "magnitude"), planted).sum() < 20
    assert torch.isin(chosen(weight, 64), planted).sum() >= 62


def test_default_finds_outliers_as_large_as_singular_values():
    weight, _ = noisy_low_rank(384, 512, outliers=0)
    planted = torch.randperm(weight.numel(), generator=seeded())[:64]
    weight.view(-1)[planted] += 0.08 * torch.exp(torch.linspace(0, 4, 64))
    assert torch.isin(chosen(weight, 64), planted).sum() >= 62
    unclipped = DecompositionConfig(clip=1e9)
    assert torch.isin(chosen(weight, 64, config=unclipped), planted).sum() < 55


def test_default_finds_outliers_under_a_decaying_spectrum():
    left, right = torch.randn(300, 32, generator=seeded()), torch.randn(32, 400, generator=seeded(1))
    weight = (left / torch.arange(1, 33)) @ right * 0.03 + 0.005 * torch.randn(300, 400, generator=seeded(2))
    planted = torch.randperm(weight.numel(), generator=seeded())[:64]
    weight.view(-1)[planted] += 0.08
    assert torch.isin(chosen(weight, 64, "magnitude"), planted).sum() < 10
    assert torch.isin(chosen(weight, 64), planted).sum() >= 62


@pytest.mark.parametrize("count", [4, 16])
def test_an_exactly_low_rank_weight_leaves_its_outliers(count):
    weight = torch.randn(80, 5, generator=seeded()) @ torch.randn(5, 120, generator=seeded(1))
    planted = torch.randperm(weight.numel(), generator=seeded())[:count].sort().values
    weight.view(-1)[planted] += 3.0
    assert torch.isin(chosen(weight, count, "magnitude"), planted).sum() < count
    assert torch.equal(chosen(weight, count), planted)
    assert len(chosen(weight, count, config=REFERENCE).unique()) == count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_support_is_the_exact_top_of_the_dense_residual(dtype, monkeypatch):
    weight = torch.randn(130, 170, generator=seeded(), dtype=dtype)
    monkeypatch.setattr(decompose, "CPU_BLOCK", 11 * 170)
    left, right = low_rank(weight, FAST, seeded())
    assert left.shape == (130, 32) and right.shape == (32, 170) and left.dtype == dtype
    torch.testing.assert_close(left.T @ left, torch.eye(32, dtype=dtype), rtol=0, atol=1e-5)
    residual = (weight - left @ right).abs().flatten()
    picked = chosen(weight, 500)
    unpicked = torch.ones(weight.numel(), dtype=torch.bool)
    unpicked[picked] = False
    assert residual[picked].min() >= residual[unpicked].max() - 1e-6


@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 5),
    st.floats(0.01, 1.0),
    st.integers(1, 60),
    st.integers(0, 2**16),
)
@settings(max_examples=80, deadline=None)
def test_magnitude_takes_exactly_n_and_of_equal_entries_the_first(rows, cols, levels, part, block, seed):
    weight = torch.randint(-levels, levels + 1, (rows, cols), generator=seeded(seed)).to(torch.bfloat16)
    count = max(1, int(part * weight.numel()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decompose, "CPU_BLOCK", block)
        patch.setattr(decompose, "FIRST_PIECE", 3)
        assert torch.equal(chosen(weight, count, "magnitude"), largest(weight.float(), count))


@pytest.mark.parametrize("method", ["grebsmo", "magnitude", "random"])
@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (2, 2), (5, 3), (64, 1000), (33, 7)])
def test_any_shape_gives_n_distinct_sorted_positions(method, shape):
    weight = torch.randn(shape, generator=seeded())
    for count in (1, weight.numel() // 2, weight.numel()):
        support = find_support(weight, count, method, FAST, seeded())
        assert support.rows.dtype == support.cols.dtype == torch.int32
        positions = flat(support, weight)
        assert len(positions) == count and bool((positions[1:] > positions[:-1]).all())
        assert int(positions[0]) >= 0 and int(positions[-1]) < weight.numel()


def test_a_matrix_too_thin_for_a_low_rank_part_is_ranked_by_size():
    weight = torch.randn(1, 300, generator=seeded())
    assert low_rank(weight, FAST, seeded())[0].shape == (1, 0)
    assert torch.equal(chosen(weight, 9), largest(weight, 9))


@pytest.mark.parametrize("weight", [torch.zeros(20, 30), torch.ones(20, 30), torch.eye(20, 30)])
@pytest.mark.parametrize("config", [FAST, REFERENCE])
def test_degenerate_weights_have_a_support(weight, config):
    assert len(chosen(weight, 7, config=config).unique()) == 7


def test_same_seed_same_support_whatever_the_global_generator():
    weight = torch.randn(200, 300, generator=seeded())
    torch.manual_seed(1)
    first = [chosen(weight, 50, method, seed=3) for method in ("grebsmo", "random")]
    torch.manual_seed(2)
    torch.randn(7)
    state = torch.get_rng_state()
    again = [chosen(weight, 50, method, seed=3) for method in ("grebsmo", "random")]
    other = chosen(weight, 50, "random", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other)


def test_stored_layout_and_scale_do_not_matter():
    weight, _ = noisy_low_rank(200, 260)
    weight = weight.float()
    expected = chosen(weight, 64)
    before = weight.clone()
    assert torch.equal(chosen(weight.T.contiguous().T, 64), expected)
    assert torch.equal(chosen(weight * 2.0**100, 64), expected)
    assert torch.equal(chosen(weight * 2.0**-90, 64), expected)
    assert torch.equal(weight, before)


def test_float32_and_float64_agree():
    weight, _ = noisy_low_rank(384, 300)
    assert torch.equal(chosen(weight.float(), 64), chosen(weight.float().double(), 64))


def test_random_positions_are_uniform_and_need_no_memory_of_the_matrix_size():
    weight = torch.zeros(4, 5)
    draws = torch.cat([chosen(weight, 4, "random", seed=seed) for seed in range(2000)])
    counts = draws.bincount(minlength=20)
    assert counts.min() > 320 and counts.max() < 480  # 400 +- 18 each
    huge = torch.zeros(1).expand(2**20, 2**18)
    assert len(chosen(huge, 1000, "random").unique()) == 1000


class LargestTensor(TorchDispatchMode):
    """Entries of the largest tensor that any operator returned and that is no view of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.storage = weight.untyped_storage().data_ptr()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() != self.storage:
                self.entries = max(self.entries, leaf.numel())
        return result


@pytest.mark.parametrize("method", ["grebsmo", "magnitude", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_the_matrix_size_is_made(method, dtype):
    weight = torch.randn(2000, 1024, generator=seeded()).to(dtype)
    with LargestTensor(weight) as seen:
        find_support(weight, 64, method, FAST, seeded())
        all_finite(weight)
    assert 0 < seen.entries <= decompose.CPU_BLOCK < weight.numel() / 3


@pytest.mark.parametrize(
    ("shape", "count", "message"),
    [
        ((4, 5), 21, "num_sparse is 21, but a 4 x 5 matrix has only 20 entries"),
        ((4, 5), 0, "num_sparse must be at least 1"),
        ((4, 5), -3, "num_sparse must be at least 1"),
        ((20,), 1, "needs a matrix"),
        ((0, 5), 1, "needs a matrix"),
    ],
)
def test_impossible_supports_are_refused(shape, count, message):
    with pytest.raises(ConfigError, match=message):
        validate(shape, count)
    with pytest.raises(ConfigError, match=message):
        find_support(torch.zeros(shape), count, "magnitude", FAST, seeded())


@pytest.mark.parametrize(
    "field", [{"clip": 0.0}, {"clip": -1}, {"rank": 0}, {"iterations": 0}, {"preset": "fat"}]
)
def test_senseless_settings_are_refused(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        DecompositionConfig(**field)
