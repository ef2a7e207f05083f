"""Calibration, wanda and re-fitting on partitioned models against the dense path, under the real engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig, Statistics
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.errors import CalibrationError, ConfigError, PartitionError, TargetError
from dsee_scale.partition import unwrap
from dsee_scale.partition.zero3 import Zero3Partition
from dsee_scale.passes import blocks
from dsee_scale.pruning.refit import block, matrix, output, pieces
from tests.dist.test_inject_prune import engine_for, train, whole_weights
from tests.models import zero3_config
from tests.unit.test_calibrate import SHARING, Adding, batches, make
from tests.unit.test_calibration_batches import Reader
from tests.unit.test_pieces import make_small

ROWS = PruneConfig(sparsity=0.4, refit=False)
REFIT = {
    "loss": PruneConfig(sparsity=0.4),
    "matrix": PruneConfig(sparsity=0.4, scope="matrix"),
    "rows": PruneConfig(sparsity=0.4, scope="row"),
    "2:4": PruneConfig(pattern="2:4", modules=("*attn*",)),
}


def here(world_size: int) -> list[dict[str, torch.Tensor]]:
    """This rank's part of the same five batches."""
    return batches(5)[dist.get_rank() :: world_size]


def live(family: str, ds_config: dict[str, Any]) -> Any:
    return engine_for(make(family), ds_config)


def statistics(family: str, ds_config: dict[str, Any], world_size: int) -> Statistics:
    return dsee_scale.calibrate(live(family, ds_config), here(world_size))


def pruned(
    family: str, config: PruneConfig, ds_config: dict[str, Any], world_size: int, given: Statistics | None
) -> dict[str, Any]:
    """Weights, supports and adapters after a prune of a live engine, and after two more steps."""
    engine = live(family, ds_config)
    report = dsee_scale.prune(engine, config, given if given is not None else here(world_size))
    found: dict[str, Any] = {"weights": whole_weights(engine), "matrices": report.matrices}
    layers = adapted_layers(unwrap(engine))
    found["supports"] = {name: torch.stack([m.dsee_rows, m.dsee_cols]) for name, m in layers.items()}
    train(engine, steps=2)
    found["trained"] = whole_weights(engine)
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_statistics_agree_and_the_same_ones_give_the_same_masks_on_1_2_3_ranks(pools, family):
    model = make(family)
    expected = dsee_scale.calibrate(model, batches(5))
    dsee_scale.prune(model, ROWS, expected)
    masks = {name: value == 0 for name, value in whole_weights(model).items()}
    for world_size in (1, 2, 3):
        found = pools(world_size).run(statistics, family, zero3_config(), world_size)
        for each in found:
            assert each.tokens == expected.tokens and each.fingerprint == expected.fingerprint
            for name, value in expected.squares.items():
                torch.testing.assert_close(each.squares[name], value, rtol=1e-5, atol=1e-7)
                assert torch.equal(each.squares[name], found[0].squares[name])
        for each in pools(world_size).run(pruned, family, ROWS, zero3_config(), world_size, expected):
            for name, value in each["weights"].items():
                if "dsee" not in name:
                    assert torch.equal(value == 0, masks[name]), (world_size, name)


ENGINES = {
    "zero3": (zero3_config(), 2),
    "zero3, 3 ranks": (zero3_config(), 3),
    "zero3, resident": (zero3_config(stage3_param_persistence_threshold=10**7), 2),
    "zero3, offload": (zero3_config(offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}), 2),
    "zero3, hierarchical": (zero3_config(zero_hpz_partition_size=2), 2),
    "zero2": (zero3_config(stage=2), 2),
}


