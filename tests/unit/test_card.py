"""Every export has a model card that the hub can read."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, BertConfig

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.checkpoint.adapter_file import KIND as ADAPTER
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.export.export import export_model
from dsee_scale.export.from_files import export_files
from dsee_scale.export.hub import _files
from dsee_scale.export.lora import export_lora
from tests.models import build, llama_config
from tests.unit.test_export import tuned


def test_it_says_what_was_trained_and_removed_and_how_to_load_it(tmp_path):
    model = tuned(llama_config())
    model.config._name_or_path = "someone/model-1.5b"
    export_model(model, tmp_path / "out", notes="## What was measured\n\n| loss |\n| --- |\n| 1.5 |")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == "someone/model-1.5b" and card.data.library_name == "transformers"
    assert {"dsee", "sparse"} <= set(card.data.tags)
    for words in (
        "| rank, alpha | 3, 32 |",
        "| sparse entries per matrix | 11 (magnitude) |",
        "| unstructured | 14 | 50.",
        "AutoModelForCausalLM.from_pretrained('out')",
        "| 1.5 |",
        "(W + D) * M",
        "buy no speed",
    ):
        assert words in card.text, words


def test_from_files_it_replaces_the_bases_card_and_names_no_folder_of_this_machine(tmp_path):
    base = tmp_path / "base"
    model = tuned(llama_config(), sparsity=0)
    build(llama_config()).save_pretrained(base)
    (base / "README.md").write_text("the base's card")
    model.config._name_or_path = str(base)
    save_adapter(model, tmp_path / "adapter")
    export_files(tmp_path / "adapter", base, tmp_path / "files")
    export_lora(model, tmp_path / "lora")
    for folder, library in (("files", "transformers"), ("lora", "peft")):
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert card.data.library_name == library and card.data.base_model is None
        assert str(tmp_path) not in str(card) and "the base's card" not in str(card)
        assert "What was removed" not in card.text
    assert "--max-lora-rank" in card.text and "PeftModel.from_pretrained(base, 'lora')" in card.text
    export_lora(model, tmp_path / "lora", overwrite=True)


def test_it_names_the_class_of_what_is_no_causal_decoder(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    model = AutoModelForSequenceClassification.from_config(config)
    settings = {"rank": 2, "num_sparse": 3, "support": "random", "target_modules": ("query", "value")}
    dsee_scale.inject(model, DSEEConfig(**settings))
    model.config._name_or_path = "someone/bert"
    export_model(model, tmp_path / "out")
    export_lora(model, tmp_path / "lora")
    save_adapter(model, tmp_path / "adapter")
    files = _files(open_folder(tmp_path / "adapter", (ADAPTER,)), "me/adapter", None)
    cards = [(tmp_path / name / "README.md").read_text() for name in ("out", "lora")]
    for card in (*cards, files["README.md"].decode()):
        assert "import BertForSequenceClassification\n" in card and "AutoModel" not in card
        assert "= BertForSequenceClassification.from_pretrained(" in card


def test_it_says_tuned_and_pruned_of_what_was(tmp_path):
    plain, tuned_alone = build(llama_config()), tuned(llama_config(), sparsity=0)
    pruned_alone = build(llama_config())
    dsee_scale.prune(pruned_alone, PruneConfig(sparsity=0.5, score="W", refit=False))
    expected = (
        (plain, "none", "Saved, by", "W, the frozen base"),
        (tuned_alone, "masked", "Tuned, by", "W + D: the update"),
        (tuned_alone, "none", "Saved, by", "W, the frozen base"),
        (pruned_alone, "masked", "Pruned, by", "W * M"),
        (tuned(llama_config()), "masked", "Tuned and pruned, by", "(W + D) * M: the update"),
        (tuned(llama_config()), "none", "Pruned, by", "W * M, the frozen base"),
    )
    for index, (model, delta, what, form) in enumerate(expected):
        export_model(model, tmp_path / str(index), delta=delta)
        text = (tmp_path / str(index) / "README.md").read_text()
        assert what in text and f"): {form}" in text, (delta, what, text)


@pytest.mark.parametrize("uneven", [False, True])
def test_what_stock_transformers_cannot_load_is_said(tmp_path, uneven):
    model = build(llama_config(num_key_value_heads=5))
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=3))
    counts = {"sparsity": 0.3} if uneven else {"num_per_layer": 1}
    dsee_scale.prune(model, PruneConfig(pattern="heads", score="W", **counts))
    report = export_model(model, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "heads cut out of 2 blocks" in text
    stock = report.loads_with == "transformers"
    assert stock != uneven
    assert ("AutoModelForCausalLM.from_pretrained('out')" in text) == stock
    assert (
        ("dsee_scale.load_pretrained('out')" in text)
        == ("Stock transformers cannot load it" in text)
        == uneven
    )


def test_a_pattern_with_a_bar_stays_in_its_cell(tmp_path):
    model = build(llama_config())
    dsee_scale.inject(
        model, DSEEConfig(rank=2, num_sparse=4, support="magnitude", target_modules=r".*\.(q|v)_proj")
    )
    dsee_scale.export_model(model, tmp_path / "out")
    assert r"| adapted modules | .*\.(q\|v)_proj |" in (tmp_path / "out" / "README.md").read_text()
