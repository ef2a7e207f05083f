"""Score modes against their formulas, keys against the order of scores, blocks against whole weights."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsee_scale.algorithms import delta as delta_module
from dsee_scale.algorithms.bits import CPU_CHUNK, position_sum
from dsee_scale.algorithms.score import (
    Ranking,
    all_finite,
    key_bits,
    keys,
    random_scores,
    ranked_blocks,
    scores,
    sum_of_squares,
    update_block,
)
from tests.unit.test_delta import dense_update, make_delta

pytestmark = pytest.mark.unit

FORMULAS = {
    "W": lambda w, low_rank, delta: w.abs(),
    "AB": lambda w, low_rank, delta: low_rank.abs(),
    "ABS": lambda w, low_rank, delta: delta.abs(),
    "WAB": lambda w, low_rank, delta: (w + low_rank).abs(),
    "WABS": lambda w, low_rank, delta: (w + delta).abs(),
    "NAB": lambda w, low_rank, delta: 1 / low_rank.abs(),
    "NABS": lambda w, low_rank, delta: 1 / delta.abs(),
}


def keys_of(weight, ranking, start=0):
    """Keys of a flat stretch as one tensor; for |w| its magnitude bits."""
    found = [torch.empty(0, dtype=torch.int32)]
    for _, ranked, _ in ranked_blocks(weight, start, ranking):
        found.append((ranked.float().view(torch.int32) & 2**31 - 1) if ranked.is_floating_point() else ranked)
    return torch.cat(found)


@pytest.mark.parametrize("mode", FORMULAS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_equal_the_dense_formula(mode, transposed, dtype):
    delta = make_delta(((0, 10), (20, 30)), transposed)
    shape = delta.storage_shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    dense = [dense_update(delta, sparse) for sparse in (False, True)]
    low_rank, full = (d.T if transposed else d for d in dense)
    found = scores(mode, weight, update_block(mode, delta, 0, shape[0]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, FORMULAS[mode](weight.double(), low_rank, full).float())


@pytest.mark.parametrize("mode", FORMULAS)
def test_a_matrix_without_adapter_is_scored_by_its_magnitude(mode):
    weight = torch.randn(8, 9)
    assert torch.equal(scores(mode, weight), weight.abs())
    assert Ranking(mode=mode, name="w").by_magnitude


def test_keys_order_like_scores_with_zero_weights_first_and_infinity_last():
    found = torch.tensor([0.0, 1e-45, 1e-40, 1.0, 1.0000001, 3e38, float("inf"), 5.0])
    weight = torch.tensor([1.0, 1, 1, 1, 1, 1, 1, -0.0])
    result = keys(found, weight)
    assert result.dtype == torch.int32 and result[-1] == 0
    assert (result[:-1] >= 1).all() and (result[1:7].diff() > 0).all()


@given(st.lists(st.floats(0, allow_nan=False, width=32), min_size=2, max_size=20))
def test_keys_compare_as_scores_do(values):
    found = torch.tensor(values).clamp_min(1e-45)
    result = keys(found, torch.ones(len(values)))
    assert torch.equal(result[:, None] < result, found[:, None] < found)


def test_keys_of_a_magnitude_are_the_weights_own_bits():
    weight = torch.tensor([0.0, -0.0, -1e-45, 2.5, -7.0])
    assert torch.equal(keys(weight.abs(), weight), weight.view(torch.int32) & 2**31 - 1)


def test_random_scores_are_uniform_and_differ_by_seed_and_name():
    found = random_scores(0, "a.weight", 0, 200_000)
    assert found.min() >= 0 and found.max() < 1
    counts = torch.histc(found, bins=50, min=0, max=1)
    assert ((counts - 4000).abs() < 6 * 4000**0.5).all()
    assert abs(torch.corrcoef(torch.stack([found[:-1], found[1:]]))[0, 1]) < 0.01
    for other in (random_scores(1, "a.weight", 0, 200_000), random_scores(0, "b.weight", 0, 200_000)):
        assert abs(torch.corrcoef(torch.stack([found, other]))[0, 1]) < 0.01


def test_random_scores_are_the_published_hash():
    """splitmix64 seeded with 0 begins with these words: Steele, Lea, Flood, OOPSLA 2014."""
    from dsee_scale.algorithms import score

    class Digest:
        def digest(self):
            return bytes(8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score.hashlib, "blake2b", lambda *args, **kwargs: Digest())
        found = random_scores(0, "", 1, 2)
    words = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)
    assert found.tolist() == [(word >> 40) / 2**24 for word in words]


@settings(deadline=None, max_examples=40)
@given(
    mode=st.sampled_from([*FORMULAS, "random"]),
    transposed=st.booleans(),
    with_adapter=st.booleans(),
    cuts=st.lists(st.integers(0, 420), max_size=5),
)
def test_keys_do_not_depend_on_how_a_weight_is_cut_into_shards(mode, transposed, with_adapter, cuts):
    delta = make_delta(((3, 17),), transposed, torch.float32)
    weight = torch.randn(420, generator=torch.Generator().manual_seed(3)).bfloat16()
    ranking = Ranking(mode=mode, name="w", delta=delta if with_adapter else None)
    edges = sorted([0, 420, *cuts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "BLOCK_ENTRIES", 50)
        whole = keys_of(weight, ranking)
        parts = [keys_of(weight[a:b], ranking, a) for a, b in itertools.pairwise(edges)]
    assert whole.numel() == 420 and torch.equal(torch.cat(parts), whole)


def test_blocks_that_are_not_wanted_are_not_computed():
    delta = make_delta(dtype=torch.float32)
    weight = torch.ones(420)
    ranking = Ranking(mode="WABS", name="w", delta=delta)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delta_module, "BLOCK_ENTRIES", 14)
        computed = []
        original = delta_module.delta_block
        patch.setattr(
            "dsee_scale.algorithms.score.delta_block",
            lambda *args: computed.append(args[1:]) or original(*args),
        )
        found = list(ranked_blocks(weight, 0, ranking, lambda start, numel: start == 28))
    assert computed == [(2, 3)] and [position for _, _, position in found] == [28]


def test_key_width_of_a_pool():
    magnitude, update = Ranking(mode="W", name="w"), Ranking(mode="ABS", name="w", delta=make_delta())
    chance = Ranking(mode="random", name="w")
    assert key_bits([magnitude], [torch.bfloat16, torch.bfloat16]) == 16
    assert key_bits([magnitude], [torch.float16]) == 16
    assert key_bits([magnitude], [torch.bfloat16, torch.float16]) == 32
    assert key_bits([magnitude], [torch.float32]) == 32
    assert key_bits([magnitude, update], [torch.bfloat16]) == 32
    assert key_bits([chance], [torch.bfloat16]) == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_finite_sees_every_bad_value(dtype):
    values = torch.randn(1000).to(dtype)
    assert all_finite(values) and all_finite(values[:0])
    for bad in (float("nan"), float("inf"), -float("inf")):
        spoiled = values.clone()
        spoiled[777] = bad
        assert not all_finite(spoiled)


@pytest.mark.parametrize("shape", [(1001, 7), (70, 5000), (0, 3)])
def test_sum_of_squares_over_many_stretches_is_that_in_float64(shape):
    x_TI = torch.randn(*shape).to(torch.bfloat16)
    found = sum_of_squares(x_TI)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, x_TI.double().square().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_checksum_is_the_same_however_its_tensor_is_cut(dtype):
    values = torch.randn(2 * CPU_CHUNK + 5).to(dtype)
    words = values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32).tolist()
    expected = sum(word * (2 * (9 + at) + 1) for at, word in enumerate(words))
    found = position_sum(values, 9)
    assert (found - expected) % 2**64 == 0 and -(2**63) <= found < 2**63
    cut = 1001
    assert (found - position_sum(values[:cut], 9) - position_sum(values[cut:], 9 + cut)) % 2**64 == 0
