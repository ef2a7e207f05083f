"""Injection into whole models: what is adapted, what is trained, what is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import math

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import dsee_scale
from dsee_scale import ConfigError, DSEEConfig, PruneConfig, TargetError
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.targets import BYPASSED
from dsee_scale.algorithms.decompose import find_support
from dsee_scale.passes.decompose_model import seeded
from tests.models import build, gpt2_config, llama_config, token_batch

SMALL = DSEEConfig(rank=3, num_sparse=7)
FUSED = DSEEConfig(rank=3, num_sparse=7, target_modules=("c_attn",), output_slices={"c_attn": ("q", "v")})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("config", "dsee"), [(llama_config, SMALL), (gpt2_config, FUSED)])
def test_injection_changes_no_output_and_no_name(config, dsee, dtype):
    model = build(config(), dtype).eval()
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    before = model(token_batch()).logits
    dsee_scale.inject(model, dsee)
    assert torch.equal(model(token_batch()).logits, before)
    assert [n for n in model.state_dict() if "dsee_" not in n] == names
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))


def test_only_adapters_are_trained_and_the_report_counts_them():
    model = build(llama_config())
    report = dsee_scale.inject(model, SMALL)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "dsee_" in n}
    count = sum(p.numel() for p in dsee_scale.trainable_parameters(model))
    assert report.trainable == count == 2 * (3 * (40 + 40) + 7 + 3 * (40 + 8) + 7)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert f"{count:,}" in str(report)
    assert "q_proj" in str(report)


def test_modules_trained_in_full_are_trained():
    model = BertForSequenceClassification(
        BertConfig(
            hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
        )
    )
    config = DSEEConfig(rank=2, num_sparse=3, target_modules=("query",), trained_modules=("classifier",))
    dsee_scale.inject(model, config)
    assert model.classifier.weight.requires_grad
    assert not model.bert.pooler.dense.weight.requires_grad


@pytest.mark.parametrize("num_sparse", [None, 0])
def test_no_sparse_entries_is_lora_alone(tmp_path, num_sparse):
    config = dataclasses.replace(SMALL, num_sparse=num_sparse)
    model = build(llama_config())
    report = dsee_scale.inject(model, config)
    count = sum(p.numel() for p in dsee_scale.trainable_parameters(model))
    assert report.trainable == count == 2 * (3 * (40 + 40) + 3 * (40 + 8))
    assert "no sparse entries" in str(report)
    optimizer = torch.optim.SGD(dsee_scale.trainable_parameters(model), lr=1.0)
    model(token_batch()).logits.square().mean().backward()
    optimizer.step()
    dsee_scale.save_adapter(model, tmp_path / "adapter")
    loaded = build(llama_config())
    record = dsee_scale.load_adapter(loaded, tmp_path / "adapter")
    assert record.num_trainable == count == sum(p.numel() for p in dsee_scale.trainable_parameters(loaded))
    assert torch.equal(loaded(token_batch()).logits, model(token_batch()).logits)
    for layer in adapted_layers(loaded).values():
        assert layer.dsee_B.any() and not layer.dsee_values.numel()
    dsee_scale.prune(loaded, PruneConfig(pattern="2:4", score="WABS", modules=("q_proj", "v_proj")))
    dsee_scale.prune(loaded, PruneConfig(pattern="neurons", sparsity=0.5, scope="matrix", score="W"))
    dsee_scale.export_model(loaded, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    torch.testing.assert_close(exported(token_batch()).logits, loaded(token_batch()).logits)


def test_the_support_of_a_slice_is_that_of_the_slice_alone():
    model = build(gpt2_config())
    weight_OI = model.transformer.h[0].attn.c_attn.weight.detach().clone().t()
    dsee_scale.inject(model, FUSED)
    layer = model.transformer.h[0].attn.c_attn
    for k, (start, stop) in enumerate(((0, 36), (72, 108))):
        expected = find_support(
            weight_OI[start:stop],
            7,
            "grebsmo",
            FUSED.decomposition,
            seeded(0, f"transformer.h.0.attn.c_attn:{k}"),
        )
        assert torch.equal(layer.dsee_rows[7 * k : 7 * k + 7], expected.rows + start)
        assert torch.equal(layer.dsee_cols[7 * k : 7 * k + 7], expected.cols)


def test_a_fraction_counts_entries_of_the_matrix():
    model = build(llama_config())
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=0.01, target_modules=("down_proj",)))
    layer = model.model.layers[0].mlp.down_proj
    assert layer.dsee_values.numel() == math.floor(40 * 53 * 0.01 + 0.5)


def test_every_way_to_name_targets():
    for wanted, count in [
        (("q_proj",), 2),
        (("layers.1.self_attn.q_proj",), 1),
        (("*.mlp.*",), 6),
        (r".*layers\.0\..*(q|v)_proj", 2),
    ]:
        model = build(llama_config())
        dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, target_modules=wanted))
        assert len(adapted_layers(model)) == count


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (dict(target_modules=("qproj",)), TargetError, "'qproj' matches no module.*q_proj"),
        (dict(target_modules=(".*qproj")), TargetError, "matches no linear layer"),
        (dict(target_modules="q_proj"), TargetError, r"a regular expression for whole names.*\['q_proj'\]"),
        (dict(target_modules=("mlp",)), TargetError, "LlamaMLP, expected nn.Linear or Conv1D.*gate_proj"),
        (dict(target_modules=("lm_head",)), TargetError, "shares its weight with model.embed_tokens.weight"),
        (
            dict(rank=9),
            ConfigError,
            r"rank 9 is over the smaller side of .*v_proj \(8 x 40\); expected at most 8",
        ),
        (dict(num_sparse=321), ConfigError, "num_sparse 321 is over the 320 entries"),
        (dict(output_slices={"q_proj": ("q",)}), ConfigError, "40 outputs as"),
        (dict(output_slices={"q_proj": ("0:41",)}), ConfigError, "within 0:40"),
        (dict(output_slices={"q_proj": ("0:10", "5:20")}), ConfigError, "overlap"),
        (dict(output_slices={"c_attn": ("q",)}), ConfigError, "'c_attn' matches none of the target modules"),
        (dict(trained_modules=("head",)), TargetError, "'head' matches no module"),
    ],
)
def test_bad_targets_are_refused_with_the_model_untouched(config, error, words):
    model = build(llama_config())
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=words):
        dsee_scale.inject(model, DSEEConfig(**{"rank": 3, "num_sparse": 7, **config}))
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {n: v[1] for n, v in before.items()}
    assert not adapted_layers(model)


def test_layers_with_hooks_of_accelerate_are_refused_before_anything_is_computed(monkeypatch):
    def decompose(*args, **kwargs):
        raise AssertionError("a weight was decomposed")

    monkeypatch.setattr("dsee_scale.passes.inject_model.decompose_model", decompose)
    model = build(llama_config())
    add_hook_to_module(model.model.layers[1].self_attn.q_proj, ModelHook())
    with pytest.raises(TargetError, match=r"layers\.1\.self_attn\.q_proj was replaced .*device_map"):
        dsee_scale.inject(model, SMALL)


FUSED_ELSEWHERE = {
    "gpt_neox": (dict(num_attention_heads=4, intermediate_size=64), "query_key_value"),
    "phi3": (
        dict(num_attention_heads=8, num_key_value_heads=2, intermediate_size=64, pad_token_id=0),
        "qkv_proj",
    ),
    "gpt2": (dict(add_cross_attention=True), "crossattention.c_attn"),
}


@pytest.mark.parametrize("family", list(FUSED_ELSEWHERE))
def test_q_k_and_v_that_are_no_thirds_are_not_cut_into_thirds(family):
    changes, name = FUSED_ELSEWHERE[family]
    sizes = dict(vocab_size=97, hidden_size=48, num_hidden_layers=1, max_position_embeddings=64)
    config = AutoConfig.for_model(family, **sizes, **changes)
    model = build(config)
    with pytest.raises(ConfigError, match=rf"'q' for .*{name}.*as \"start:stop\""):
        dsee_scale.inject(
            model, DSEEConfig(rank=2, num_sparse=5, target_modules=(name,), output_slices={name: ("q", "v")})
        )
    assert not adapted_layers(model)
    ranges = {name: ("0:16", "32:48")}
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=5, target_modules=(name,), output_slices=ranges))
    assert {layer.dsee_spec.slices for layer in adapted_layers(model).values()} == {((0, 16), (32, 48))}


def test_a_second_injection_is_refused():
    model = build(llama_config())
    dsee_scale.inject(model, SMALL)
    with pytest.raises(TargetError, match="already has adapters"):
        dsee_scale.inject(model, SMALL)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = build(llama_config())
    model.model.layers[1].self_attn.v_proj.weight.data[1, 2] = value
    with pytest.raises(
        TargetError, match=r"model\.layers\.1\.self_attn\.v_proj\.weight holds NaN or infinity"
    ):
        dsee_scale.inject(model, SMALL)
    assert not adapted_layers(model)


def test_no_adapters_no_trainable_parameters():
    with pytest.raises(TargetError, match="inject"):
        dsee_scale.trainable_parameters(build(llama_config()))


def test_a_conv1d_of_any_class_name_is_seen():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = Conv1D(12, 8)

    model = Model()
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, target_modules=("proj",)))
    assert model.proj.dsee_A.shape == (2, 8)
    assert model.proj.dsee_B.shape == (12, 2)


def test_reentrant_checkpointing_trains_adapters_when_switched_on_before_injection():
    model = build(llama_config())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    dsee_scale.inject(model, SMALL)
    model.train()
    ids = token_batch()
    model(ids, labels=ids).loss.backward()
    assert all(m.dsee_spec.split(m.dsee_flat.grad)[1].abs().sum() > 0 for m in adapted_layers(model).values())


def test_an_injected_model_can_be_copied():
    model = build(llama_config())
    dsee_scale.inject(model, SMALL)
    twin = copy.deepcopy(model)
    assert adapted_layers(twin).keys() == adapted_layers(model).keys()
    assert torch.equal(twin(token_batch()).logits, model(token_batch()).logits)


@pytest.mark.parametrize(
    ("model", "target"),
    [
        (nn.Sequential(nn.MultiheadAttention(8, 2)), "out_proj"),
        (nn.TransformerEncoderLayer(8, 2, 16), "linear1"),
    ],
)
def test_layers_that_are_never_called_are_refused_by_name(model, target):
    with pytest.raises(TargetError, match=f"{target} would have no effect: its "):
        dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, target_modules=(target,)))


def test_the_mixers_that_bypass_their_layers_exist_in_transformers():
    """A renamed class would no longer be refused."""
    found = set()
    for name in ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "falcon_h1", "zamba2", "nemotron_h"):
        module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
        found |= set(vars(module)) & BYPASSED.keys()
    assert found >= {name for name in BYPASSED if name.endswith("Mixer")}


def test_a_frozen_head_that_was_in_no_file_is_named(tmp_path, caplog):
    build(llama_config(pad_token_id=0)).save_pretrained(tmp_path / "base")
    make = functools.partial(AutoModelForSequenceClassification.from_pretrained, tmp_path / "base")
    frozen = make()
    dsee_scale.inject(frozen, DSEEConfig(rank=2, num_sparse=3))
    assert "score.weight and 0 more" in caplog.text and "trained_modules" in caplog.text
    dsee_scale.save_adapter(frozen, tmp_path / "adapter")
    caplog.clear()
    dsee_scale.load_adapter(make(), tmp_path / "adapter")
    assert "score.weight and 0 more" in caplog.text
    caplog.clear()
    frozen.score.requires_grad_(True)
    dsee_scale.save_adapter(frozen, tmp_path / "with_head")
    dsee_scale.load_adapter(make(), tmp_path / "with_head")
    dsee_scale.inject(make(), DSEEConfig(rank=2, num_sparse=3, trained_modules=("score",)))
    dsee_scale.inject(build(llama_config()), DSEEConfig(rank=2, num_sparse=3))
    assert "no adapter file" not in caplog.text


@pytest.mark.parametrize("pruning", [PruneConfig(score="W"), PruneConfig(pattern="2:4", score="W")])
def test_a_base_that_is_sparse_already_is_named_and_one_prune_keeps_its_zeros(tmp_path, caplog, pruning):
    config = DSEEConfig(rank=2, num_sparse=3, target_modules=("down_proj",))
    sparse = build(llama_config(intermediate_size=48))
    dsee_scale.inject(sparse, config)
    assert "zero already" not in caplog.text
    dsee_scale.prune(sparse, dataclasses.replace(pruning, modules=("down_proj",)))
    dsee_scale.export_model(sparse, tmp_path / "sparse")
    for kept in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
        zeros = model.model.layers[0].mlp.down_proj.weight == 0
        caplog.clear()
        dsee_scale.inject(model, config)
        assert "50.0% of the adapted weights are zero already" in caplog.text
        if kept:
            dsee_scale.prune(model, dataclasses.replace(pruning, modules=("down_proj",)))
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.dsee_flat)
        dsee_scale.export_model(model, tmp_path / f"again {kept}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"again {kept}")
        assert torch.equal(again.model.layers[0].mlp.down_proj.weight == 0, zeros) == kept


def test_frozen_rows_of_a_resized_vocabulary_are_named(tmp_path, caplog):
    build(llama_config(tie_word_embeddings=False)).save_pretrained(tmp_path / "base")

    def adapted(**settings):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(101)
        caplog.clear()
        dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, **settings))
        return model

    adapted(trained_modules=("embed_tokens", "lm_head"))
    assert "no adapter file" not in caplog.text
    adapted(trained_modules=("embed_tokens",))
    assert "lm_head.weight and 0 more" in caplog.text
    model = adapted()
    assert "model.embed_tokens.weight and 1 more" in caplog.text
    dsee_scale.export_model(model, tmp_path / "resized", delta="none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    caplog.clear()
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3))
    assert "no adapter file" not in caplog.text
