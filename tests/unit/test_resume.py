"""Which folders of a run count as its checkpoints."""

from __future__ import annotations

from dsee_scale.training.survival import newest_first


def test_checkpoints_are_found_by_step_and_copies_of_them_are_not(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-10-backup", "checkpoint-best", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-20").write_text("no folder")
    assert [path.name for path in newest_first(tmp_path)] == ["checkpoint-10", "checkpoint-5"]
