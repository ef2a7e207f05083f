"""Heads and neurons cut out of files: smaller models with the outputs of the zeroed ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.state import model_state
from dsee_scale.adapters.units import find_units
from dsee_scale.cli import main
from dsee_scale.errors import FormatError, TargetError
from dsee_scale.export.export import export_model
from dsee_scale.export.from_files import export_files
from dsee_scale.export.structure import STRUCTURE_FILE
from dsee_scale.partition import open_partition
from tests.models import build, llama_config
from tests.unit.test_adapter_files import refresh_manifest
from tests.unit.test_lora_export import with_update
from tests.unit.test_patterns import GROUPED, MODELS, adapted, output

STOCK = {
    ("llama", "heads"): True,
    ("llama", "neurons"): True,
    ("biased", "heads"): True,
    ("biased", "neurons"): True,
    ("gpt2", "heads"): False,
    ("gpt2", "neurons"): True,
    ("bert", "heads"): False,
    ("bert", "neurons"): True,
    ("roberta", "heads"): False,
    ("roberta", "neurons"): True,
}
"""Whether the family's config can express fewer of them."""


def smaller(family: str, *kinds: str, scope: str = "matrix") -> nn.Module:
    model = adapted(family)
    for kind in kinds:
        dsee_scale.prune(model, PruneConfig(pattern=kind, sparsity=0.4, scope=scope, score="W"))
    return model


def unequal(family: str, *kinds: str) -> nn.Module:
    model = adapted(family)
    for kind in kinds:  # far smaller in the first block, so that a common budget takes it all from there
        for part in find_units(model, kind, lambda p: p.shape)[0].parts:
            part.module.weight.data.mul_(1e-2)
    for kind in kinds:
        dsee_scale.prune(model, PruneConfig(pattern=kind, sparsity=0.34, score="W"))
    return model


def num_parameters(model: nn.Module) -> int:
    return sum(param.numel() for name, param in model.named_parameters() if "dsee_" not in name)


@pytest.mark.parametrize("form", ["masked", "dense"])
@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("heads", "neurons")])
@pytest.mark.parametrize("family", list(MODELS))
def test_equal_layers_become_a_smaller_model_with_the_same_logits(tmp_path, family, kinds, form):
    model = smaller(family, *kinds)
    report = export_model(model, tmp_path / "out", delta=form)
    stock = all(STOCK[family, kind] for kind in kinds)
    assert report.loads_with == ("transformers" if stock else "dsee_scale.load_pretrained")
    assert (tmp_path / "out" / STRUCTURE_FILE).exists() != stock
    loaded = dsee_scale.load_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert num_parameters(loaded) == report.num_parameters < num_parameters(model)
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    if stock:
        plain = type(model).from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(output(plain), output(model), atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(RuntimeError, match="mismatch"):
            type(model).from_pretrained(tmp_path / "out")
        assert "stock transformers cannot load" in str(report)


@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("heads", "neurons")])
@pytest.mark.parametrize("family", list(MODELS))
def test_unequal_layers_load_through_load_pretrained(tmp_path, family, kinds):
    model = unequal(family, *kinds)
    report = export_model(model, tmp_path / "out")
    assert report.loads_with == "dsee_scale.load_pretrained"
    loaded = dsee_scale.load_pretrained(tmp_path / "out")
    sizes = [
        {layer.size for layer in find_units(loaded, kind, lambda p: p.shape)} for kind in ("heads", "neurons")
    ]
    assert any(len(found) == 2 for found in sizes)
    assert num_parameters(loaded) == report.num_parameters
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


def test_a_count_of_heads_that_the_config_class_refuses_goes_through_load_pretrained(tmp_path):
    """Llama's config wants the hidden size to be a multiple of the heads: 48 is none of 4 x 5 ... but of 4."""
    model = build(llama_config(**{**GROUPED, "num_key_value_heads": 6}))
    dsee_scale.prune(model, PruneConfig(pattern="heads", num_per_layer=1, score="W"))
    report = export_model(model, tmp_path / "five")
    assert report.loads_with == "dsee_scale.load_pretrained"
    assert "LlamaConfig: The hidden size (48) is not a multiple" in str(report)
    torch.testing.assert_close(output(dsee_scale.load_pretrained(tmp_path / "five")), output(model))


def test_the_config_says_what_is_left(tmp_path):
    export_model(smaller("llama", "heads", "neurons"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 4)
    assert config["intermediate_size"] == 31


def test_the_report_counts_what_was_cut_out_and_what_is_zero_besides(tmp_path):
    model = adapted("llama")
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))
    dsee_scale.prune(model, PruneConfig(pattern="heads", num_per_layer=2, score="W"))
    report = export_model(model, tmp_path / "out")
    assert "4 of 12 heads cut out of 2 blocks" in str(report)
    assert report.patterns == {"2:4": 14, "heads": 8}
    q = report.sparsity["model.layers.0.self_attn.q_proj.weight"]
    loaded = dsee_scale.load_pretrained(tmp_path / "out")
    weight = loaded.model.layers[0].self_attn.q_proj.weight
    assert weight.shape == (16, 48) and q == pytest.approx(float((weight == 0).float().mean())) == 0.5


