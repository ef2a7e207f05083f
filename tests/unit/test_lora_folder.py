"""An adapter that stock PEFT tuned goes on here: the same outputs, then pruning and retuning."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.errors import ConfigError, FormatError
from dsee_scale.export.lora import export_lora
from tests.models import build, gpt2_config, llama_config, token_batch

CASES = {
    "one rank": (llama_config, dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj"])),
    "patterns": (
        llama_config,
        dict(
            r=4,
            lora_alpha=8,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={"down_proj": 20},
        ),
    ),
    "rslora": (llama_config, dict(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True)),
    "conv1d": (gpt2_config, dict(r=3, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)),
}


def tuned_by_peft(name: str, folder) -> torch.Tensor:
    """Write a base and an adapter as PEFT leaves them; the logits of both together."""
    make, settings = CASES[name]
    model = build(make()).eval()
    model.save_pretrained(folder / "base")
    peft = get_peft_model(model, LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, param in peft.named_parameters():
            if "lora_B" in key:
                param.copy_(torch.randn(param.shape, generator=generator) * 0.05)
        peft.save_pretrained(folder / "lora")
        return peft(token_batch()).logits


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_batch()).logits


@pytest.mark.parametrize("num_sparse", [0, 5])
@pytest.mark.parametrize("name", list(CASES))
def test_a_peft_adapter_goes_on_with_the_same_logits_and_back(tmp_path, name, num_sparse):
    expected = tuned_by_peft(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    record = dsee_scale.load_adapter(model, tmp_path / "lora", num_sparse=num_sparse, support="magnitude")
    assert record.modules.keys() == adapted_layers(model).keys()
    assert all(spec.num_sparse == num_sparse for spec in record.modules.values())
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=2e-6)
    for layer in adapted_layers(model).values():  # every rank can learn: B's or A's gradient is not zero
        assert layer.dsee_flat.requires_grad and layer.dsee_A.abs().sum(1).gt(0).all()
    dsee_scale.prune(model, PruneConfig(score="WABS", mask_update=False))
    pruned = logits(model)
    assert not torch.allclose(pruned, expected)
    export_lora(model, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back" / "base")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(back, tmp_path / "back")), pruned, atol=3e-6, rtol=3e-6
    )


CHANGES = {
    "use_dora=True": {"use_dora": True},
    "bias='all'": {"bias": "all"},
    "peft_type='IA3'": {"peft_type": "IA3"},
    r"modules_to_save=\['lm_head'\]": {"modules_to_save": ["lm_head"]},
    r"target_parameters=\['experts.gate_up_proj'\]": {"target_parameters": ["experts.gate_up_proj"]},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
}


def test_what_is_no_plain_lora_is_refused_by_name(tmp_path):
    tuned_by_peft("one rank", tmp_path)
    path = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(path.read_text())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for words, change in CHANGES.items():
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(FormatError, match=words):
            dsee_scale.load_adapter(model, tmp_path / "lora")
    path.write_text(json.dumps(config))
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(key for key in tensors if "lora_A" in key)
    for change, words in (
        ({key: tensors[key][:, :-1].contiguous()}, "lora_A"),
        ({"base_model.model.lm_head.weight": torch.zeros(2)}, "lm_head.weight, which is not an A or B"),
        ({key.replace("_proj", "_projection"): tensors[key].clone()}, "half of"),
    ):
        save_file({**tensors, **change}, weights)
        with pytest.raises(FormatError, match=words):
            dsee_scale.load_adapter(model, tmp_path / "lora")
    weights.unlink()
    with pytest.raises(FormatError, match=r"no adapter_model\.safetensors"):
        dsee_scale.load_adapter(model, tmp_path / "lora")
    assert not adapted_layers(model)


def test_entries_are_chosen_for_peft_folders_alone(tmp_path):
    model = build(llama_config())
    dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=2, num_sparse=3))
    dsee_scale.save_adapter(model, tmp_path / "ours")
    with pytest.raises(ConfigError, match="num_sparse 7 goes with a PEFT folder"):
        dsee_scale.load_adapter(build(llama_config()), tmp_path / "ours", num_sparse=7)
