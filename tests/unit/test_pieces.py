"""Matrices in pieces, and Gram matrices in panels, against the whole ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.algorithms.refit import factorise, upper_inverse
from dsee_scale.partition import open_partition
from dsee_scale.pruning.refit import panels, pieces
from dsee_scale.pruning.refit.panels import upper_inverse_by_panels
from tests.unit.test_calibrate import batches, make
from tests.unit.test_refit import problem

pytestmark = pytest.mark.unit


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What large matrices go through, for small ones."""
    make_small(monkeypatch)


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LEAST_ROWS", 4)
    monkeypatch.setattr(pieces, "PIECE_WORK", 12 * 32**2)
    monkeypatch.setattr(panels, "WIDE", 16)
    monkeypatch.setattr(panels, "PANEL", 12)


@pytest.mark.parametrize("inputs", [1, 11, 12, 13, 60, 100])
def test_panels_give_the_factor_of_the_whole_matrix(small, inputs):
    partition = open_partition(nn.Linear(2, 2))
    _, gram = problem(1, inputs)
    expected = factorise(gram.double(), 0.1)
    found = factorise(gram.double(), 0.1, lambda damped: upper_inverse_by_panels(damped, partition))
    torch.testing.assert_close(found.upper, expected.upper)
    assert torch.equal(found.upper, found.upper.triu())


def test_panels_say_where_a_matrix_is_not_positive(small):
    partition = open_partition(nn.Linear(2, 2))
    wrong = torch.eye(40)
    wrong[30, 30] = -1
    assert upper_inverse(wrong) is None and upper_inverse_by_panels(wrong.clone(), partition) is None
    _, gram = problem(1, 40, tokens=5)  # fewer tokens than inputs: damping has to grow
    found, expected = (
        factorise(gram, 1e-9, how)
        for how in (lambda damped: upper_inverse_by_panels(damped, partition), upper_inverse)
    )
    assert found.record == expected.record and found.record.num_retries > 0


@pytest.mark.parametrize(
    "sizes", [(8192, 8192), (1024, 8192), (8192, 28672), (576, 576), (100, 60000), (7, 3)]
)
def test_pieces_cover_a_matrix_and_are_about_as_large(sizes):
    cuts = pieces.cut(*sizes)
    assert [row for rows in cuts for row in range(rows.start, rows.stop)] == list(range(sizes[0]))
    work = [(rows.stop - rows.start) * sizes[1] ** 2 for rows in cuts]
    assert max(work) <= max(pieces.PIECE_WORK, pieces.LEAST_ROWS * sizes[1] ** 2)
    assert len(set(work[:-1])) <= 1


SETTINGS = [
    {"sparsity": 0.4, "scope": "matrix"},
    {"sparsity": 0.4, "scope": "row"},
    {"pattern": "2:4", "modules": ("*attn*",)},
    {"sparsity": 0.4},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["everything", "gpt2"])
def test_a_model_refitted_in_pieces_is_about_the_one_refitted_whole(monkeypatch, family, settings):
    whole, cut, data = make(family), make(family), batches()
    dsee_scale.prune(whole, PruneConfig(**settings), data)
    make_small(monkeypatch)
    report = dsee_scale.prune(cut, PruneConfig(**settings), data)
    weights = dict(whole.named_parameters())
    for name, param in cut.named_parameters():
        if name.removesuffix(".weight") not in report.matrices:
            continue
        expected = weights[name]
        # The number is exact; which entries of a matrix it falls on, is settled for each piece by Wanda's costs.
        assert (param == 0).sum() == (expected == 0).sum(), name
        same = ((param == 0) == (expected == 0)).float().mean()
        by_piece = "pattern" not in settings and settings.get("scope") != "row"
        assert same > (0.85 if by_piece else 0.99), name
        if not by_piece:
            torch.testing.assert_close(param, expected, atol=1e-3, rtol=1e-2)


def test_pruning_again_to_the_same_share_takes_nothing_more(small):
    """Zeros go before anything else, also before entries whose input is always zero."""
    model, data = make("everything"), batches()
    model.model.layers[0].input_layernorm.weight.data[:6] = 0
    config = PruneConfig(sparsity=0.4, scope="matrix")
    dsee_scale.prune(model, config, data)
    before = {name: param == 0 for name, param in model.named_parameters()}
    report = dsee_scale.prune(model, config, data)
    assert report.matrices
    for name, param in model.named_parameters():
        assert torch.equal(param == 0, before[name]), name


def test_inputs_that_are_gone_stay_out_of_pieces(small):
    model, data = make("everything"), batches()
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=7, refit=False), data)
    gone = [block.mlp.down_proj.weight.eq(0).all(dim=0) for block in model.model.layers]
    assert all(int(each.sum()) == 7 for each in gone)
    dsee_scale.prune(model, PruneConfig(sparsity=0.4), data)
    for each, block in zip(gone, model.model.layers, strict=True):
        assert block.mlp.down_proj.weight.isfinite().all()
        assert not block.mlp.down_proj.weight[:, each].any()


def test_what_the_solver_met_is_said(monkeypatch, caplog):
    """A matrix that is factorised at the second try, and one with inputs that no token has."""
    tries = 0

    def fails_once(damped: torch.Tensor) -> torch.Tensor | None:
        nonlocal tries
        tries += 1
        return None if tries == 1 else upper_inverse(damped)

    monkeypatch.setattr(pieces, "factorise", lambda gram, damping, _: factorise(gram, damping, fails_once))
    model = make("everything")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:3] = 0  # its product with gate is then zero: down's inputs
        model.model.layers[1].mlp.up_proj.dsee_B.zero_()
        model.model.layers[1].mlp.up_proj.dsee_values.zero_()
    with caplog.at_level("INFO"):
        dsee_scale.prune(model, PruneConfig(sparsity=0.4, scope="matrix"), batches(1))
    said = [record for record in caplog.records if "pieces" in record.name]
    warnings = [record.getMessage() for record in said if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "model.layers.0.mlp.down_proj are nearly dependent" in warnings[0]
    assert "with 1 times its mean diagonal added, instead of 0.1" in warnings[0]
    assert any("3 of the 53 inputs of model.layers.1.mlp.down_proj" in each.getMessage() for each in said)