def test_separate_keeps_shapes_for_the_adapter(tmp_path):
    model = smaller("llama", "heads")
    report = export_model(model, tmp_path / "out", delta="separate")
    assert report.num_parameters == num_parameters(model) and report.structure is None
    assert (
        type(model).from_pretrained(tmp_path / "out").model.layers[0].self_attn.q_proj.weight.shape[0] == 24
    )


@pytest.mark.parametrize("kinds", [("heads",), ("neurons",), ("heads", "neurons")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_an_adapter_folder_remembers_what_was_removed(tmp_path, family, kinds):
    """Saved, loaded into the base, exported: as from the live model; and from files alone too."""
    base = MODELS[family][0]()
    base.save_pretrained(tmp_path / "base")
    model = smaller(family, *kinds)
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    export_model(model, tmp_path / "live")
    again = type(model).from_pretrained(tmp_path / "base").eval()
    dsee_scale.load_adapter(again, tmp_path / "adapter")
    assert model_state(again).pruned == model_state(model).pruned
    export_model(again, tmp_path / "again")
    words = ["export", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--json", "--output"]
    assert main([*words, str(tmp_path / "files")]) == 0
    live = dsee_scale.load_pretrained(tmp_path / "live").state_dict()
    for folder in ("again", "files"):
        found = dsee_scale.load_pretrained(tmp_path / folder).state_dict()
        assert found.keys() == live.keys()
        for name in live:
            torch.testing.assert_close(found[name], live[name], atol=1e-6, rtol=1e-6)


def test_a_smaller_model_trains_and_is_pruned_again(tmp_path):
    export_model(smaller("gpt2", "heads"), tmp_path / "out")
    model = dsee_scale.load_pretrained(tmp_path / "out")
    dsee_scale.inject(
        model,
        DSEEConfig(rank=3, num_sparse=5, target_modules=("c_attn",), output_slices={"c_attn": ("q", "v")}),
    )
    dsee_scale.prune(model, PruneConfig(pattern="heads", num_per_layer=1, score="W"))
    export_model(model, tmp_path / "one")
    loaded = dsee_scale.load_pretrained(tmp_path / "one")
    assert loaded.transformer.h[0].attn.num_heads == 1
    torch.testing.assert_close(output(loaded), output(model.eval()), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_model_that_no_config_describes_is_written_with_its_sizes_again(tmp_path, family):
    export_model(unequal(family, "heads", "neurons"), tmp_path / "small")
    model = dsee_scale.load_pretrained(tmp_path / "small")
    dsee_scale.inject(model, MODELS[family][1])
    with_update(model)
    dsee_scale.prune(model, PruneConfig(score="W", mask_update=False))
    report = export_model(model, tmp_path / "live", delta="dense")
    assert report.loads_with == "dsee_scale.load_pretrained" and report.structure is None
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", tmp_path / "small", tmp_path / "files", delta="dense")
    for folder in ("live", "files"):
        loaded = dsee_scale.load_pretrained(tmp_path / folder)
        torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    export_model(model, tmp_path / "base", delta="none")
    base = dsee_scale.load_pretrained(tmp_path / "base")
    dsee_scale.load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(output(base), output(model), atol=1e-5, rtol=1e-5)
    dsee_scale.prune(model, PruneConfig(pattern="neurons", num_per_layer=3, score="W"))
    export_model(model, tmp_path / "smaller", delta="dense")
    dsee_scale.save_adapter(model, tmp_path / "adapter2")
    export_files(tmp_path / "adapter2", tmp_path / "small", tmp_path / "smaller2", delta="dense")
    for folder in ("smaller", "smaller2"):
        loaded = dsee_scale.load_pretrained(tmp_path / folder)
        torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)
    assert main(["inspect", str(tmp_path / "adapter2")]) == 0


def test_generation_with_a_cache_works_after_heads_are_gone(tmp_path):
    export_model(smaller("gpt2", "heads"), tmp_path / "gpt2")
    export_model(smaller("llama", "heads", "neurons"), tmp_path / "llama")
    for folder in ("gpt2", "llama"):
        model = dsee_scale.load_pretrained(tmp_path / folder)
        ids = torch.tensor([[5, 6, 7]])
        settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
        cached = model.generate(ids, use_cache=True, **settings)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))


def test_stock_transformers_needs_no_dsee_scale(tmp_path):
    model = smaller("llama", "heads", "neurons")
    export_model(model, tmp_path / "out")
    torch.save(output(model), tmp_path / "logits.pt")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r}).eval(); "
        "ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0)); "
        f"expected = torch.load({str(tmp_path / 'logits.pt')!r}); "
        "assert 'dsee_scale' not in sys.modules; "
        "assert (model(ids).logits - expected).abs().max() < 1e-5"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


