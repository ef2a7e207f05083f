"""A LoRA folder is what was trained, for stock PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.algorithms.cover import smallest_cover
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.cli import main
from dsee_scale.errors import ConfigError, FormatError, TargetError
from dsee_scale.export.lora import LoraReport, export_lora, export_lora_files
from tests.models import build, gpt2_config, llama_config, moe_config, token_batch
from tests.unit.test_export import SIZES, dense_update

CASES = {
    "linear": (
        llama_config(num_key_value_heads=5),
        DSEEConfig(rank=3, num_sparse=11, target_modules=("q_proj", "down_proj")),
    ),
    "grouped heads": (
        llama_config(num_attention_heads=4, num_key_value_heads=2, head_dim=10),
        DSEEConfig(rank=2, num_sparse=30, target_modules=r".*layers\.1\..*(k_proj|v_proj)"),
    ),
    "biased": (
        Qwen2Config(**SIZES, num_key_value_heads=1),
        DSEEConfig(rank=2, num_sparse=7, target_modules=("*.q_proj", "*.k_proj")),
    ),
    "conv1d": (gpt2_config(), DSEEConfig(rank=2, num_sparse=9, target_modules=("attn.c_attn", "mlp.c_proj"))),
    "conv1d slices": (
        gpt2_config(),
        DSEEConfig(rank=2, num_sparse=9, target_modules=("c_attn",), output_slices={"c_attn": ("q", "v")}),
    ),
    "no sparse entries": (llama_config(), DSEEConfig(rank=3, num_sparse=0)),
}


def tuned(name: str, base: Path | None = None) -> nn.Module:
    """A model of one case with an update as training would leave it; its base saved."""
    config, settings = CASES[name]
    model = build(copy.deepcopy(config)).eval()
    if base is not None:
        model.save_pretrained(base)
        model.config._name_or_path = str(base)
    dsee_scale.inject(model, settings)
    with_update(model)
    return model


def with_update(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for param in (layer.dsee_B, layer.dsee_values):
                param.copy_(torch.randn(param.shape, generator=generator) * 0.05)


def with_peft(base: Path, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)


def same_logits(model: nn.Module, loaded: nn.Module) -> None:
    with torch.no_grad():
        expected = model(token_batch()).logits
        found = loaded(token_batch()).logits
    assert not torch.equal(expected, torch.zeros_like(expected))
    torch.testing.assert_close(found, expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("uniform_rank", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_stock_peft_has_the_same_update_and_logits(tmp_path, name, uniform_rank):
    model = tuned(name, tmp_path / "base")
    report = export_lora(model, tmp_path / "lora", uniform_rank=uniform_rank)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == report.base == str(tmp_path / "base")
    loaded = with_peft(tmp_path / "base", tmp_path / "lora")
    layers = adapted_layers(model)
    assert report.ranks.keys() == layers.keys()
    scales = set()
    for module, layer in layers.items():
        tuner = loaded.base_model.model.get_submodule(module)
        torch.testing.assert_close(
            tuner.get_delta_weight("default"), dense_update(layer), atol=1e-6, rtol=1e-5
        )
        cover = smallest_cover(layer.dsee_rows, layer.dsee_cols).size
        needed = layer.dsee_A.shape[0] + cover
        assert tuner.r["default"] == report.ranks[module] == (report.rank if uniform_rank else needed)
        scales.add(tuner.scaling["default"])
    assert scales == {config["lora_alpha"] / config["r"]} == {layer.dsee_spec.scaling}
    assert not uniform_rank or not config["rank_pattern"]
    same_logits(model, loaded)


@pytest.mark.parametrize(
    "prune",
    [PruneConfig(score="W", mask_update=False), PruneConfig(pattern="heads", score="W", sparsity=0.4)],
)
def test_the_pruned_base_is_written_beside_it(tmp_path, prune):
    model = tuned("linear", tmp_path / "base")
    dsee_scale.prune(model, prune)
    layers = adapted_layers(model).values()
    with torch.no_grad():
        for layer in layers:  # as training goes on: what was removed gets no gradient
            layer.dsee_B.mul_(1.5)
    save_adapter(model, tmp_path / "adapter")
    live = export_lora(model, tmp_path / "lora")
    command = ["export", str(tmp_path / "adapter"), "--format", "lora", "--output", str(tmp_path / "files")]
    assert main(command) == 0
    for folder in (tmp_path / "lora", tmp_path / "files"):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(folder / "base")
        same_logits(model, with_peft(folder / "base", folder))
        # transformers follows an adapter to its base by itself.
        same_logits(model, AutoModelForCausalLM.from_pretrained(folder))
    live_file, own_file = (tmp_path / f / "adapter_model.safetensors" for f in ("lora", "files"))
    assert live_file.read_bytes() == own_file.read_bytes()
    assert export_lora(model, tmp_path / "lora", overwrite=True).ranks == live.ranks


def test_from_files_without_pruning_no_base_is_read(tmp_path, capsys):
    save_adapter(tuned("conv1d slices", tmp_path / "base"), tmp_path / "adapter")
    command = ["export", str(tmp_path / "adapter"), "--format", "lora", "--uniform-rank"]
    assert main([*command, "--output", str(tmp_path / "lora"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["served_rank"] >= report["rank"] and set(report["ranks"].values()) == {report["rank"]}
    assert not (tmp_path / "lora" / "base").exists()
    model = tuned("conv1d slices")
    same_logits(
        model,
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "lora"),
    )


def test_what_is_no_lora_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(TargetError, match="no adapter"):
        export_lora(build(llama_config()), tmp_path / "out")
    model = build(llama_config(tie_word_embeddings=False))
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, trained_modules=("lm_head",)))
    with pytest.raises(ConfigError, match=r"lm_head\.weight .* in full"):
        export_lora(model, tmp_path / "out")
    model = tuned("linear")
    dsee_scale.prune(model, PruneConfig(score="W"))
    with pytest.raises(ConfigError, match=r"q_proj .* under the mask|\(W \+ D\) \* M.*mask_update=False"):
        export_lora(model, tmp_path / "out")
    save_adapter(model, tmp_path / "adapter")
    assert (
        main(["export", str(tmp_path / "adapter"), "--format", "lora", "--output", str(tmp_path / "out")])
        == 1
    )
    assert not (tmp_path / "out").exists()


def test_units_that_would_come_back_are_refused(tmp_path):
    model = tuned("linear")
    dsee_scale.prune(model, PruneConfig(pattern="heads", score="W", sparsity=0.4))
    export_lora(model, tmp_path / "fine")
    with_update(model)
    with pytest.raises(ConfigError, match="bring them back"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_removed_experts_that_the_base_would_still_choose_are_refused(tmp_path):
    model = build(moe_config("qwen3_moe"))
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3))
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=1, score="random"))
    save_adapter(model, tmp_path / "adapter")
    for export in (
        lambda: export_lora(model, tmp_path / "out"),
        lambda: export_lora_files(tmp_path / "adapter", tmp_path / "out"),
    ):
        with pytest.raises(ConfigError, match=r"experts were removed.*export_model"):
            export()
    assert not (tmp_path / "out").exists()


def test_a_pruned_adapter_whose_base_is_not_here_asks_for_it(tmp_path):
    model = tuned("linear")
    dsee_scale.prune(model, PruneConfig(score="W", mask_update=False))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(FormatError, match="--base"):
        export_lora_files(tmp_path / "adapter", tmp_path / "out")


def test_the_report_says_what_a_server_needs():
    report = LoraReport("out", "base", {"a": 12, "b": 33}, 33, 64, 1000)
    assert "--max-lora-rank 64" in str(report) and "ranks 12 to 33" in str(report)
    assert "512 at most" in str(LoraReport("out", None, {"a": 600}, 600, None, 1000))
