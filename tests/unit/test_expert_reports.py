"""What `dsee-scale inspect` and `plan` say of folders of a mixture of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.checkpoint.adapter import save_adapter
from dsee_scale.cli import main
from dsee_scale.export.export import export_model
from dsee_scale.export.folder_report import Matrix, inspect_folder
from tests.models import build, moe_config

PLAN = ["--gpus", "2", "--gpu-memory", "1", "--targets", "q_proj", "experts"]


def experts_of(matrices: tuple[Matrix, ...]) -> list[Matrix]:
    return [matrix for matrix in matrices if ".experts." in matrix.name]


@pytest.mark.parametrize(("model_type", "fused"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_folders_are_described_expert_by_expert(model_type, fused, tmp_path, capsys):
    """Files that hold experts apart and files that hold them fused, with biases, say the same."""
    model: Any = build(moe_config(model_type))
    targets = ("q_proj", "experts")
    dsee_scale.inject(
        model,
        DSEEConfig(rank=3, num_sparse=7, target_modules=targets, shared_expert_a=True, support="random"),
    )
    dsee_scale.prune(model, PruneConfig(pattern="experts", num_per_layer=1, score="random"))
    dsee_scale.prune(model, PruneConfig(pattern="2:4", score="W"))
    save_adapter(model, tmp_path / "adapter")
    adapter = inspect_folder(tmp_path / "adapter")
    assert adapter.facts["experts"] == "20 matrices in 4 parameters, A shared within each"
    assert adapter.facts["pattern"] == "2:4, experts"
    assert adapter.facts["at export"].startswith("2 of 10 experts cut out of 2 blocks")
    assert [m.pattern for m in experts_of(adapter.matrices)] == ["experts + 2:4"] * 4
    assert {m.sparsity for m in experts_of(adapter.matrices)} == {0.6}  # a fifth, and half of what is left

    export_model(model, tmp_path / "small")
    small = inspect_folder(tmp_path / "small")
    found = experts_of(small.matrices)
    assert len(found) == (4 if fused else 2 * 4 * 3)
    assert sum(m.numel for m in found) == 2 * 4 * 3 * 20 * 12
    assert {m.pattern for m in found} == {"2:4 (I x O)" if fused else "2:4"}
    assert {m.sparsity for m in found} == {0.5}
    assert "a token still goes to as many experts" in small.facts["deployment"]
    assert "8 matrices fit 2:4 kernels" in small.facts["deployment"]  # those kernels are for linear layers

    said = {name: planned(tmp_path / name, capsys) for name in ("small", "adapter")}
    assert "in 2 blocks of 4 experts, 2 for a token, bf16 base" in said["small"]
    assert "holds an adapter, not a model; plan for its base" in said["adapter"]


def test_nothing_is_planned_for_blocks_that_are_not_alike(tmp_path, capsys):
    model = build(moe_config("qwen3_moe", experts=8))
    config = PruneConfig(pattern="experts", sparsity=0.3, scope="global", score="random")
    dsee_scale.prune(model, config)
    export_model(model, tmp_path)
    assert "blocks are not alike, which ZeRO-3 can't load" in planned(tmp_path, capsys)


def planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints, on either stream."""
    main(["plan", "--model", str(folder), *PLAN])
    return "".join(capsys.readouterr())
