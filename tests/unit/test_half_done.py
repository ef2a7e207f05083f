"""A pruning that fails: the model is as it was, or says which weights were written and is used no more."""

from __future__ import annotations

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.errors import CalibrationError, PartitionError
from dsee_scale.pruning import lowest, prune
from tests.models import build, llama_config, token_batch


def injected() -> torch.nn.Module:
    model = build(llama_config())
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=7))
    return model


def batches() -> list[torch.Tensor]:
    return [token_batch(batch=2, length=16, seed=seed) for seed in range(3)]


def refuses_everything(model: torch.nn.Module, tmp_path, match: str) -> None:
    for use in (
        lambda: model(batches()[0]),
        lambda: dsee_scale.save_adapter(model, tmp_path / "adapter"),
        lambda: dsee_scale.prune(model, PruneConfig(score="W", refit=False)),
        lambda: dsee_scale.export_model(model, tmp_path / "model"),
    ):
        with pytest.raises(PartitionError, match=match):
            use()


@pytest.mark.parametrize("refit", [True, False])
def test_a_later_pruning_that_fails_says_which_ones_are_done(refit, tmp_path):
    model = injected()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = torch.inf
    neurons = PruneConfig(pattern="neurons", num_per_layer=8, score="W", refit=False)
    with pytest.raises(
        PartitionError, match=r"half way: the pruning of neurons is done.*NaN or infinity"
    ) as caught:
        dsee_scale.prune(model, [neurons, PruneConfig(refit=refit)], batches())
    assert "Nothing was" not in str(caught.value)
    refuses_everything(model, tmp_path, "the pruning of neurons is done")


@pytest.mark.parametrize("config", [PruneConfig(refit=False), PruneConfig(score="W", refit=False)])
def test_a_pruning_that_fails_while_it_writes_names_what_may_be_written(config, monkeypatch, tmp_path):
    model, calls = injected(), 0
    name = "_zero_groups" if config.scope == "row" else "_apply_to"
    write = getattr(lowest, name)

    def short(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError("no room")
        return write(*args)

    monkeypatch.setattr(lowest, name, short)
    said = (
        r"q_proj.weight and 2 more, up to model.layers.0.self_attn.v_proj.weight, may be pruned.*\(no room\)"
    )
    with pytest.raises(PartitionError, match=said):
        dsee_scale.prune(model, config, batches())
    refuses_everything(model, tmp_path, "may be pruned")


def test_a_pruning_that_fails_before_it_writes_leaves_the_model_as_it_was(monkeypatch):
    model = injected()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def short(*args):
        raise CalibrationError("no room. Nothing was removed")

    with monkeypatch.context() as patch:
        patch.setattr(prune, "remove_in_rows", short)
        with pytest.raises(CalibrationError, match="Nothing was removed"):
            dsee_scale.prune(model, PruneConfig(refit=False, scope="row"), batches())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    dsee_scale.prune(model, PruneConfig(refit=False, scope="row"), batches())