@pytest.mark.parametrize("engine", list(ENGINES))
@pytest.mark.parametrize("case", list(REFIT))
def test_refitted_weights_are_those_of_the_dense_path_and_training_goes_on(pools, case, engine):
    ds_config, world_size = ENGINES[engine]
    family = "everything"
    model = make(family)
    report = dsee_scale.prune(model, REFIT[case], batches(5))
    expected = whole_weights(model)
    for found in pools(world_size).run(pruned, family, REFIT[case], ds_config, world_size, None):
        for name, (zeros, total) in found["matrices"].items():  # what the loss says is a sum over ranks too
            assert abs(zeros - report.matrices[name][0]) <= (0.01 * total if case == "loss" else 0), name
        assert sum(zeros for zeros, _ in found["matrices"].values()) == report.removed
        for name, layer in adapted_layers(model).items():
            weight = f"{name}.weight"
            assert torch.equal(found["trained"][weight], found["weights"][weight]), name
            if weight.removesuffix(".weight") not in report.matrices:
                continue
            # Sums over ranks round otherwise, and an entry near the threshold may swap with its neighbour.
            same = (found["weights"][weight] == 0) == (expected[weight] == 0)
            assert same.float().mean() > 0.97, name
            close = (found["weights"][weight] - expected[weight]).norm() / expected[weight].norm()
            assert close < 0.2, (name, close)
            rows, cols = found["supports"][name].long()
            assert (found["weights"][weight][rows, cols] != 0).all()
            flat = found["weights"][f"{name}.dsee_flat"]
            _, b, values = layer.dsee_spec.split(flat)
            assert b.any() and not values.any()
            assert found["trained"][f"{name}.dsee_flat"][-len(values) :].any()


@contextlib.contextmanager
def small_pieces() -> Iterator[pytest.MonkeyPatch]:
    """Matrices of tests are cut, and their Gram matrices factorised by all ranks, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        yield patch


def refitted_in_pieces(
    family: str, config: PruneConfig, ds_config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Every rank is given the same batches: sums over two of them, per token, are then the same bit for bit."""
    engine = live(family, ds_config)
    with small_pieces():
        dsee_scale.prune(engine, config, batches(2))
    return whole_weights(engine)


PIECES = [
    ("everything", PruneConfig(sparsity=0.4), 3),
    ("everything", PruneConfig(sparsity=0.4, scope="matrix", block_steps=3), 3),
    ("everything", PruneConfig(sparsity=0.4, scope="row"), 2),
    ("gpt2", PruneConfig(pattern="2:4", modules=("*attn*",)), 3),
]


@pytest.mark.parametrize(("family", "config", "stage"), PIECES)
@pytest.mark.parametrize("ranks", [2, 3])
def test_matrices_in_pieces_are_solved_alike_on_any_number_of_ranks(pools, ranks, family, config, stage):
    expected, *_ = pools(1).run(refitted_in_pieces, family, config, zero3_config(stage=stage))
    for found in pools(ranks).run(refitted_in_pieces, family, config, zero3_config(stage=stage)):
        for name, weight in expected.items():
            # Products of other widths round otherwise, and an entry near the threshold may swap with its neighbour.
            assert ((found[name] == 0) == (weight == 0)).float().mean() > 0.97, name
            assert (found[name] - weight).norm() <= 0.1 * weight.norm(), name
            assert (
                abs(int((found[name] == 0).sum()) - int((weight == 0).sum()))
                <= (config.scope == "global") * 20
            )


def refused(padding_only: bool) -> tuple[str, bool]:
    engine = live("llama", zero3_config())
    before = whole_weights(engine)
    data = here(2) if dist.get_rank() == 0 else []
    if padding_only:
        data = [{**batch, "attention_mask": torch.zeros(2, 12, dtype=torch.int64)} for batch in here(2)]
    with pytest.raises(CalibrationError) as caught:
        dsee_scale.prune(engine, PruneConfig(), data)
    after = whole_weights(engine)
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("padding_only", "words"), [(False, "1 of 2 ranks have no calibration batch"), (True, "no token")]
)
def test_bad_calibration_is_the_same_error_on_every_rank(pools, padding_only, words):
    found = pools(2).run(refused, padding_only)
    assert found[0][0] == found[1][0] and words in found[0][0]
    assert all(unchanged for _, unchanged in found)


FIRST_NEEDS = {"look": (blocks, "_finite"), "solver": (matrix, "sparsegpt")}
"""Where memory may end: to see whether a batch's activations are finite, and to solve the first matrix."""


