"""An exported folder is what stock transformers would have saved, with the update put in."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    dynamic_module_utils,
)

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.checkpoint.adapter import load_adapter, save_adapter
from dsee_scale.errors import ConfigError, FormatError, TargetError
from dsee_scale.export.export import export_model
from dsee_scale.export.from_files import export_files
from dsee_scale.export.report import INDEX_FILE
from tests.models import build, gpt2_config, llama_config, token_batch

SIZES = dict(vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3)
ARCHITECTURES = {
    "llama": llama_config(),
    "llama untied": llama_config(tie_word_embeddings=False),
    "gpt2": gpt2_config(),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=1),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1),
}
ATTENTION = {"mixtral": ("q_proj", "k_proj", "v_proj", "o_proj")}
"""What is pruned where the blocks hold more than linear layers."""
TARGETS = {"gpt2": {"target_modules": ("c_attn",), "output_slices": {"c_attn": ("q", "v")}}}


def tuned(
    config: PretrainedConfig, name: str = "llama", *, dtype=torch.float32, sparsity=0.5, mask_update=True
) -> nn.Module:
    """Injected, with an update as training would leave it, and pruned."""
    model = build(config, dtype).eval()
    targets = TARGETS.get(name, {"target_modules": ("q_proj", "v_proj")})
    dsee_scale.inject(model, DSEEConfig(rank=3, num_sparse=11, support="magnitude", **targets))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for param in (layer.dsee_B, layer.dsee_values):
                param.copy_(torch.randn(param.shape, generator=generator) * 0.05)
    if sparsity:
        modules = ATTENTION.get(name, ())
        prune = PruneConfig(sparsity=sparsity, score="W", mask_update=mask_update, modules=modules)
        dsee_scale.prune(model, prune)
    return model


def dense_update(layer) -> torch.Tensor:
    """s * (BA + S2) by its definition, in the storage layout."""
    outputs, inputs = layer.dsee_spec.shape
    update = torch.zeros(outputs, inputs)
    rank, at = layer.dsee_B.shape[1], 0
    for k, (start, stop) in enumerate(layer.dsee_spec.slices):
        b = layer.dsee_B[at : at + stop - start].float()
        update[start:stop] += b @ layer.dsee_A[k * rank : (k + 1) * rank].float()
        at += stop - start
    update[layer.dsee_rows.long(), layer.dsee_cols.long()] += layer.dsee_values.float()
    update = layer.dsee_spec.scaling * update
    return (update.t() if layer.dsee_spec.transposed else update).detach()


def read_weights(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def with_update(model: nn.Module, form: str) -> nn.Module:
    """A plain copy of the model whose weights hold the update."""
    plain = type(model)(model.config).to(next(model.parameters()).dtype).eval()
    state = {n: t for n, t in model.state_dict().items() if ".dsee_" not in n}
    for name, layer in adapted_layers(model).items():
        w = state[f"{name}.weight"].float()
        d = dense_update(layer)
        merged = (w + d) * (w != 0) if form == "masked" else w + d
        state[f"{name}.weight"] = merged.to(state[f"{name}.weight"].dtype)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_keys_shapes_and_dtypes_are_those_of_save_pretrained(tmp_path, name):
    model = tuned(ARCHITECTURES[name], name, dtype=torch.bfloat16)
    export_model(model, tmp_path / "ours", delta="masked")
    with_update(model, "masked").save_pretrained(tmp_path / "stock")
    ours, stock = read_weights(tmp_path / "ours"), read_weights(tmp_path / "stock")
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {
        k: (t.shape, t.dtype) for k, t in stock.items()
    }
    for key, tensor in stock.items():
        assert torch.equal(ours[key], tensor), key
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "stock")]
    assert len(configs[0].pop("dsee_refit")) == 16  # so that the update is not put in twice
    assert configs[0] == configs[1]
    assert (tmp_path / "ours" / "generation_config.json").exists()


@pytest.mark.parametrize(("form", "mask_update"), [("masked", True), ("masked", False), ("dense", False)])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_stock_transformers_loads_it_and_gives_the_same_logits(tmp_path, name, form, mask_update):
    model = tuned(ARCHITECTURES[name], name, mask_update=mask_update)
    report = export_model(model, tmp_path / "out", delta=form)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = token_batch()
    with torch.no_grad():
        expected = (model if mask_update or form == "dense" else with_update(model, form))(ids).logits
        torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
    state = loaded.state_dict()
    for weight, sparsity in report.sparsity.items():
        assert sparsity == pytest.approx(float((state[weight] == 0).float().mean()))
        mask = dict(model.named_parameters())[weight] != 0
        adapted = weight.removesuffix(".weight") in adapted_layers(model)
        if form == "masked" or not adapted:
            assert not state[weight][~mask].any()
    total = sum(t.numel() for t in read_weights(tmp_path / "out").values())
    assert report.num_parameters == total
    assert sum(report.files.values()) == sum(
        p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")
    )


def test_the_dense_form_of_what_was_trained_under_its_mask_is_refused(tmp_path):
    model = tuned(llama_config())
    save_adapter(model, tmp_path / "adapter")
    base = build(llama_config())
    base.save_pretrained(tmp_path / "base")
    words = r"model.layers.0.self_attn.q_proj.weight and 3 more were trained as \(W \+ D\) \* M"
    with pytest.raises(ConfigError, match=words):
        export_model(model, tmp_path / "out", delta="dense")
    with pytest.raises(ConfigError, match=words):
        export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out", delta="dense")
    assert not (tmp_path / "out").exists()


def test_the_input_model_is_not_changed(tmp_path):
    model = tuned(llama_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    architectures = model.config.architectures
    export_model(model, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.architectures == architectures


def test_separate_holds_the_sparse_base_and_a_loadable_adapter(tmp_path):
    model = tuned(llama_config())
    export_model(model, tmp_path / "out", delta="separate")
    weights = read_weights(tmp_path / "out")
    for name, param in model.named_parameters():
        if ".dsee_" not in name:
            assert torch.equal(weights[name], param), name
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    load_adapter(loaded, tmp_path / "out" / "adapter")
    with torch.no_grad():
        assert torch.equal(loaded(token_batch()).logits, model(token_batch()).logits)


def test_small_shards_have_an_index_that_finds_every_tensor(tmp_path):
    model = tuned(llama_config())
    report = export_model(model, tmp_path / "out", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert len(report.files) > 3
    assert set(index["weight_map"].values()) == set(report.files)
    for key, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as handle:
            assert key in handle.keys()  # noqa: SIM118
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    export_model(model, tmp_path / "one")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in loaded.state_dict().items())


@pytest.mark.parametrize("auto", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_bert_encoders_export_with_their_heads(tmp_path, auto):
    torch.manual_seed(0)
    config = BertConfig(**SIZES, max_position_embeddings=32, num_labels=3)
    model = auto.from_config(config).eval()
    trained = ("classifier",) if auto is AutoModelForSequenceClassification else ()
    config = DSEEConfig(
        rank=2, num_sparse=5, support="magnitude", target_modules=("query", "value"), trained_modules=trained
    )
    dsee_scale.inject(model, config)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.dsee_B.normal_(std=0.05)
    dsee_scale.prune(model, PruneConfig(sparsity=0.3, mask_update=False, score="W"))
    export_model(model, tmp_path / "ours", delta="dense")
    plain = with_update(model, "dense")
    plain.save_pretrained(tmp_path / "stock")
    assert read_weights(tmp_path / "ours").keys() == read_weights(tmp_path / "stock").keys()
    loaded = auto.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(token_batch()).logits, model(token_batch()).logits, atol=1e-5, rtol=1e-5
        )


def test_a_model_outside_of_transformers_gives_one_weight_file(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=4, support="magnitude", target_modules=("0",)))
    export_model(model, tmp_path / "out", delta="dense")
    state = read_weights(tmp_path / "out")
    assert state.keys() == {n for n in model.state_dict() if "dsee_" not in n}
    assert torch.equal(state["1.running_var"], model[1].running_var)


class Tokenizer:
    def save_pretrained(self, folder):
        (__import__("pathlib").Path(folder) / "tokenizer.json").write_text("{}")


def test_the_tokenizer_is_saved_along_and_listed(tmp_path):
    export_model(tuned(llama_config()), tmp_path / "out", tokenizer=Tokenizer())
    assert "tokenizer.json" in json.loads((tmp_path / "out" / "dsee_manifest.json").read_text())["files"]


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

OwnConfig.register_for_auto_class()
OwnForCausalLM.register_for_auto_class("AutoModelForCausalLM")
"""


