"""Bases as they are published: how their files are cut, what they hold twice, and what they hold in float32."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, GPTNeoXConfig

import dsee_scale
from dsee_scale import DSEEConfig
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.errors import FormatError
from dsee_scale.export.from_files import export_files
from dsee_scale.export.report import INDEX_FILE
from tests.models import build, llama_config, moe_config, token_batch


def adapted(base, **settings):
    """The model of a folder with adapters, saved beside it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3, target_modules=("o_proj",), **settings))
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(token_batch()).logits


def move_into_parts(folder, parts):
    """Cut a model's file into parts that an index names: file -> names in it; the last one holds the others."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    *named, last = parts
    files = {file: parts[file] for file in named}
    files[last] = [name for name in tensors if not any(name in names for names in files.values())]
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
    where = {name: file for file, names in files.items() for name in names}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_a_single_file_that_an_index_names_is_written_where_transformers_looks(tmp_path):
    build(llama_config()).save_pretrained(tmp_path / "base")
    move_into_parts(tmp_path / "base", {"model-00001-of-00001.safetensors": []})
    model = adapted(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_of_a_whole_file_and_an_index_the_one_that_transformers_loads_is_read(tmp_path):
    build(llama_config(), seed=1).save_pretrained(tmp_path / "base")
    move_into_parts(tmp_path / "base", {"model-00001-of-00001.safetensors": []})
    build(llama_config(), seed=2).save_pretrained(tmp_path / "base")
    assert (tmp_path / "base" / INDEX_FILE).is_file()
    model = adapted(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("alone", [False, True])
def test_a_copy_of_a_trained_tied_weight_is_not_written_as_it_was(tmp_path, alone):
    build(llama_config()).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if alone:
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, file, {"format": "pt"})
    move_into_parts(
        tmp_path / "base",
        {"model-00001-of-00002.safetensors": ["lm_head.weight"], "model-00002-of-00002.safetensors": []},
    )
    model = adapted(tmp_path / "base", trained_modules=("embed_tokens",))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight += torch.randn(
            model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    save_adapter(model, tmp_path / "adapter")
    report = export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert [*report.files] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_a_head_that_was_loaded_untied_stays_beside_trained_embeddings(tmp_path):
    build(llama_config()).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, file, {"format": "pt"})
    model = adapted(tmp_path / "base", trained_modules=("embed_tokens",))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_half_precision_model_keeps_in_float32_is_written_in_float32(tmp_path, dtype):
    base = build(moe_config("deepseek_v3"), dtype)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = base.get_buffer(name)
    bias.data = torch.rand(bias.shape, generator=torch.Generator().manual_seed(0))
    base.save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base")
    assert torch.equal(model.get_buffer(name), bias)
    save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found[name], bias)
    assert {found[key].dtype for key in found if key != name} == {dtype}


NEOX = GPTNeoXConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
BERT = BertConfig(
    vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
)
RENAMED = {  # what the files call otherwise than the model: adapted, trained in full, as the files call that
    "head": (NEOX, ("attention.dense",), ("lm_head",), "embed_out.weight"),
    "router": (moe_config("mixtral"), ("o_proj",), ("mlp.gate",), ".1.block_sparse_moe.gate.weight"),
    "norm": (BERT, ("query",), ("LayerNorm",), "attention.output.LayerNorm.gamma"),
}


@pytest.mark.parametrize("case", list(RENAMED))
def test_what_was_trained_replaces_what_the_base_calls_otherwise(tmp_path, case):
    config, targets, trained, key = RENAMED[case]
    auto = AutoModelForMaskedLM if case == "norm" else AutoModelForCausalLM
    auto.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    if case == "norm":  # as BERT was published
        file = tmp_path / "base" / "model.safetensors"
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): each
            for name, each in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    model = auto.from_pretrained(tmp_path / "base")
    settings = DSEEConfig(rank=2, num_sparse=3, target_modules=targets, trained_modules=trained)
    dsee_scale.inject(model, settings)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.requires_grad and "dsee" not in name:
                param += torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert found == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert any(name.endswith(key) for name in found)
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "out")), logits(model))


def test_experts_that_were_trained_in_full_and_are_stored_apart_are_refused(tmp_path):
    build(moe_config("qwen3_moe")).save_pretrained(tmp_path / "base")
    model = adapted(tmp_path / "base", trained_modules=("mlp.experts",))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(FormatError, match=r"experts\.\w+ is .* in the base's weight files.*load_adapter"):
        export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")


def test_weights_in_other_formats_stay_behind_and_generation_settings_do_not(tmp_path):
    """Older bases say in their config how they generate, and published ones hold what other libraries read."""
    build(llama_config()).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").unlink(missing_ok=True)
    values = json.loads((tmp_path / "base" / "config.json").read_text())
    values |= {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6}
    (tmp_path / "base" / "config.json").write_text(json.dumps(values))
    for name in ("rust_model.ot", "model.tflite", "model.onnx_data", "vocab.json"):
        (tmp_path / "base" / name).write_text("{}")
    model = adapted(tmp_path / "base")
    save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "out")
    dsee_scale.export_model(model, tmp_path / "live")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "vocab.json" in names and not any(
        name.endswith((".ot", ".tflite", ".onnx_data")) for name in names
    )
    settings = [
        AutoModelForCausalLM.from_pretrained(tmp_path / folder).generation_config
        for folder in ("out", "live")
    ]
    for found in settings:
        assert (found.repetition_penalty, found.do_sample, found.temperature) == (1.3, True, 0.6)
