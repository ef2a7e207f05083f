"""What `dsee-scale plan` says: published sizes, sums that must hold, advice that it can stand by."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.adapters.kernels import lowrank_sparse
from dsee_scale.adapters.kernels.factors import MOST_ENTRIES
from dsee_scale.cli import main
from dsee_scale.errors import ConfigError
from dsee_scale.planning.plan import GIB, Setting, adapter_entries, kept_factors, make_plan
from dsee_scale.planning.shapes import BUILT_IN, find_shape, shape_of_config
from tests.models import build, gpt2_config, llama_config, moe_config, token_batch

TOKENS = 7


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-2-7b", 6.74), ("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("llama-3.1-405b", 405.85)],
)
def test_built_in_shapes_have_the_published_number_of_parameters(name, billions):
    assert find_shape(name).parameters / 1e9 == pytest.approx(billions, abs=0.01)


@pytest.mark.parametrize("config", [llama_config(), llama_config(tie_word_embeddings=False), gpt2_config()])
def test_sizes_are_those_of_the_model_itself(config, tmp_path):
    model = build(config)
    model.save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    linears = [p for n, p in model.named_parameters() if p.dim() == 2 and (".layers." in n or ".h." in n)]
    assert shape.block_entries == sum(p.numel() for p in linears)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    if "q_proj" in shape.matrices:
        dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=3, num_sparse=7))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert adapter_entries(shape, Setting(gpus=1, rank=3, num_sparse=7)) == trained


def test_more_gpus_fewer_bits_and_offload_need_less_of_each_gpu():
    shape = find_shape("llama-3-70b")
    plans = {gpus: make_plan(shape, Setting(gpus=gpus)) for gpus in (2, 8, 64)}
    train = [plans[gpus].phases["train"].gpu for gpus in (2, 8, 64)]
    assert train == sorted(train, reverse=True) and train[0] > shape.parameters  # two bytes on two GPUs
    offloaded = make_plan(shape, Setting(gpus=8, offload=True)).phases["train"]
    assert offloaded.gpu < plans[8].phases["train"].gpu
    assert offloaded.host == pytest.approx(shape.parameters * 2 / 8, rel=0.02)
    for quantize in ("int8", "nf4"):
        plan = make_plan(shape, Setting(gpus=8, quantize=quantize))
        assert plan.phases["train"].gpu < plans[8].phases["train"].gpu
        assert plan.phases["load"].gpu > plans[8].phases["load"].gpu  # whole on every GPU
        assert plan.traffic < plans[8].traffic
    masked = {name: memory.gpu for name, memory in plans[8].phases.items()}
    factors = 2 * (16 + 64) * (8192 + 8192 + 1024 + 8192)  # of q and v in one block
    assert masked["retune"] - masked["train"] == 2 * 8192 * 8192 - factors  # q's merged weight


@pytest.mark.parametrize("num_sparse", [0, 16, MOST_ENTRIES + 1])
def test_the_factors_counted_are_those_that_forward_keeps(num_sparse, monkeypatch):
    monkeypatch.setattr(lowrank_sparse, "folds", lambda dtype, device: True)
    config = llama_config(vocab_size=500)
    model = build(config, torch.bfloat16).train()
    dsee_scale.inject(model, dsee_scale.DSEEConfig(rank=3, num_sparse=num_sparse))
    columns, kept = 3 + num_sparse, []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.dim() == 2 and columns in saved.shape and len(saved) != TOKENS:  # x left^T is no factor
            kept.append(saved.numel() * saved.element_size())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        model(token_batch(batch=1, length=TOKENS))
    setting = Setting(gpus=1, rank=3, num_sparse=num_sparse, checkpointing=False)
    shape = shape_of_config(config)
    assert kept_factors(shape, setting) == sum(kept) and bool(kept) == (num_sparse == 16)
    one_block = dataclasses.replace(setting, checkpointing=True)
    assert kept_factors(shape, one_block) == sum(kept) / shape.layers


def test_the_command_prints_every_phase_and_advice(capsys):
    assert main(["plan", "--model", "llama-3-70b", "--gpus", "8", "--gpu-memory", "16"]) == 0
    text = capsys.readouterr().out
    for word in ("load", "decompose", "train", "prune", "export", "traffic", "checkpoint", "decomposition"):
        assert word in text
    assert "It does not fit" in text and "It would fit with: --offload" in text and "GPUs" in text
    assert main(["plan", "--model", "llama-3-70b", "--gpus", "8", "--gpu-memory", "80", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] and values["phases"]["train"]["gpu"] < 80 * GIB
    assert (
        main(["plan", "--model", "llama-2-7b", "--gpus", "8", "--gpu-memory", "80", "--quantize", "nf4"]) == 0
    )
    assert "So does bf16 without offload: choose that" in capsys.readouterr().out


def test_a_plan_says_what_it_leaves_out_of_the_default_pruning(capsys):
    words = ["plan", "--model", "llama-3-8b", "--gpus", "8", "--gpu-memory", "80"]
    assert main(words) == 0
    found = capsys.readouterr().out
    assert PruneConfig(sparsity=0.5).refit and "prune is without a re-fit, which is the default" in found
    assert f"up to {PruneConfig(sparsity=0.5).gram_memory_mib / 1024:.1f} GiB" in found
    assert main([*words, "--json"]) == 0
    assert any("re-fit" in note for note in json.loads(capsys.readouterr().out)["advice"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no/such-model"], "has no config that could be read"),
        (["--model", "EMPTY"], "holds no config.json"),
        (["--model", "llama-2-7b", "--targets", "c_attn"], "'c_attn' is not a layer of llama-2-7b"),
        (["--model", "llama-2-7b", "--length", "0"], "--length must lie in"),
    ],
)
def test_what_cannot_be_planned_is_explained(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [str(tmp_path) if word == "EMPTY" else word for word in words]
    assert main(["plan", "--gpus", "8", "--gpu-memory", "80", *words]) == 1
    found = capsys.readouterr().err
    assert message in found
    if "config" in message:
        assert all(name in found for name in BUILT_IN)


@pytest.mark.parametrize("model_type", ["phi3", "glm4", "llama", "gpt_neox"])
def test_gate_and_up_in_one_matrix_are_not_counted_twice(model_type):
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, vocab_size=50, pad_token_id=0)
    assert shape_of_config(config).width == config.intermediate_size


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "rwkv"])
def test_a_decoder_without_attention_is_refused(model_type):
    config = AutoConfig.for_model(model_type, num_hidden_layers=2, vocab_size=50)
    with pytest.raises(ConfigError, match=f"model_type '{model_type}'.* has no attention heads"):
        shape_of_config(config)


def test_experts_are_counted_and_what_is_no_decoder_is_refused():
    from transformers import MixtralConfig, T5Config

    mixtral = shape_of_config(MixtralConfig())  # 8x7B
    assert mixtral.parameters / 1e9 == pytest.approx(46.70, abs=0.01)
    assert mixtral.expert_entries == 32 * 8 * 3 * 4096 * 14336
    assert mixtral.width == 2 * 14336 and mixtral.gated
    plan = make_plan(mixtral, Setting(gpus=8))
    assert plan.trainable == adapter_entries(mixtral, Setting(gpus=8)) == 32 * (16 * (4096 * 3 + 1024) + 128)
    adapted = make_plan(mixtral, Setting(gpus=8, targets=("q_proj", "experts")))
    assert adapted.trainable == 32 * (16 * 2 * 4096 + 64 + 8 * (16 * (3 * 14336 + 2 * 4096) + 2 * 64))
    assert adapted.phases["train"].gpu > plan.phases["train"].gpu
    merged = (
        2 * 8 * 2 * 14336 * 4096
    )  # W + D of a layer's experts, in place of their thin factors and the gradient
    thin = 2 * 2 * 8 * (16 + 64) * (2 * 14336 + 4096)
    of_q = 2 * (16 + 64) * (4096 + 4096)
    assert adapted.phases["retune"].gpu - adapted.phases["train"].gpu == merged - thin - of_q
    assert adapted.decomposition > 60 * plan.decomposition
    with pytest.raises(ConfigError, match="makes no decoder of its config"):
        shape_of_config(T5Config())


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_adapters_of_experts_are_as_large_as_planned(model_type):
    shape = shape_of_config(moe_config(model_type))
    model = build(moe_config(model_type))
    dsee_scale.inject(
        model, dsee_scale.DSEEConfig(rank=3, num_sparse=7, target_modules=("o_proj", "experts"))
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    setting = Setting(gpus=2, rank=3, num_sparse=7, targets=("o_proj", "experts"))
    assert adapter_entries(shape, setting) == trained
    assert adapter_entries(shape, Setting(gpus=2, rank=3, num_sparse=7, targets=("down_proj",))) > 0


def test_without_targets_only_what_the_model_has_is_planned(tmp_path, capsys):
    """DeepSeek-V2-Lite has q_proj and no v_proj."""
    sizes = dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16)
    config = AutoConfig.for_model("deepseek_v2", **sizes, num_hidden_layers=2, hidden_size=64)
    config.save_pretrained(tmp_path)
    assert main(["plan", "--model", str(tmp_path), "--gpus", "8", "--gpu-memory", "80"]) == 0
    assert "2 blocks of 64 experts" in capsys.readouterr().out


def test_the_docs_table_of_70_billion_parameters_is_what_the_command_prints(capsys):
    text = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    rows = re.findall(r"^\| (2|8|64) \| (bf16|nf4|bf16, offloaded) \| (.*) \|$", text, re.M)
    assert len(rows) == 9
    flags = {"bf16": [], "nf4": ["--quantize", "nf4"], "bf16, offloaded": ["--offload"]}
    for gpus, base, numbers in rows:
        main(["plan", "--model", "llama-3-70b", "--gpus", gpus, "--gpu-memory", "80", "--json", *flags[base]])
        found = json.loads(capsys.readouterr().out)
        phases = found["phases"]
        sizes = [phases[name]["gpu"] for name in ("load", "decompose", "train", "prune", "export")]
        sizes.append(max(phase["host"] for phase in phases.values()))
        expected = [f"{size / GIB:.1f}" for size in sizes] + [f"{found['traffic'] / GIB:.0f}"]
        assert numbers.split(" | ") == expected, (gpus, base)