def test_a_model_with_code_of_its_own_is_found_by_its_export(tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "modeling_own.py").write_text(OWN_CODE)
    own = importlib.import_module("modeling_own")
    values = {key: value for key, value in llama_config().to_dict().items() if key != "model_type"}
    model = own.OwnForCausalLM(own.OwnConfig(**values)).eval()
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3))
    export_model(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert torch.equal(loaded(token_batch()).logits, model(token_batch()).logits)


def test_a_generation_config_that_was_published_invalid_is_written_as_training_left_it(tmp_path):
    """A Trainer gives it the tokenizer's special tokens, and transformers' own saving then refuses what it read."""
    build(llama_config()).save_pretrained(tmp_path / "published")
    published = {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    (tmp_path / "published" / "generation_config.json").write_text(json.dumps(published))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published")
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, target_modules=("q_proj",)))
    model.generation_config.pad_token_id = 2
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.generation_config.save_pretrained(tmp_path / "refused")
    export_model(model, tmp_path / "export")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.to_dict()
    assert {key: found[key] for key in published} == published and found["pad_token_id"] == 2


def test_bad_input_is_refused_and_leaves_nothing(tmp_path):
    model = tuned(llama_config())
    with pytest.raises(ConfigError, match="delta 'sparse' is unknown"):
        export_model(model, tmp_path / "out", delta="sparse")
    with pytest.raises(ConfigError, match="max_shard_size"):
        export_model(model, tmp_path / "out", max_shard_size="2 apples")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        export_model(model, tmp_path / "full")
    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TargetError, match=r"0\.weight is quantised"):
        export_model(quantised, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_disk_that_fills_up_leaves_the_previous_export(tmp_path, monkeypatch):
    from dsee_scale.checkpoint import folder as files

    model = tuned(llama_config())
    export_model(model, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    written = []

    class FullDisk(files.HashedFile):
        def write(self, data):
            written.append(memoryview(data).nbytes)
            if sum(written) > 100_000:
                raise OSError(28, "No space left on device", str(self.path))
            super().write(data)

    monkeypatch.setattr(files, "HashedFile", FullDisk)
    with pytest.raises(FormatError, match=r"model.*No space left on device"):
        export_model(model, tmp_path / "out", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_load_pretrained_refuses_a_damaged_file(tmp_path):
    export_model(tuned(llama_config()), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"model\.safetensors is damaged"):
        dsee_scale.load_pretrained(tmp_path / "out")
    path.write_bytes(content[:-1])
    with pytest.raises(FormatError, match=r"model\.safetensors is \d+ bytes long"):
        dsee_scale.load_pretrained(tmp_path / "out")


def test_a_folder_that_is_not_there_is_called_so(tmp_path):
    with pytest.raises(FormatError, match="nothere is not a folder"):
        dsee_scale.load_pretrained(tmp_path / "nothere")


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(("delta", "said"), [("masked", True), ("dense", False), ("separate", False)])
def test_a_form_that_was_not_trained_is_said(tmp_path, caplog, delta, said, live):
    build(llama_config()).save_pretrained(tmp_path / "base")
    model = dsee_scale.load_pretrained(tmp_path / "base")
    dsee_scale.inject(
        model, DSEEConfig(rank=2, num_sparse=4, support="magnitude", target_modules=("q_proj",))
    )
    dsee_scale.prune(model, PruneConfig(sparsity=0.3, mask_update=False, score="W", refit=False))
    if live:
        export_model(model, tmp_path / "out", delta=delta)
    else:
        dsee_scale.save_adapter(model, tmp_path / "adapter")
        export_files(tmp_path / "adapter", None, tmp_path / "out", delta=delta)
    words = "layers.0.self_attn.q_proj.weight and 1 more were trained as W * M + D (mask_update=False)"
    assert (words in caplog.text) == said


@pytest.mark.parametrize("size", [None, 0, -1, "much"])
def test_a_file_size_that_is_none_is_named_and_nothing_is_written(tmp_path, size):
    with pytest.raises(ConfigError, match=f"max_shard_size {size!r}"):
        export_model(build(llama_config()), tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())
