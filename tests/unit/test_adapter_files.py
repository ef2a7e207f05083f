"""An adapter survives its files bit for bit, and what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.state import model_state
from dsee_scale.checkpoint.adapter import load_adapter, save_adapter
from dsee_scale.checkpoint.files import MANIFEST, sha256
from dsee_scale.checkpoint.identity import check_base, config_hash
from dsee_scale.checkpoint.record import CONFIG_FILE
from dsee_scale.errors import ConfigError, FormatError, TargetError
from tests.models import build, gpt2_config, llama_config, token_batch

LLAMA = DSEEConfig(
    rank=3, num_sparse=11, support="magnitude", target_modules=("q_proj", "down_proj"), dropout=0.1
)
GPT2 = DSEEConfig(
    rank=3,
    num_sparse=11,
    support="random",
    target_modules=("c_attn", "c_proj"),
    output_slices={"c_attn": ("q", "v")},
)


def tuned(model_config, config, dtype=torch.float32, sparsity=0.5) -> nn.Module:
    model = build(model_config, dtype).eval()
    dsee_scale.inject(model, config)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.dsee_B.normal_(std=0.05)
            layer.dsee_values.normal_(std=0.05)
    if sparsity:
        dsee_scale.prune(model, PruneConfig(sparsity=sparsity, score="WABS"))
    return model


def refresh_manifest(folder: Path) -> None:
    """Make hashes fit after a deliberate change, so that the deeper checks have to catch it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name, record in manifest["files"].items():
        record.update(size=(folder / name).stat().st_size, sha256=sha256(folder / name))
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("base", "config"), [(llama_config(), LLAMA), (gpt2_config(), GPT2)])
def test_a_loaded_adapter_gives_the_same_model_bit_for_bit(tmp_path, base, config, dtype):
    model = tuned(base, config, dtype)
    save_adapter(model, tmp_path / "a")
    other = build(base, dtype).eval()
    load_adapter(other, tmp_path / "a")
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(other(token_batch()).logits, model(token_batch()).logits)
    assert model_state(other).config == config
    assert model_state(other).pruned == model_state(model).pruned
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in other.named_parameters() if p.requires_grad} == trainable
    for name, layer in adapted_layers(model).items():
        assert adapted_layers(other)[name].dsee_spec == layer.dsee_spec
        assert adapted_layers(other)[name].dsee_under_mask == layer.dsee_under_mask


def test_the_files_hold_the_adapter_and_one_bit_per_pruned_weight(tmp_path):
    model = tuned(llama_config(), LLAMA, torch.bfloat16)
    save_adapter(model, tmp_path / "a")
    pruned = sum(dict(model.named_parameters())[n].numel() for n in model_state(model).pruned)
    entries = sum(t.nbytes for n, t in model.state_dict().items() if ".dsee_" in n)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors")}
    assert sizes.keys() == {"dsee_adapter.safetensors", "dsee_masks.safetensors"}
    tensors = {p: load_file(tmp_path / "a" / p) for p in sizes}
    assert all(t.numel() for ts in tensors.values() for t in ts.values())
    assert sum(t.nbytes for t in tensors["dsee_adapter.safetensors"].values()) == entries
    bits = sum(t.nbytes for t in tensors["dsee_masks.safetensors"].values())
    assert pruned / 8 <= bits <= pruned / 8 + len(tensors["dsee_masks.safetensors"])
    assert not any(name in tensors["dsee_adapter.safetensors"] for name in model_state(model).pruned)


def test_nothing_looks_like_a_peft_adapter(tmp_path):
    save_adapter(tuned(llama_config(), LLAMA), tmp_path / "a")
    assert not any(p.name.startswith("adapter_") for p in (tmp_path / "a").iterdir())


def test_modules_trained_in_full_are_saved_and_trained_again(tmp_path):
    sizes = dict(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=3
    )
    base = BertConfig(**sizes, num_labels=3)
    config = DSEEConfig(
        rank=2, num_sparse=5, support="magnitude", target_modules=("query",), trained_modules=("classifier",)
    )
    model = AutoModelForSequenceClassification.from_config(base)
    dsee_scale.inject(model, config)
    save_adapter(model, tmp_path / "a")
    other = AutoModelForSequenceClassification.from_config(base)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other.classifier.weight, model.classifier.weight)
    assert other.classifier.weight.requires_grad and not other.bert.pooler.dense.weight.requires_grad


def test_a_pruned_model_without_adapter_saves_its_masks_alone(tmp_path):
    model = build(llama_config())
    dsee_scale.prune(model, PruneConfig(sparsity=0.4, score="W"))
    save_adapter(model, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").glob("*.safetensors")] == ["dsee_masks.safetensors"]
    other = build(llama_config())
    load_adapter(other, tmp_path / "a")
    assert all(torch.equal(v, other.state_dict()[n]) for n, v in model.state_dict().items())


def test_a_half_precision_adapter_follows_the_models_dtype(tmp_path):
    save_adapter(tuned(llama_config(), LLAMA, torch.bfloat16), tmp_path / "a")
    other = build(llama_config(), torch.float32)
    load_adapter(other, tmp_path / "a")
    assert {p.dtype for p in other.parameters()} == {torch.float32}


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(TargetError, match="nothing to save"):
        save_adapter(build(llama_config()), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_adapted_model_is_refused_and_an_occupied_folder_too(tmp_path):
    model = tuned(llama_config(), LLAMA)
    save_adapter(model, tmp_path / "a")
    with pytest.raises(TargetError, match="already has adapters"):
        load_adapter(model, tmp_path / "a")
    with pytest.raises(ConfigError, match="not empty"):
        save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "a", overwrite=True)


def change_json(folder, change):
    values = json.loads((folder / CONFIG_FILE).read_text())
    change(values)
    (folder / CONFIG_FILE).write_text(json.dumps(values))


def change_tensor(folder, name, change, file="dsee_adapter.safetensors"):
    tensors = load_file(folder / file)
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / file, metadata={"format": "pt", "dsee_version": "1"})


