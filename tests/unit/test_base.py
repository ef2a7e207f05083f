"""A re-fitted base is written once; adapters know it by content and go onto no other."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import FormatError, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.state import model_state
from dsee_scale.export.export import save_base
from dsee_scale.export.from_files import export_files
from dsee_scale.passes.fingerprint import as_text, rounded_sum
from tests.models import build, llama_config, token_batch
from tests.unit.test_calibrate import batches, make


def refitted() -> torch.nn.Module:
    model = make("everything")
    dsee_scale.prune(model, PruneConfig(), batches())
    for index, layer in enumerate(adapted_layers(model).values()):
        generator = torch.Generator().manual_seed(index)
        layer.dsee_B.data.copy_(torch.randn(layer.dsee_B.shape, generator=generator) * 0.05)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(token_batch()).logits


def test_an_adapter_goes_onto_the_base_that_was_saved_and_onto_no_other(tmp_path):
    model = refitted()
    build(llama_config()).save_pretrained(tmp_path / "original")
    save_base(model, tmp_path / "base")
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    for dtype in (torch.float32, torch.bfloat16):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        record = dsee_scale.load_adapter(base, tmp_path / "adapter")
        assert record.base["id"] == str(tmp_path / "base") and record.refitted
        if dtype == torch.float32:
            assert torch.equal(logits(base), logits(model))
    other = make("everything", trained=False)
    for layer in adapted_layers(other).values():
        dsee_scale.adapters.linear.detach(layer)
    before = [param.clone() for param in other.parameters()]
    with pytest.raises(FormatError, match=r"re-fitted.*q_proj\.weight is another one.*`base` folder"):
        dsee_scale.load_adapter(other, tmp_path / "adapter")
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert not adapted_layers(other) and not model_state(other).pruned


def test_export_files_takes_the_saved_base_alone(tmp_path):
    model = refitted()
    save_base(model, tmp_path / "base")
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    dsee_scale.export_model(model, tmp_path / "live")
    found, live = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "live"))
    assert torch.equal(logits(found), logits(live))
    stale = refitted()
    stale.model.layers[0].self_attn.q_proj.weight.data[0] *= 2
    save_base(stale, tmp_path / "stale")
    with pytest.raises(FormatError, match=r"re-fitted.*q_proj\.weight is another one"):
        export_files(tmp_path / "adapter", tmp_path / "stale", tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_a_checksum_does_not_depend_on_where_a_weight_is_cut():
    weight = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    whole = rounded_sum(weight, 0)
    for cut in (0, 1, 500, 1001):
        assert as_text(rounded_sum(weight[:cut], 0) + rounded_sum(weight[cut:], cut)) == as_text(whole)
    assert as_text(rounded_sum(weight.bfloat16(), 0)) == as_text(whole)
    swapped = weight.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert as_text(rounded_sum(swapped, 0)) != as_text(whole)


def test_a_later_pruning_renews_the_checksums(tmp_path):
    model = refitted()
    save_base(model, tmp_path / "base")
    dsee_scale.prune(model, PruneConfig(sparsity=0.7, score="W"))
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    dsee_scale.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(logits(base), logits(model))


@pytest.mark.parametrize("how", ["tuned", "pruned", "re-fitted"])
def test_no_update_is_put_twice_into_a_model_that_was_exported_with_it(tmp_path, how):
    """Nor is one that was saved before the re-fit; what is trained on the export goes onto it alone."""
    model = make("everything")
    build(llama_config()).save_pretrained(tmp_path / "published")
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    if how != "tuned":
        dsee_scale.prune(model, PruneConfig(refit=how == "re-fitted"), batches())
    if how == "pruned":
        dsee_scale.save_adapter(model, tmp_path / "adapter", overwrite=True)
    dsee_scale.export_model(model, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with pytest.raises(
        FormatError, match="was made for other weights than this base has, which holds an update"
    ):
        dsee_scale.load_adapter(exported, tmp_path / "adapter")
    assert not adapted_layers(exported)
    torch.testing.assert_close(logits(exported), logits(model))
    with pytest.raises(FormatError, match="holds an update already"):
        export_files(tmp_path / "adapter", tmp_path / "model", tmp_path / "twice")
    assert not (tmp_path / "twice").exists()

    dsee_scale.inject(exported, dsee_scale.DSEEConfig(rank=2))
    dsee_scale.save_adapter(exported, tmp_path / "next")
    dsee_scale.load_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "next")
    export_files(tmp_path / "next", tmp_path / "model", tmp_path / "further")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    dsee_scale.prune(again, PruneConfig(sparsity=0.7, score="W"))  # and no update of its own
    dsee_scale.export_model(again, tmp_path / "sparser")
    with pytest.raises(FormatError, match="holds an update already"):
        export_files(tmp_path / "adapter", tmp_path / "sparser", tmp_path / "twice")
    published = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    with pytest.raises(FormatError, match="have an update put in, and this one is another"):
        dsee_scale.load_adapter(published, tmp_path / "next")
    with pytest.raises(FormatError, match="this one is another"):
        export_files(tmp_path / "next", tmp_path / "further", tmp_path / "twice")


def test_an_export_from_files_is_marked_as_the_live_one_is(tmp_path):
    model = make("everything")
    build(llama_config()).save_pretrained(tmp_path / "published")
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    dsee_scale.export_model(model, tmp_path / "live")
    export_files(tmp_path / "adapter", tmp_path / "published", tmp_path / "files")
    configs = [AutoModelForCausalLM.from_pretrained(tmp_path / name).config for name in ("live", "files")]
    assert configs[0].dsee_refit == configs[1].dsee_refit