def out_of_memory(what: str) -> tuple[str, bool]:
    """Rank 1 has no room."""
    engine = live("llama", zero3_config())
    before = whole_weights(engine)

    def none(*_: Any, **__: Any) -> None:
        raise MemoryError("no room")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(*FIRST_NEEDS[what], none)
        with pytest.raises(PartitionError) as caught:
            dsee_scale.prune(engine, PruneConfig(), here(2))
    after = whole_weights(engine)
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("look", "rank 1: MemoryError: no room"),
        ("solver", "out of memory while re-fitting a block; lower gram_memory_mib (now 4096)"),
    ],
)
def test_a_rank_without_memory_is_the_same_error_on_every_rank(pools, what, words):
    found = pools(2).run(out_of_memory, what)
    assert found[0] == found[1] and found[0][1] and words in found[0][0]


def short_of(what: str) -> tuple[str, bool]:
    """Rank 1 lacks the memory for one of the steps of a block's re-fit."""
    engine = live("llama", zero3_config())
    before = whole_weights(engine)
    real = Zero3Partition.exchange_bytes
    calls = 0

    def endless(*args: Any) -> int:
        """The second exchange of a block is the way back."""
        nonlocal calls
        calls += 1
        return 1 << 60 if calls == 2 else real(*args)

    def none(*_: Any) -> None:
        raise MemoryError("no room")

    places = {
        "way back": (Zero3Partition, "exchange_bytes", endless),
        "weights": (block, "_effective", none),
        "sums": (block, "add_gram_", none),
        "numbers": (pieces, "_count_costs_", none),
        "pieces": (pieces, "_solve_own", none),
    }
    with small_pieces() as patch:
        # q, k and v to different owners
        patch.setattr(
            pieces, "deal_pieces", lambda sizes, ranks: [(i + 1) % ranks for i in range(len(sizes))]
        )
        if dist.get_rank() == 1:
            patch.setattr(*places[what])
        with pytest.raises(PartitionError) as caught:
            dsee_scale.prune(engine, PruneConfig(), here(2))
    after = whole_weights(engine)
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("what", ["sums", "weights", "numbers", "pieces", "way back"])
def test_a_rank_short_of_memory_anywhere_in_a_block_leaves_no_other_waiting(pools, what):
    found = pools(2).run(short_of, what)
    assert found[0] == found[1] and found[0][1]
    assert "out of memory while re-fitting a block; lower gram_memory_mib (now 4096)" in found[0][0]


RUNS = {
    "tuned outputs": (output, "run_block"),
    "sums": (block, "run_block"),
    "steps": (output, "_error"),
    "next inputs": (blocks, "run_block"),
}
"""What each pass calls to run a block."""


def short_in_a_pass(what: str, error: Exception) -> tuple[str, set[str]]:
    """Rank 1 fails at its second batch of the first such pass; the message, and the parts whose weights changed."""
    model = torch.nn.parallel.DistributedDataParallel(make("llama"))
    before = whole_weights(model)
    where, name = RUNS[what]
    run, runs = getattr(where, name), 0

    def fails(*args: Any) -> torch.Tensor:
        nonlocal runs
        runs += 1
        if runs == 2:
            raise error
        return run(*args)

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(where, name, fails)
        with pytest.raises(PartitionError) as caught:
            dsee_scale.prune(model, PruneConfig(block_steps=2 * (where is output)), here(2))
    after = whole_weights(model)
    changed = {each for each in before if not torch.equal(before[each], after[each])}
    return str(caught.value), {".".join(each.split(".")[:3]) for each in changed}


def lone_on_one_rank(call: str, lone: int) -> str:
    model = torch.nn.parallel.DistributedDataParallel(make("llama"))
    batch = here(1)[0]
    data: Any = batch if dist.get_rank() == lone else [batch]
    with pytest.raises(CalibrationError) as caught:
        dsee_scale.prune(model, PruneConfig(), data) if call == "prune" else dsee_scale.calibrate(model, data)
    return str(caught.value)