# Bad input


def unequal_folder(tmp_path: Path) -> Path:
    export_model(smaller("gpt2", "heads"), tmp_path / "out")
    return tmp_path / "out"


def rewrite(folder: Path, change: dict[str, object]) -> None:
    """Change the structure file, and its hash in the manifest that would notice."""
    values = json.loads((folder / STRUCTURE_FILE).read_text()) | change
    (folder / STRUCTURE_FILE).write_text(json.dumps(values))
    refresh_manifest(folder)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"version": 9}, "version 9, expected 1"),
        ({"blocks": {}}, "expected positive sizes"),
        ({"blocks": {"transformer.h.0": {"heads": 1}}}, "is damaged"),
        ({"blocks": {"x": dict(heads=1, kv_heads=1, head_size=1, neurons=1)}}, "differ in blocks"),
    ],
)
def test_a_structure_file_that_makes_no_sense_is_refused(tmp_path, change, text):
    folder = unequal_folder(tmp_path)
    rewrite(folder, change)
    with pytest.raises(FormatError, match=text):
        dsee_scale.load_pretrained(folder)


def test_a_changed_structure_file_is_noticed(tmp_path):
    folder = unequal_folder(tmp_path)
    text = (folder / STRUCTURE_FILE).read_text()
    (folder / STRUCTURE_FILE).write_text(text.replace('"heads": 2', '"heads": 1'))
    with pytest.raises(FormatError, match="damaged"):
        dsee_scale.load_pretrained(folder)


def test_semi_structured_kernels_need_a_fitting_gpu(tmp_path):
    model = adapted("llama")
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))
    export_model(model, tmp_path / "out")
    with pytest.raises(TargetError, match="need an NVIDIA GPU"):
        dsee_scale.load_pretrained(tmp_path / "out", semi_structured=True)


def test_exported_2_4_weights_have_the_pattern_that_the_kernels_take(tmp_path):
    """Stands in for `to_sparse_semi_structured`, which wants a GPU: its own conversion loses nothing."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    sizes = dict(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128
    )
    model = build(llama_config(**sizes), torch.bfloat16)
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=9))
    for name, param in model.named_parameters():
        if name.endswith("dsee_flat"):
            param.data.normal_(std=0.05)
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="WABS"))
    export_model(model, tmp_path / "out")
    loaded = dsee_scale.load_pretrained(tmp_path / "out")
    checked = 0
    for name, module in loaded.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            weight = module.weight.detach()
            values, meta = sparse_semi_structured_from_dense_cutlass(weight)
            assert values.shape == (weight.shape[0], weight.shape[1] // 2)
            assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), weight), name
            checked += 1
    assert checked == 14
    broken = weight.clone()
    broken[0, :4] = 1
    values, meta = sparse_semi_structured_from_dense_cutlass(broken)
    assert not torch.equal(sparse_semi_structured_to_dense_cutlass(values, meta), broken)


IGLM = Path(
    os.environ.get("DSEE_SCALE_IGLM", Path.home() / ".cache" / "dsee_dl" / "iglm-0.1.0-py3-none-any.whl")
)


@pytest.mark.skipif(not IGLM.is_file(), reason="the iglm wheel (academic licence) is not here")
def test_iglm_with_heads_removed_loads_through_load_pretrained(tmp_path):
    """A trained GPT-2: 4 layers, 8 heads, antibody sequences."""
    from transformers import GPT2LMHeadModel

    with zipfile.ZipFile(IGLM) as wheel:
        names = [name for name in wheel.namelist() if "/trained_models/IgLM/" in name or "/IgLM/" in name]
        wheel.extractall(tmp_path, names)
    source = next(path.parent for path in tmp_path.rglob("config.json") if path.parent.name == "IgLM")
    model = GPT2LMHeadModel.from_pretrained(source).eval()
    before = num_parameters(model)
    dsee_scale.prune(model, PruneConfig(pattern="heads", num_per_layer=model.config.n_head // 4, score="W"))
    dsee_scale.prune(model, PruneConfig(pattern="neurons", sparsity=0.25, scope="matrix", score="W"))
    report = export_model(model, tmp_path / "small")
    loaded = dsee_scale.load_pretrained(tmp_path / "small")
    ids = torch.randint(3, 30, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert num_parameters(loaded) == report.num_parameters < 0.8 * before
    assert (
        open_partition(loaded).shape(loaded.transformer.h[0].attn.c_attn.weight)[1] < 3 * model.config.n_embd
    )


def test_a_weight_that_is_zero_by_chance_still_gets_its_update(tmp_path):
    """Where only units were removed there is no mask on entries: zeros of the base are no holes."""
    model = adapted("llama")
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.3] = 0
    dsee_scale.prune(model, PruneConfig(pattern="heads", num_per_layer=2, score="W"))
    export_model(model, tmp_path / "live")
    torch.testing.assert_close(output(dsee_scale.load_pretrained(tmp_path / "live")), output(model))
