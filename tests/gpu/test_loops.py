"""The Triton loops of exact selection against torch's: on a GPU, or on CPU through Triton's interpreter."""

from __future__ import annotations

import contextlib

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton comes with PyTorch's CUDA builds, or with `pip install triton`")

import dsee_scale  # noqa: E402
from dsee_scale import DSEEConfig, PruneConfig  # noqa: E402
from dsee_scale.algorithms import bits, loops, select  # noqa: E402
from dsee_scale.algorithms.loops import choose, triton_loops  # noqa: E402
from dsee_scale.algorithms.loops.triton_loops import TritonLoops  # noqa: E402
from dsee_scale.algorithms.select import apply_cut_, global_cut  # noqa: E402
from dsee_scale.pruning import lowest  # noqa: E402
from tests.dist.test_inject_prune import fill_adapters  # noqa: E402
from tests.models import build, llama_config  # noqa: E402

pytestmark = pytest.mark.gpu
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SPECIAL = [0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), 1e-41, -1e-7]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few thousand entries fill several programs, copies and launches."""
    for name, value in (("BLOCK", 64), ("COPIES", 3), ("COPY_FROM", 200), ("AT_ONCE", 1024)):
        monkeypatch.setattr(triton_loops, name, value)


def entries(kind: str, numel: int, dtype: torch.dtype, first: int = 0) -> torch.Tensor:
    """(numel,) a view that begins at `first` of a tensor that is longer on both sides."""
    generator = torch.Generator().manual_seed(numel)
    weight = torch.randn(numel + first + 9, generator=generator)
    if kind == "coarse":
        weight = weight.mul_(2).round_().mul_(0.5)
    if kind == "special":
        at = torch.randint(0, len(SPECIAL), weight.shape, generator=generator)
        weight = torch.where(weight > 0, weight, torch.tensor(SPECIAL)[at])
    return weight.to(DEVICE, dtype)[first : first + numel]


def key_of(weight: torch.Tensor, index: int) -> int:
    words = weight.view(bits.INTEGERS[weight.element_size()])
    return int(words[index]) & torch.iinfo(words.dtype).max


def histograms(count, *, start: int = 0) -> list[torch.Tensor]:
    found = []
    for each in (TritonLoops(), loops.TorchLoops()):
        histogram = torch.full((loops.BINS,), start, dtype=torch.int64, device=DEVICE)
        count(each, histogram)
        found.append(histogram)
    return found


SIZES = [(0, 0), (1, 0), (64, 0), (65, 7), (1500, 8), (1500, 3)]


@pytest.mark.parametrize(("numel", "first"), SIZES)
@pytest.mark.parametrize("kind", ["normal", "coarse", "special"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_digits_are_counted_as_torch_counts_them(dtype, kind, numel, first):
    weight = entries(kind, numel, dtype, first)
    top = 8 * weight.element_size() - 16
    ours, theirs = histograms(lambda each, counts: each.count_digits(weight, top, 0, counts), start=7)
    assert torch.equal(ours, theirs) and int(ours.sum()) == numel + 7 * loops.BINS


@pytest.mark.parametrize(("numel", "first"), SIZES)
@pytest.mark.parametrize("kind", ["normal", "coarse", "special"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 9, 65])
def test_digits_outside_of_a_window_count_as_its_edges(dtype, kind, numel, first, width):
    weight = entries(kind, numel, dtype, first)
    top = 8 * weight.element_size() - 16
    low = (key_of(weight, numel // 2) >> top if numel else 7) - width // 2
    low = min(max(low, 0), loops.INFINITY_DIGIT - width)
    high = low + width
    ours, exact = histograms(lambda each, counts: each.count_digits(weight, top, 0, counts, (low, high)))
    assert int(ours.sum()) == numel
    if width > triton_loops.WIDEST:
        assert torch.equal(ours, exact)
        return
    infinity = loops.INFINITY_DIGIT
    assert torch.equal(ours[low + 1 : high], exact[low + 1 : high])
    assert ours[low] == exact[: low + 1].sum() and ours[high] == exact[high : infinity + 1].sum()
    assert ours[infinity + 1] == exact[infinity + 1 :].sum()


@pytest.mark.parametrize("kind", ["normal", "coarse", "special", "was half"])
def test_low_digits_are_counted_of_keys_with_the_prefix_alone(kind):
    weight = entries("normal", 1500, torch.bfloat16).float() if kind == "was half" else None
    weight = entries(kind, 1500, torch.float32, 5) if weight is None else weight
    for index in (17, 1499):
        prefix = key_of(weight, index) >> 16
        ours, theirs = histograms(
            lambda each, counts, prefix=prefix: each.count_digits(weight, 0, prefix, counts)
        )
        assert torch.equal(ours, theirs) and 0 < int(ours.sum()) < 1500
    ranked = weight.abs().view(torch.int32)
    assert torch.equal(*histograms(lambda each, counts: each.count_digits(ranked, 0, prefix, counts)))


@pytest.mark.parametrize("offset", [0, 2**13 - 1, 2**32 + 77])
@pytest.mark.parametrize("shift", [0, 5, 6, 17])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ties_are_counted_by_position(dtype, shift, offset):
    for numel, first in SIZES if offset else SIZES[-1:]:
        here = offset if (offset + numel) >> shift < loops.BINS else offset % 2**15
        weight = entries("coarse", numel, dtype, first)
        for key in (0, key_of(weight, numel // 2) if numel else 5):  # 0 is what lies outside, too
            ours, theirs = histograms(
                lambda each, counts, w=weight, key=key, at=here: each.count_ties(w, key, at, shift, counts)
            )
            assert torch.equal(ours, theirs)
        assert numel == 0 or int(ours.sum()) > 0


def zeroed(weight: torch.Tensor, ranked: torch.Tensor | None, last: int) -> list[tuple[torch.Tensor, int]]:
    found = []
    for each in (TritonLoops(), loops.TorchLoops()):
        whole = torch.cat([weight[:0].new_ones(3), weight, weight.new_ones(5)])
        part = whole[3 : 3 + weight.numel()]
        version = part._version
        removed = each.zero_up_to_(part, part if ranked is None else ranked, last)
        assert part._version > version or not part.numel(), "a backward pass would take the changed weight"
        assert not isinstance(each, TritonLoops) or not weight.numel() or isinstance(removed, torch.Tensor)
        found.append((whole.view(bits.INTEGERS[whole.element_size()]), int(removed)))
    return found


@pytest.mark.parametrize(("numel", "first"), SIZES)
@pytest.mark.parametrize("kind", ["normal", "coarse", "special"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_entries_that_torch_zeroes_go_and_nothing_beside_them(dtype, kind, numel, first):
    weight = entries(kind, numel, dtype, first)
    for last in {0, *(key_of(weight, index) for index in range(0, numel, 700))}:
        (ours, count), (theirs, expected) = zeroed(weight, None, last)
        assert torch.equal(ours, theirs) and count == expected


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("numel", [1, 1500])
def test_keys_of_their_own_say_what_goes(numel, dtype):
    weight = entries("special", numel, torch.float32, 3).to(dtype)
    ranked = torch.randperm(numel + 2, device=DEVICE)[2:].int()
    for last in (0, numel // 3 + 1):
        (ours, count), (theirs, expected) = zeroed(weight, ranked, last)
        assert torch.equal(ours, theirs) and count == expected == int((ranked <= last).sum())


@pytest.mark.parametrize("sparsity", [0.31, 0.999])
@pytest.mark.parametrize("kind", ["normal", "coarse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampled", [False, True])
def test_a_whole_selection_removes_what_it_removes_with_torch(monkeypatch, sampled, dtype, kind, sparsity):
    """Two blocks of a pool; the second begins at an odd place."""
    total, results = 2000, []
    num_remove = round(sparsity * total)
    for chosen in (TritonLoops(), loops.TorchLoops()):
        monkeypatch.setattr(select, "choose_loops", lambda *args, chosen=chosen: chosen)
        weight = entries(kind, total, dtype, 1)
        blocks = [(weight[:601], 0), (weight[601:], 601)]
        bits = 8 * weight.element_size()
        cut = global_cut(lambda wants, blocks=blocks: blocks, num_remove, total, bits, sampled=sampled)
        assert sum(int(apply_cut_(part, part, position, cut)) for part, position in blocks) == num_remove
        results.append((cut, weight))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("key_bits", [16, 32])
def test_a_nan_is_refused(monkeypatch, key_bits):
    monkeypatch.setattr(select, "choose_loops", lambda *args: TritonLoops())
    weight = torch.ones(300, dtype=torch.bfloat16 if key_bits == 16 else torch.float32, device=DEVICE)
    weight[3] = -float("nan")
    with pytest.raises(ValueError, match="NaN"):
        global_cut(lambda wants: [(weight, 0)], 5, 300, key_bits)


@pytest.mark.parametrize("scope", ["global", "matrix"])
@pytest.mark.parametrize(
    ("score", "dtype"), [("W", torch.bfloat16), ("W", torch.float32), ("WABS", torch.bfloat16)]
)
def test_a_model_is_pruned_alike(monkeypatch, score, dtype, scope):
    """Where keys cost nothing, after a sample, as on a GPU."""
    monkeypatch.setattr(triton_loops, "BLOCK", 1024)
    monkeypatch.setattr(lowest, "SAMPLE_FROM", 0)
    monkeypatch.setattr(lowest, "is_host", lambda device: False)
    samples, count = [], select._SampleRound.count
    monkeypatch.setattr(select._SampleRound, "count", lambda *words: samples.append(1) or count(*words))
    found = []
    for chosen in (TritonLoops(), loops.TorchLoops()):
        monkeypatch.setattr(select, "choose_loops", lambda *args, chosen=chosen: chosen)
        model = build(llama_config(), dtype).to(DEVICE)
        dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=20))
        fill_adapters(model)
        for sparsity in (0.3, 0.7):
            config = PruneConfig(sparsity=sparsity, score=score, scope=scope, refit=False)
            report = dsee_scale.prune(model, config)
        found.append((report.matrices, dict(model.named_parameters())))
    assert bool(samples) == (
        score == "W" or scope == "matrix"
    )  # one without an adapter is ranked by |w| alone
    assert found[0][0] == found[1][0]
    assert all(torch.equal(param, found[1][1][name]) for name, param in found[0][1].items())


def test_a_gpu_with_triton_takes_these_loops_unless_one_insists(monkeypatch):
    monkeypatch.setattr(choose, "_triton_loops", choose._triton_loops.__wrapped__)
    monkeypatch.setattr(choose, "has_triton", lambda: True)
    gpu = torch.device("cuda", 0)
    assert isinstance(loops.choose_loops(10, gpu), TritonLoops)
    assert isinstance(loops.choose_loops(10, gpu, False), loops.TorchLoops)
    assert not isinstance(loops.choose_loops(10, torch.device("cpu")), TritonLoops)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (33, 70), (3, 16, 48)])
def test_zeros_are_put_in_as_torch_fills_them(monkeypatch, shape, weight_dtype, dtype):
    """Also where the target is no number."""
    size = torch.Size(shape).numel()
    weight = entries("special", size, weight_dtype).view(shape)
    target = entries("special", size, torch.float32, 2).roll(1).to(dtype).view(shape)
    expected = target.clone().masked_fill_(weight == 0, 0)
    monkeypatch.setattr(bits, "_in_one_pass", lambda *args: True)
    version = target._version
    found = bits.zero_where_zero_(target, weight)
    assert found is target and target._version > version
    assert torch.equal(*(each.view(bits.INTEGERS[each.element_size()]) for each in (found, expected)))


@on_gpu
def test_zeros_are_put_in_by_the_kernel_where_it_can():
    weight, target = torch.randn(64, 64, device=DEVICE).relu(), torch.randn(64, 64, device=DEVICE)
    assert bits._in_one_pass(target, weight)
    assert not bits._in_one_pass(target.t(), weight) and not bits._in_one_pass(target[:, :32], weight[:, :32])
    for left, right in ((target, weight), (target.t(), weight), (target[:, :32], weight[:, :32])):
        expected = left.masked_fill(right == 0, 0)
        assert torch.equal(bits.zero_where_zero_(left, right), expected)


@on_gpu
@pytest.mark.parametrize("gpu", ["cuda:0", pytest.param("cuda:1", marks=two_gpus)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_full_size_agree_and_nobody_waits(monkeypatch, dtype, gpu):
    monkeypatch.undo()
    weight = torch.randn(40_000_003, device=gpu).mul_(0.02).to(dtype)[2:]
    top, shift = 8 * weight.element_size() - 16, 10
    key = key_of(weight, 1)
    results = []
    for each in (TritonLoops(), loops.TorchLoops()):
        counts = torch.zeros(4, loops.BINS, dtype=torch.int64, device=gpu)
        part = weight.clone()
        with no_waits() if isinstance(each, TritonLoops) else contextlib.nullcontext():
            each.count_digits(part, top, 0, counts[0])
            each.count_ties(part, key, 5, shift, counts[1])
            each.count_ties(part, key, 5, shift + 5, counts[2])
            removed = each.zero_up_to_(part, part, key)
            removed = removed + each.zero_up_to_(part[7:], part[7:], key + 1)
            each.count_digits(part, top, 0, counts[3])
        results.append((counts, part, removed))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@contextlib.contextmanager
def no_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_more_entries_than_int32_counts(monkeypatch):
    monkeypatch.undo()
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB")
    weight = torch.ones(numel, dtype=torch.bfloat16, device=DEVICE)
    weight[-2:] = 0.5
    each, counts = TritonLoops(), torch.zeros(loops.BINS, dtype=torch.int64, device=DEVICE)
    each.count_digits(weight, 0, 0, counts)
    assert counts.nonzero().flatten().tolist() == [0x3F00, 0x3F80]
    assert counts[[0x3F00, 0x3F80]].tolist() == [2, numel - 2]
    counts.zero_()
    each.count_ties(weight, 0x3F80, 0, 16, counts)
    assert int(counts.sum()) == numel - 2 and int(counts[numel >> 16]) == 4097
    assert int(each.zero_up_to_(weight, weight, 0x3F00)) == 2 and weight[-3:].tolist() == [1, 0, 0]


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's memory is handed out aligned")
def test_memory_that_begins_off_a_boundary_is_read_from_there_on():
    memory = bytearray(entries("normal", 301, torch.bfloat16).view(torch.uint8))
    weight = torch.frombuffer(memory, dtype=torch.bfloat16, offset=2)
    assert weight.data_ptr() % triton_loops.ALIGNED == 2 and weight.storage_offset() == 0
    assert torch.equal(*histograms(lambda each, counts: each.count_digits(weight, 0, 0, counts)))