@pytest.mark.parametrize("lone", [0, 1])
@pytest.mark.parametrize("call", ["prune", "calibrate"])
def test_one_batch_in_place_of_a_list_on_one_rank_is_said_on_all(pools, call, lone):
    found = pools(2).run(lone_on_one_rank, call, lone)
    assert found[0] == found[1]
    assert "one batch" in found[0] and ("1 with batches" in found[0] or "expected an iterable" in found[0])


class Closed:
    """Batches that one rank cannot open."""

    def __iter__(self) -> Iterator[Any]:
        if dist.get_rank() == 1:
            raise OSError("cannot open the calibration file")
        return iter(here(2))


def closed_on_one_rank(call: str) -> str:
    model = torch.nn.parallel.DistributedDataParallel(make("llama"))
    with pytest.raises((CalibrationError, ConfigError)) as caught:
        dsee_scale.prune(model, PruneConfig(), Closed()) if call == "prune" else dsee_scale.calibrate(
            model, Closed()
        )
    return str(caught.value)


@pytest.mark.parametrize("call", ["prune", "calibrate"])
@pytest.mark.timeout(60)
def test_batches_that_one_rank_cannot_open_are_said_on_all(pools, call):
    one, two = pools(2).run(closed_on_one_rank, call)
    assert one == two and "OSError: cannot open the calibration file" in one


def adapted(model: torch.nn.Module, target: str, ds_config: dict[str, Any]) -> Any:
    """An engine of a model whose adapters change nothing yet."""
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, target_modules=(target,)))
    return engine_for(model, ds_config)


def short_on_one_rank(ds_config: dict[str, Any], refit: bool) -> tuple[str, bool]:
    """Of rank 1's tokens a layer sees some; the mask of rank 0 leaves out nothing."""
    torch.manual_seed(0)
    engine = adapted(Reader(lambda x: x[:, :7]), "whole", ds_config)
    before = whole_weights(engine)
    batch = batches(3)[2]
    if dist.get_rank() == 0:
        batch["attention_mask"] = torch.ones(2, 12)
    with pytest.raises(CalibrationError) as caught:
        dsee_scale.prune(engine, PruneConfig(refit=refit, scope="matrix" if refit else None), [batch])
    after = whole_weights(engine)
    return str(caught.value), all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("refit", [True, False])
def test_a_mask_that_fits_none_of_a_layers_calls_on_one_rank_is_said_on_all(pools, refit):
    one, two = pools(2).run(short_on_one_rank, zero3_config(), refit)
    assert one == two and one[1] and "layers.0.part.cut reads inputs of shape (2, 7)" in one[0]


def shared(ds_config: dict[str, Any], family: str) -> tuple[Statistics, list[set[str]]]:
    """Statistics, and which layers have one record."""
    if family == "llama":
        found = statistics(family, ds_config, dist.get_world_size())
    else:
        world_size = dist.get_world_size()
        engine = adapted(SHARING[family](), {"empty": "gate", "deberta 2": "value_proj"}[family], ds_config)
        found = dsee_scale.calibrate(engine, here(world_size))
    by_record: dict[int, set[str]] = {}
    for name, squares in found.squares.items():
        by_record.setdefault(id(squares), set()).add(name)
    return found, sorted(by_record.values(), key=min)


@pytest.mark.parametrize("family", ["llama", "deberta 2", "empty"])
def test_the_same_layers_share_a_record_on_any_number_of_ranks_under_zero3(pools, family):
    model = make(family) if family == "llama" else SHARING[family]()
    expected = dsee_scale.calibrate(model, batches(5))
    groups: list[list[set[str]]] = []
    for world_size in (1, 2, 3):
        for found, sharing in pools(world_size).run(shared, zero3_config(), family):
            groups.append(sharing)
            assert found.tokens == expected.tokens
            for name, value in expected.squares.items():
                torch.testing.assert_close(found.squares[name], value, rtol=1e-5, atol=1e-7)
    assert all(each == groups[0] for each in groups)
    assert max(map(len, groups[0])) == {"llama": 3, "deberta 2": 2, "empty": 1}[family]


FAILURES = {
    torch.OutOfMemoryError("no room"): "out of memory while re-fitting a block; lower ",
    IndexError("no such position"): "rank 1: IndexError: no such position",
}


