"""What is left of partitioned models after N:M, heads and neurons: files, sizes and logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.algorithms.patterns import groups_hold
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.export.export import export_model
from dsee_scale.export.from_files import export_files
from tests.dist.test_checkpoint import contents
from tests.dist.test_inject_prune import engine_for, train
from tests.dist.test_patterns import make
from tests.models import build, token_batch, zero3_config

UNITS = [
    PruneConfig(pattern="heads", num_per_layer=2, score="W"),
    PruneConfig(pattern="neurons", sparsity=0.25, scope="matrix", score="W"),
]
UNEQUAL = PruneConfig(pattern="neurons", sparsity=0.4, min_per_layer=4, score="W")
N_OF_M = PruneConfig(pattern="2:4", score="WABS", modules=("*attn*",))
TWO_OF_FOUR = PruneConfig(pattern="2:4", score="W")
SHIFTED = [PruneConfig(pattern="neurons", num_per_layer=9, score="W"), TWO_OF_FOUR]
SHIFTED_CONV1D = [PruneConfig(pattern="neurons", num_per_layer=20, score="W"), TWO_OF_FOUR]
PATTERNS = {
    "llama": ("llama", (UNITS, N_OF_M)),
    "gpt2, unequal": ("gpt2", (UNEQUAL, N_OF_M)),
    "llama, 2:4 of what is left": ("llama", (SHIFTED,)),
    "gpt2, 2:4 of what is left": ("gpt2", (SHIFTED_CONV1D,)),
}


def save_all(folder: str, case: str, partitioned: bool) -> None:
    family, prunings = PATTERNS[case]
    model = make(family, torch.bfloat16, zero3_config(torch.bfloat16) if partitioned else None)
    for config in prunings:
        dsee_scale.prune(model, config)
    save_adapter(model, f"{folder}/adapter")
    export_model(model, f"{folder}/dense", max_shard_size="10KB")
    export_model(model, f"{folder}/separate", delta="separate")


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", list(PATTERNS))
def test_smaller_files_are_byte_for_byte_those_of_one_process(pools, tmp_path, case, world_size):
    save_all(str(tmp_path / "one"), case, False)
    pools(world_size).run(save_all, str(tmp_path / "many"), case, True)
    expected, found = contents(tmp_path / "one"), contents(tmp_path / "many")
    assert found.keys() == expected.keys()
    assert sum(name.startswith("dense/model-") for name in found) > 1
    assert ("dense/dsee_structure.json" in found) == ("unequal" in case)
    for name, data in expected.items():
        assert found[name] == data, name
    for name, weight in tensors(tmp_path / "many" / "dense").items():
        if "left" in case and name.endswith(("_proj.weight", "c_fc.weight", "c_attn.weight")):
            assert groups_hold(weight, 2, 4, transposed="gpt2" in case), name


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def retuned(folder: str, family: str) -> torch.Tensor:
    """Tune, remove units, retune, write adapter and model; logits of the live engine."""
    ds_config = zero3_config()
    engine: Any = engine_for(make(family, torch.float32, ds_config), ds_config)
    train(engine, 2)
    dsee_scale.prune(
        engine, UNITS if family == "llama" else PruneConfig(pattern="heads", num_per_layer=1, score="W")
    )
    train(engine, 3)
    save_adapter(engine, f"{folder}/adapter")
    report = export_model(engine, f"{folder}/model")
    assert report.loads_with == ("transformers" if family == "llama" else "dsee_scale.load_pretrained")
    engine.eval()
    with torch.no_grad():
        return engine(token_batch()).logits.clone()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_retuned_under_zero3_and_cut_has_the_live_engines_logits(pools, tmp_path, family):
    from transformers import AutoModelForCausalLM

    from tests.dist.test_patterns import CONFIGS

    live = pools(2).run(retuned, str(tmp_path), family)
    stock = AutoModelForCausalLM.from_pretrained if family == "llama" else dsee_scale.load_pretrained
    base = build(CONFIGS[family][0]())
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    export_files(tmp_path / "adapter", tmp_path / "base", tmp_path / "from_files")
    for folder in ("model", "from_files"):
        small: Any = stock(tmp_path / folder)
        assert parameters(small) < parameters(base)
        with torch.no_grad():
            found = small(token_batch()).logits
        for expected in live:
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected, found = tensors(tmp_path / "model"), tensors(tmp_path / "from_files")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def parameters(model: torch.nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())
