"""The package against the paper's algorithm: golden masks and heads, counts, and the differences that are meant."""

from __future__ import annotations

import numpy
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig

from dsee_scale import DSEEConfig, inject, prune
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.adapters.removed_units import removed_units
from dsee_scale.adapters.units import find_units
from paper.glue.arguments import parse_flags
from paper.glue.model import dsee_config, prune_configs
from tests.golden import pruning as golden

LEAST = ["--model_name_or_path", "m", "--task_name", "sst2", "--output_dir", "o"]
LEAST += ["--do_train", "--apply_lora", "--apply_sparse"]


@pytest.fixture(scope="module")
def stored():
    return load_file(golden.GOLDEN)


def drawn_model():
    """A BERT with the golden weights, and adapters with the golden values."""
    config = BertConfig(
        vocab_size=20,
        hidden_size=golden.HIDDEN,
        num_hidden_layers=golden.LAYERS,
        num_attention_heads=golden.HEADS,
        intermediate_size=golden.NEURONS,
    )
    model, drawn = AutoModelForSequenceClassification.from_config(config), golden.draw()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name in golden.block_shapes():
            modules[name].weight.copy_(drawn[f"{name}.weight"])
    settings = DSEEConfig(
        rank=golden.RANK, alpha=golden.ALPHA, num_sparse=golden.COUNT, target_modules=("query", "value"),
        support="random", trained_modules=("classifier",),
    )  # fmt: skip
    inject(model, settings)
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            positions = drawn[f"{name}.positions"]
            layer.dsee_rows.copy_(positions // golden.HIDDEN)
            layer.dsee_cols.copy_(positions % golden.HIDDEN)
            layer.dsee_prepare()
            layer.dsee_A.copy_(drawn[f"{name}.A"])
            layer.dsee_B.copy_(drawn[f"{name}.B"])
            layer.dsee_values.copy_(drawn[f"{name}.values"])
    return model


def prune_by_flags(model, words):
    """What `run_glue.py` would do with these flags."""
    configs = prune_configs(model, parse_flags([*LEAST, *words.split()]))
    return prune(model, configs)


def zeros(model) -> dict[str, torch.Tensor]:
    modules = dict(model.named_modules())
    return {name: modules[name].weight == 0 for name in golden.block_shapes()}


def unpacked(stored, key: str, shape: tuple[int, int]) -> torch.Tensor:
    bits = numpy.unpackbits(stored[key].numpy())[: shape[0] * shape[1]]
    return torch.from_numpy(bits).bool().view(shape)


def test_the_golden_file_is_what_its_generator_makes(stored):
    made = golden.make()
    assert made.keys() == stored.keys()
    assert all(torch.equal(made[name], stored[name]) for name in made)


@pytest.mark.parametrize("mode", golden.MODES)
def test_two_pools_lose_what_the_repository_removes(mode, stored):
    model = drawn_model()
    shares = f"--ad_pruning_ratio {golden.ADAPTED_SHARE} --pruning_ratio {golden.OTHER_SHARE}"
    prune_by_flags(model, f"--prune_mode {mode} {shares}")
    for name, found in zeros(model).items():
        key = f"{mode if golden.is_adapted(name) else 'others'}.{name}"
        assert torch.equal(found, unpacked(stored, key, golden.block_shapes()[name])), name


def test_wabs_differs_from_the_release_on_purpose(stored):
    """There BA enters with weight 1 and S2 with alpha / rank, which is not what the forward pass adds."""
    differing = [
        name
        for name in golden.block_shapes()
        if golden.is_adapted(name)
        and not torch.equal(stored[f"WABS.{name}"], stored[f"released_wabs.{name}"])
    ]
    assert differing


def test_mode_random_leaves_the_other_matrices_to_their_magnitude(stored):
    model = drawn_model()
    prune_by_flags(model, f"--prune_mode random --ad_pruning_ratio 0.2 --pruning_ratio {golden.OTHER_SHARE}")
    found = zeros(model)
    for name, shape in golden.block_shapes().items():
        if not golden.is_adapted(name):
            assert torch.equal(found[name], unpacked(stored, f"others.{name}", shape)), name
    adapted = [mask for name, mask in found.items() if golden.is_adapted(name)]
    assert sum(int(mask.sum()) for mask in adapted) == round(0.2 * sum(mask.numel() for mask in adapted))


@pytest.mark.parametrize("mode", [mode for mode in golden.MODES if mode not in ("W", "NAB", "NABS")])
def test_every_layer_loses_the_heads_that_the_repository_removes(mode, stored):
    model = drawn_model()
    prune_by_flags(model, f"--prune_mode {mode} --prune_heads_num {golden.HEADS_REMOVED}")
    for index, layer in enumerate(find_units(model, "heads", lambda p: p.shape)):
        gone = removed_units(model, layer).nonzero().flatten()
        assert torch.equal(gone, stored[f"heads.{mode}.{index}"]), (mode, index)


def test_bert_base_trains_what_the_paper_counts():
    """Rank 16 and N = 64 on query and value of BERT-base: 589,824 values of A and B, 1,536 of S2."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(BertConfig())
    settings = dsee_config(
        model, parse_flags([*LEAST, *["--lora_r", "16", "--num_sparse", "64"]]).model, seed=0
    )
    assert settings.target_modules == ("query", "value") and settings.trained_modules == ("classifier",)
    shapes = [m.weight.shape for n, m in model.named_modules() if n.endswith((".query", ".value"))]
    assert sum(settings.rank * (rows + cols) for rows, cols in shapes) == 589_824
    assert sum(settings.num_entries(rows * cols) for rows, cols in shapes) == 1_536