@pytest.mark.parametrize("error", list(FAILURES), ids=repr)
@pytest.mark.parametrize("what", list(RUNS))
def test_an_error_of_one_rank_within_a_block_of_replicas_is_every_ranks(pools, what, error):
    found = pools(2).run(short_in_a_pass, what, error)
    assert found[0] == found[1] and FAILURES[error] in found[0][0]
    written = what == "next inputs"
    assert found[0][1] == ({"model.layers.0"} if written else set())
    assert ("model.layers.0 to model.layers.0 are pruned and re-fitted" in found[0][0]) == written


def bad_on_one_rank(ds_config: dict[str, Any], bad: str, refit: bool) -> tuple[str, list[float]]:
    engine = live("llama", ds_config)
    data = here(2)
    if dist.get_rank() == 1:
        wrong = {"ids": {"input_ids": data[0]["input_ids"] + 90}}
        wrong["positions"] = {**data[0], "position_ids": torch.ones(7, 12, dtype=torch.int64)}
        wrong["argument"] = {**data[0], "inputs_embeds": torch.ones(2, 12, 3)}
        data = [data[0], wrong[bad]]
    with pytest.raises(CalibrationError) as caught:
        dsee_scale.prune(engine, PruneConfig(refit=refit), data)
    return str(caught.value), train(engine, steps=1)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(("stage", "bad"), [(3, "ids"), (3, "positions"), (2, "argument")])
def test_a_bad_batch_of_one_rank_is_said_on_all_of_them(pools, stage, bad, refit):
    """One that only its forward pass shows is said by all where no rank waits for another in it: not under ZeRO-3."""
    config = zero3_config(stage=2) if stage == 2 else zero3_config()
    (text, loss), (other, _) = pools(2).run(bad_on_one_rank, config, bad, refit)
    assert text == other and "a calibration batch of rank 1" in text
    assert all(value == value for value in loss)


class SomeExperts(torch.nn.Module):
    """A block whose second pair of layers only runs where the data ask for it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict()])
        for name in ("gate", "up", "other_gate", "other_up"):
            self.blocks[0][name] = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, other: bool) -> torch.Tensor:
        pair = ("other_gate", "other_up") if other else ("gate", "up")
        return self.blocks[0][pair[0]](x) * self.blocks[0][pair[1]](x)


def routed_apart() -> dict[str, int]:
    torch.manual_seed(0)
    model, x = SomeExperts().requires_grad_(False), torch.ones(3, 8)
    data = [(x, False), (x, True)] if dist.get_rank() == 0 else [(x, False), (x, False)]
    dsee_scale.prune(model, PruneConfig(refit=False), data)
    return dict(dsee_scale.calibrate(model, data).tokens)


def test_layers_that_one_ranks_tokens_never_reach_keep_the_ranks_together(pools):
    found = pools(2).run(routed_apart)
    assert (
        found[0]
        == found[1]
        == {"blocks.0.gate": 9, "blocks.0.up": 9, "blocks.0.other_gate": 3, "blocks.0.other_up": 3}
    )


def losses_after(calibrate: bool) -> list[float]:
    engine = live("llama", zero3_config())
    train(engine, steps=1)
    if calibrate:
        dsee_scale.calibrate(engine, here(2))
    return train(engine, steps=2)


def test_calibrating_a_live_engine_leaves_training_as_it_was(pools):
    assert pools(2).run(losses_after, True) == pools(2).run(losses_after, False)


def on_one_rank_alone() -> str:
    """A batch of rank 1 gives a later block something else than the block before it did."""
    torch.manual_seed(0)
    model = Adding(in_place=False).requires_grad_(False)
    data = [{"x": torch.randn(4, 8)} for _ in range(2)]
    if dist.get_rank() == 1:
        data[1]["feature"] = torch.ones(8)
    with pytest.raises(TargetError) as caught:
        dsee_scale.prune(model, PruneConfig(sparsity=0.5), data)
    return str(caught.value)


def test_blocks_that_one_rank_finds_broken_are_refused_on_every_rank(pools):
    one, two = pools(2).run(on_one_rank_alone)
    assert one == two and "blocks.1 does not simply continue" in one