Q = "model.layers.0.self_attn.q_proj"
DAMAGES = {
    "row out of range": (
        lambda f: change_tensor(f, f"{Q}.dsee_rows", lambda t: t + 1000),
        rf"dsee_adapter\.safetensors: tensor {Q}\.dsee_rows has indices out of range",
    ),
    "negative column": (
        lambda f: change_tensor(f, f"{Q}.dsee_cols", lambda t: t - 1000),
        rf"tensor {Q}\.dsee_cols has indices out of range",
    ),
    "unsorted support": (
        lambda f: [change_tensor(f, f"{Q}.dsee_{k}", lambda t: t.flip(0)) for k in ("rows", "cols")],
        rf"support of {Q} is not sorted",
    ),
    "other shape": (
        lambda f: change_tensor(f, f"{Q}.dsee_A", lambda t: t[:, :-1].contiguous()),
        rf"tensor {Q}\.dsee_A is \(3, 39\)",
    ),
    "other index dtype": (
        lambda f: change_tensor(f, f"{Q}.dsee_rows", lambda t: t.long()),
        rf"tensor {Q}\.dsee_rows is \(11,\) of torch\.int64",
    ),
    "short mask": (
        lambda f: change_tensor(f, f"{Q}.weight", lambda t: t[:-1], "dsee_masks.safetensors"),
        rf"tensor {Q}\.weight is \(199,\)",
    ),
    "unknown tensor version": (
        lambda f: save_file(load_file(f / "dsee_adapter.safetensors"), f / "dsee_adapter.safetensors"),
        r"dsee_adapter\.safetensors has format version None",
    ),
    "missing module in the model": (
        lambda f: change_json(f, lambda v: v["modules"].update({"model.other": v["modules"][Q]})),
        r"tensor model\.other\.dsee_A is missing",
    ),
    "unknown setting": (
        lambda f: change_json(f, lambda v: v["config"].update(ranck=3)),
        "dsee_config.json is damaged: .*did you mean 'rank'",
    ),
    "missing key": (lambda f: change_json(f, lambda v: v.pop("pruned")), "key 'pruned' is missing"),
    "no JSON": (lambda f: (f / CONFIG_FILE).write_text("{"), r"dsee_config\.json is damaged"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_adapter_is_refused_before_the_model_changes(tmp_path, damage):
    save_adapter(tuned(llama_config(), LLAMA), tmp_path / "a")
    change, message = DAMAGES[damage]
    change(tmp_path / "a")
    refresh_manifest(tmp_path / "a")
    model = build(llama_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        load_adapter(model, tmp_path / "a")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (llama_config(num_hidden_layers=3), "num_hidden_layers 2 there, 3 here"),
        (llama_config(intermediate_size=54), "intermediate_size 53 there, 54 here"),
        (gpt2_config(), "another base model .*model_type 'llama' there, 'gpt2' here"),
    ],
)
def test_another_base_is_refused_with_what_differs(tmp_path, base, message):
    save_adapter(tuned(llama_config(), LLAMA), tmp_path / "a")
    with pytest.raises(FormatError, match=message):
        load_adapter(build(base), tmp_path / "a")


def test_another_shape_is_refused_where_the_config_says_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, support="magnitude", target_modules=("0",)))
    save_adapter(model, tmp_path / "a")
    with pytest.raises(FormatError, match=r"0\.weight is \(8, 9\) in this model"):
        load_adapter(nn.Sequential(nn.Linear(9, 8)), tmp_path / "a")
    with pytest.raises(FormatError, match="adapted module 0 is ReLU"):
        load_adapter(nn.Sequential(nn.ReLU()), tmp_path / "a")


def test_what_changes_from_load_to_load_does_not_make_another_base(tmp_path):
    save_adapter(tuned(llama_config(), LLAMA), tmp_path / "a")
    other = build(llama_config(pad_token_id=3, use_cache=True, attention_dropout=0.1))
    other.config._name_or_path = "somewhere/else"
    load_adapter(other, tmp_path / "a")


def test_a_key_that_only_one_transformers_version_knows_is_passed_over():
    old, new = {"hidden_size": 4}, {"hidden_size": 4, "fresh": None}
    identities = [{"config": c, "config_sha256": config_hash(c)} for c in (old, new)]
    check_base(identities[0], identities[1], "x")
    with pytest.raises(FormatError, match="hidden_size 4 there, 5 here"):
        check_base(identities[0], {"config": {"hidden_size": 5}, "config_sha256": ""}, "x")


def test_the_saved_settings_are_the_configs(tmp_path):
    config = dataclasses.replace(LLAMA, seed=7, alpha=12.0)
    model = tuned(llama_config(), config)
    save_adapter(model, tmp_path / "a")
    values = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert DSEEConfig.from_dict(values["config"]) == config
    kept = {n: how["kept"] for n, how in values["pruned"].items()}
    params = dict(model.named_parameters())
    assert kept == {name: int((params[name] != 0).sum()) for name in model_state(model).pruned}
