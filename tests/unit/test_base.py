"""A re-fitted base is written once; adapters know it by content and go onto no other."""

from __future__ import annotations

import copy
import hashlib
import json
import re

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
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        record = dsee_scale.load_adapter(base, tmp_path / "adapter")
        assert record.base["id"] == str(tmp_path / "base") and record.refitted
        if dtype == torch.float32:
            assert torch.equal(logits(base), logits(model))
    other = make("everything", trained=False)
    for layer in adapted_layers(other).values():
        dsee_scale.adapters.linear.detach(layer)
    with pytest.raises(FormatError, match=r"re-fitted.*q_proj\.weight is another one"):
        dsee_scale.load_adapter(copy.deepcopy(other).half(), tmp_path / "adapter")
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


@pytest.fixture(params=["tuned", "pruned"])
def saved(request, tmp_path):
    """An adapter's folder; its base is `build(llama_config())`, not re-fitted."""
    model = make("everything")
    if request.param == "pruned":
        dsee_scale.prune(model, PruneConfig(sparsity=0.5, score="WABS", refit=False))
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_that_an_adapter_was_trained_on_is_known_in_every_dtype(saved, caplog, dtype):
    dsee_scale.load_adapter(build(llama_config()).to(dtype), saved)
    assert "other weights" not in caplog.text


def test_another_base_of_the_same_shapes_is_said(saved, caplog, tmp_path):
    sibling = build(llama_config())
    with torch.no_grad():  # as an update put into one matrix would do
        sibling.model.layers[1].mlp.up_proj.weight += 0.01 * torch.randn(
            sibling.model.layers[1].mlp.up_proj.weight.shape
        )
    sibling.save_pretrained(tmp_path / "sibling")
    export_files(saved, tmp_path / "sibling", tmp_path / "out")
    words = r"dsee_config\.json was made on other weights than this base has, of which model\.layers\.1\.mlp\.up_proj"
    assert re.search(words, caplog.text)
    caplog.clear()
    dsee_scale.load_adapter(sibling, saved)
    assert re.search(words, caplog.text) and caplog.text.count("other weights") == 1


def test_rows_added_to_the_embedding_do_not_make_another_base(tmp_path, caplog):
    model = build(llama_config(tie_word_embeddings=False, vocab_size=1000))
    dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=2, num_sparse=4, target_modules=("q_proj",)))
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    larger = build(llama_config(tie_word_embeddings=False, vocab_size=1000))
    larger.resize_token_embeddings(larger.config.vocab_size + 3)
    larger.config.vocab_size -= 3
    dsee_scale.load_adapter(larger, tmp_path / "adapter")
    assert "other weights" not in caplog.text


@pytest.mark.parametrize("row", [[0.0] * 3, ["x"] * 8, "12345678", 5])
def test_a_damaged_sample_is_refused(saved, row):
    values = json.loads((saved / "dsee_config.json").read_text())
    assert len(values["samples"]) > 10
    values["samples"]["model.embed_tokens.weight"] = row
    data = json.dumps(values).encode()
    (saved / "dsee_config.json").write_bytes(data)
    manifest = json.loads((saved / "dsee_manifest.json").read_text())
    manifest["files"]["dsee_config.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (saved / "dsee_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="dsee_config"):
        dsee_scale.load_adapter(build(llama_config()), saved)
