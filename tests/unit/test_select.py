"""Exact selection against a dense stable sort, however the pool is cut into shards."""

import importlib.util
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from dsee_scale.adapters.matrices import linear_matrix
from dsee_scale.algorithms import current_gpu, loops, select
from dsee_scale.algorithms.loops import choose, compiled
from dsee_scale.algorithms.score import Ranking, key_bits, keys, random_scores, ranked_blocks
from dsee_scale.algorithms.score import scores as score_of
from dsee_scale.algorithms.select import Cut, CutSearch, apply_cut_, global_cut, num_removed
from dsee_scale.partition import open_partition
from dsee_scale.passes.pools import WeightPool
from dsee_scale.pruning.lowest import remove_lowest
from tests.unit.test_delta import make_delta

pytestmark = pytest.mark.unit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "five values", "all equal", "half zero", "tiny", "signed zeros")


def make_weight(kind, numel, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(numel, generator=generator)
    if kind == "five values":
        normal = torch.randint(-2, 3, (numel,), generator=generator) * 0.5
    elif kind == "all equal":
        normal = torch.full((numel,), -0.75)
    elif kind == "half zero":
        normal[torch.rand(numel, generator=generator) < 0.5] = 0
    elif kind == "tiny":
        normal = normal * 1e-41 if dtype != torch.float16 else normal * 1e-7
    elif kind == "signed zeros":
        normal = torch.randint(0, 2, (numel,), generator=generator) * -0.0
    return normal.to(dtype)


def removed_by_sort(scores, weight, num_remove):
    """Dense reference: zero weights first, then by score, ties by position."""
    order = torch.argsort(torch.where(weight == 0, -1.0, scores.double()), stable=True)
    gone = torch.zeros(weight.numel(), dtype=torch.bool)
    gone[order[:num_remove]] = True
    return gone


def shards_of(numel, cuts):
    edges = sorted([0, numel, *(round(cut * numel) for cut in cuts)])
    return list(itertools.pairwise(edges))


def cut_of_ranks(ranks, num_remove, total, bits, use_compiled=False):
    """Run one search per rank; ranks are lists of (ranked, position). All must find the same cut."""
    searches = [CutSearch(num_remove, total, bits, use_compiled=use_compiled) for _ in ranks]
    messages = set()
    while searches[0].cut is None:
        for search, blocks in zip(searches, ranks, strict=True):
            for ranked, position in blocks:
                search.count(ranked, position)
        summed = sum(search.histogram for search in searches)
        messages |= {search.histogram.numel() * search.histogram.element_size() for search in searches}
        for search in searches:
            search.advance(summed)
    assert all(search.cut == searches[0].cut for search in searches)
    return searches[0].cut, messages


@pytest.fixture(params=[False, True], ids=["torch", "numba"])
def use_compiled(request):
    if request.param:
        pytest.importorskip("numba")
    return request.param


@settings(deadline=None, max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("dtype", DTYPES)
def test_removes_what_a_dense_sort_removes_on_any_shards(dtype, data):
    fast = data.draw(st.booleans(), "compiled")
    weight = make_weight(
        data.draw(st.sampled_from(KINDS)),
        data.draw(st.integers(1, 5000)),
        dtype,
        data.draw(st.integers(0, 9)),
    )
    total = weight.numel()
    sparsity = data.draw(st.one_of(st.sampled_from([0.0, 0.5, 0.999]), st.floats(0, 1)), "sparsity")
    shards = shards_of(total, data.draw(st.lists(st.floats(0, 1), max_size=7), "shards"))
    num_remove = num_removed(sparsity, total)
    bits = key_bits([Ranking(mode="W", name="w")], [dtype])
    fast = fast and importlib.util.find_spec("numba") is not None
    cut, _ = cut_of_ranks([[(weight[a:b], a)] for a, b in shards], num_remove, total, bits, fast)

    expected = weight.masked_fill(removed_by_sort(weight.abs(), weight, num_remove), 0)
    removed = sum(apply_cut_(weight[a:b], weight[a:b], a, cut, use_compiled=fast) for a, b in shards)
    assert removed == num_remove
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.31, 0.999])
def test_removes_exactly_k_with_ties_by_the_million(dtype, sparsity, use_compiled):
    weight = make_weight("five values", 3_000_001, dtype, 0)
    num_remove = num_removed(sparsity, weight.numel())
    expected = weight.masked_fill(removed_by_sort(weight.abs(), weight, num_remove), 0)
    bits = key_bits([Ranking(mode="W", name="w")], [dtype])
    cut = global_cut(lambda wants: [(weight, 0)], num_remove, weight.numel(), bits, use_compiled=use_compiled)
    assert apply_cut_(weight, weight, 0, cut, use_compiled=use_compiled) == num_remove
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_world_of_1024_shards_equals_the_dense_result(dtype):
    weight = make_weight("five values", 150_001, dtype, 1)
    weight[::3] += 1e-3 * torch.randn(50_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    generator = torch.Generator().manual_seed(2)
    cuts = torch.rand(1023, generator=generator).mul_(40).floor_().div_(40)
    cuts[::2] = torch.rand(512, generator=generator)
    shards = shards_of(weight.numel(), cuts.tolist())
    assert len(shards) == 1024 and any(a == b for a, b in shards)
    num_remove = 61_234
    expected = weight.masked_fill(removed_by_sort(weight.abs(), weight, num_remove), 0)
    bits = key_bits([Ranking(mode="W", name="w")], [dtype])
    cut, _ = cut_of_ranks([[(weight[a:b], a)] for a, b in shards], num_remove, weight.numel(), bits)
    assert sum(apply_cut_(weight[a:b], weight[a:b], a, cut) for a, b in shards) == num_remove
    assert torch.equal(weight, expected)


def test_messages_have_the_same_size_whatever_the_model_is():
    sizes = set()
    for numel in (10, 1000, 400_000):
        weight = make_weight("five values", numel, torch.float32, 0)
        _, messages = cut_of_ranks([[(weight, 0)]], numel // 3, numel, 32)
        sizes |= messages
    assert CutSearch(1, 10**12, 16).histogram.nbytes == CutSearch(1, 2, 32).histogram.nbytes == 2**19
    assert sizes == {2**19}


@pytest.mark.parametrize("kind", [*KINDS, "wandering"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparsity", [0.0003, 0.5, 0.97])
def test_a_sampled_search_finds_the_same_cut(kind, dtype, sparsity, monkeypatch):
    """Loops that blur all digits outside of the window; "wandering" scales mislead a sample of first entries."""
    monkeypatch.setattr(select, "choose_loops", lambda *_: BlurredLoops())
    for name, value in (("STRETCH", 64), ("STEP", 256), ("MARGIN", 0.02)):
        monkeypatch.setattr(select, name, value)
    numel, bits = 300_000, 32 if dtype == torch.float32 else 16
    weight = make_weight("normal" if kind == "wandering" else kind, numel, dtype, 3)
    if kind == "wandering":
        weight *= 1 + torch.arange(numel) // select.STRETCH % (select.STEP // select.STRETCH)
    blocks = [(weight[:130_001], 0), (weight[130_001:], 130_001)]
    num_remove = num_removed(sparsity, numel)
    asked = []
    found = [
        global_cut(
            lambda wants, rounds=rounds: rounds.append(1) or blocks, num_remove, numel, bits, sampled=sampled
        )
        for sampled in (False, True)
        for rounds in [asked.append([]) or asked[-1]]
    ]
    assert found[0] == found[1]
    plain, sampled = map(len, asked)
    misled = kind == "wandering" and sparsity == 0.5
    assert sampled == plain + (2 if misled else 1)


class BlurredLoops(loops.TorchLoops):
    """Tells nothing apart that it need not."""

    def count_digits(self, ranked, shift, prefix, histogram, window=None):
        counts = torch.zeros_like(histogram)
        super().count_digits(ranked, shift, prefix, counts)
        if window is not None:
            low, high = window
            counts[low] += counts[:low].sum()
            counts[high] += counts[high + 1 : loops.INFINITY_DIGIT + 1].sum()
            counts[:low] = counts[high + 1 : loops.INFINITY_DIGIT + 1] = 0
        histogram += counts


def test_a_sample_of_nothing_leaves_the_search_as_it_was():
    search = CutSearch(1, 2, 32, sampled=True)
    search.advance(search.histogram)
    search.count(torch.tensor([2.0, 1.0]), 0)
    search.advance(search.histogram)
    assert search.cut == Cut(0x40000000, 0, 32)  # the first key with the digit of 2


@pytest.mark.parametrize("num_remove", [1, 3_214_987_651, 12_999_999_999])
def test_ties_are_split_exactly_in_a_pool_of_billions(num_remove):
    """All 13e9 entries equal; the histograms are computed, not counted."""
    total = 13_000_000_000
    search = CutSearch(num_remove, total, 16)
    search.histogram[0x3F80] = total
    search.advance(search.histogram)
    start, stop, rounds = 0, total, 1
    while search.cut is None:
        assert search.wants(stop - 1, 1) and not search.wants(stop, 10) and not search.wants(start - 10, 10)
        width = 1
        while (stop - start + width - 1) // width > 65536:
            width *= 2
        edges = torch.arange(start, stop + width, width).clamp_max(stop)
        search.histogram[: len(edges) - 1] = edges.diff()
        search.advance(search.histogram)
        start += (num_remove - start) // width * width
        stop = min(stop, start + width)
        rounds += 1
    assert search.cut == Cut(0x3F80, num_remove, 16) and rounds <= 4


@pytest.mark.parametrize("bits", [16, 32])
def test_removing_nothing_or_everything_needs_no_round(bits):
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    weight = torch.tensor([0.0, 3.0, -torch.finfo(dtype).max], dtype=dtype)
    for num_remove, expected in ((0, weight.clone()), (3, torch.zeros(3, dtype=dtype))):
        search = CutSearch(num_remove, 3, bits)
        assert search.cut is not None and not search.wants(0, 3)
        apply_cut_(weight, weight, 0, search.cut)
        assert torch.equal(weight, expected)


def test_all_but_one_can_go(use_compiled):
    weight = torch.ones(1000)
    cut = global_cut(lambda wants: [(weight, 0)], 999, 1000, 32, use_compiled=use_compiled)
    assert apply_cut_(weight, weight, 0, cut, use_compiled=use_compiled) == 999
    assert weight.nonzero().flatten().tolist() == [999]


def test_pruning_is_cumulative_and_repeatable():
    """A weight that is zero goes first, whatever its score; the same cut again changes nothing."""
    weight = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(4000, generator=torch.Generator().manual_seed(1))
    gone = torch.zeros(4000, dtype=torch.bool)
    for num_remove in (400, 400, 1500, 3900):
        ranked = keys(importance, weight)
        cut = global_cut(lambda wants, ranked=ranked: [(ranked, 0)], num_remove, 4000, 32)
        assert apply_cut_(weight, ranked, 0, cut) == num_remove
        assert int((weight == 0).sum()) == num_remove and (weight[gone] == 0).all()
        gone = weight == 0
        importance = torch.rand(4000, generator=torch.Generator().manual_seed(num_remove))


@pytest.mark.parametrize("mode", ["W", "AB", "ABS", "WAB", "WABS", "NAB", "NABS", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(deadline=None, max_examples=10)
@given(cuts=st.lists(st.floats(0, 1), max_size=4), sparsity=st.sampled_from([0.2, 0.5, 0.999]))
def test_a_pool_of_several_weights_in_every_mode(mode, dtype, cuts, sparsity):
    """One adapted, one adapted and stored transposed, one without adapter; each cut into shards."""
    deltas = [make_delta(dtype=torch.float32), make_delta(((0, 10),), True, torch.float32), None]
    rankings = [Ranking(mode=mode, name=f"w{i}", delta=delta, seed=4) for i, delta in enumerate(deltas)]
    generator = torch.Generator().manual_seed(6)
    weights = [torch.randn(420, generator=generator).to(dtype) for _ in deltas]
    dense = []
    for weight, ranking in zip(weights, rankings, strict=True):
        if mode == "random":
            dense.append(random_scores(4, ranking.name, 0, 420))
            continue
        update = None
        if ranking.delta is not None:
            from dsee_scale.algorithms.score import update_block

            update = update_block(mode, ranking.delta, 0, ranking.delta.storage_shape[0]).flatten()
        dense.append(score_of(mode, weight, update))
    total, num_remove = 3 * 420, num_removed(sparsity, 3 * 420)
    pool = torch.cat(weights)
    expected = pool.masked_fill(removed_by_sort(torch.cat(dense), pool, num_remove), 0)

    def blocks(a, b):
        for index, (weight, ranking) in enumerate(zip(weights, rankings, strict=True)):
            for entries, ranked, position in ranked_blocks(weight[a:b], a, ranking):
                yield entries, ranked, 420 * index + position

    shards = shards_of(420, cuts)
    ranks = [[(ranked, position) for _, ranked, position in blocks(a, b)] for a, b in shards]
    cut, _ = cut_of_ranks(ranks, num_remove, total, key_bits(rankings, [dtype]))
    removed = sum(apply_cut_(*block, cut) for a, b in shards for block in blocks(a, b))
    assert removed == num_remove and torch.equal(torch.cat(weights), expected)


def test_half_precision_weights_rank_with_float32_keys_in_a_mixed_pool(use_compiled):
    weights = [torch.randn(700_000).bfloat16(), torch.randn(1000), torch.randn(1000).half()]
    pool = torch.cat([weight.float() for weight in weights])
    positions = (0, 700_000, 701_000)
    num_remove = 350_999
    expected = pool.masked_fill(removed_by_sort(pool.abs(), pool, num_remove), 0)
    blocks = list(zip(weights, positions, strict=True))
    cut = global_cut(lambda wants: blocks, num_remove, 702_000, 32, use_compiled=use_compiled)
    for weight, position in blocks:
        apply_cut_(weight, weight, position, cut, use_compiled=use_compiled)
    assert torch.equal(torch.cat([weight.float() for weight in weights]), expected)


def test_same_weights_as_global_unstructured():
    modules = [nn.Linear(64, 48, bias=False), nn.Linear(48, 20, bias=False)]
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (64 * 48 + 48 * 20,), generator=generator) * 2 - 1
    different = (torch.randperm(64 * 48 + 48 * 20, generator=generator) + 1) * signs
    for module, values in zip(modules, different.split([64 * 48, 48 * 20]), strict=True):
        module.weight.data.copy_(values.view_as(module.weight))
    weights = [module.weight.detach().clone() for module in modules]
    prune.global_unstructured([(m, "weight") for m in modules], prune.L1Unstructured, amount=0.37)
    total = 64 * 48 + 48 * 20
    blocks = [(weights[0].view(-1), 0), (weights[1].view(-1), 64 * 48)]
    cut = global_cut(lambda wants: blocks, num_removed(0.37, total), total, 32)
    for block, position in blocks:
        apply_cut_(block, block, position, cut)
    for ours, module in zip(weights, modules, strict=True):
        assert torch.equal(ours, module.weight)


def test_blocks_outside_the_chosen_tie_block_are_not_wanted():
    total = 10 * 65536
    weight = torch.ones(total)
    asked = []

    def blocks(wants):
        asked.append([])
        for start in range(0, total, 65536):
            if wants(start, 65536):
                asked[-1].append(start // 65536)
                yield weight[start : start + 65536], start

    cut = global_cut(blocks, 3 * 65536 + 5, total, 32)
    assert cut.position == 3 * 65536 + 5
    assert asked == [list(range(10))] * 3 + [[3]]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("bits", [16, 32])
def test_a_nan_score_is_refused(bits, sampled):
    weight = torch.ones(10, dtype=torch.bfloat16 if bits == 16 else torch.float32)
    weight[3] = -float("nan")
    with pytest.raises(ValueError, match="NaN"):
        global_cut(lambda wants: [(weight, 0)], 5, 10, bits, sampled=sampled)


def test_a_block_that_is_missing_or_counted_twice_is_noticed():
    weight = torch.randn(10)
    with pytest.raises(RuntimeError, match="20 entries were counted, expected 10"):
        global_cut(lambda wants: [(weight, 0), (weight, 0)], 5, 10, 32)
    with pytest.raises(RuntimeError, match="9 entries were counted, expected 10"):
        global_cut(lambda wants: [(weight[1:], 1)], 5, 10, 32)


def test_compiled_loops_are_loaded_only_where_they_pay(monkeypatch):
    monkeypatch.setattr(compiled, "_compile", compiled.functools.cache(lambda: "loaded"))
    device = torch.device("cpu")
    assert isinstance(loops.choose_loops(compiled.LOAD_FROM - 1, device), loops.TorchLoops)
    assert loops.choose_loops(compiled.LOAD_FROM, device) == "loaded"
    assert loops.choose_loops(10, device) == "loaded"
    assert isinstance(loops.choose_loops(compiled.LOAD_FROM, device, False), loops.TorchLoops)


def test_without_numba_the_plain_loops_are_used(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "numba", None)
    monkeypatch.setattr(compiled, "_compile", compiled.functools.cache(compiled._compile.__wrapped__))
    device = torch.device("cpu")
    assert isinstance(loops.choose_loops(compiled.LOAD_FROM, device), loops.TorchLoops)
    with pytest.raises(RuntimeError, match=r"dsee_scale\[fast\]"):
        loops.choose_loops(10, device, True)


def test_without_a_triton_that_works_a_gpu_uses_the_plain_loops(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(choose, "_triton_loops", choose._triton_loops.__wrapped__)
    monkeypatch.setattr(choose, "has_triton", current_gpu.has_triton.__wrapped__)
    monkeypatch.setattr(torch, "zeros", refuse)
    monkeypatch.setattr(current_gpu.importlib.util, "find_spec", lambda name: name)
    with pytest.warns(UserWarning, match="RuntimeError: no C compiler.*slower"):
        assert isinstance(loops.choose_loops(2**40, gpu), loops.TorchLoops)
    monkeypatch.setattr(current_gpu.importlib.util, "find_spec", lambda name: None)
    assert isinstance(loops.choose_loops(2**40, gpu), loops.TorchLoops)


def refuse(*args, **kwargs):
    raise RuntimeError("no C compiler")


def test_a_pool_of_next_to_nothing_that_no_token_reached_is_rounded():
    """Half of three entries rounds up to two: six of three matrices, and the pool's half of ten is five."""
    layers = torch.nn.ModuleList(torch.nn.Linear(inputs, 1, bias=False) for inputs in (3, 3, 3, 1))
    layers.requires_grad_(False)
    partition = open_partition(layers)
    members = tuple(linear_matrix(str(at), layer, partition.shape) for at, layer in enumerate(layers))
    rankings = {
        each.name: Ranking(mode="wanda", name=each.name, norms=norms, shape=each.shape)
        for each, norms in zip(members, [None, None, None, torch.ones(1)], strict=True)
    }
    found = remove_lowest([WeightPool("all", 0.5, members)], rankings, partition, hidden=True)
    assert [zeros for zeros, _ in found.values()] == [2, 2, 2, 0]
