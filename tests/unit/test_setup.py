"""The Trainer's arguments as a run gets them."""

from __future__ import annotations

from pathlib import Path

from dsee_scale.training.setup import RunArguments


def test_one_process_trains_on_one_gpu(tmp_path: Path) -> None:
    """transformers would make a DataParallel of all that are in sight, with other batches and another loss."""
    args = RunArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    assert args.n_gpu == 0
    args._n_gpu = 8
    assert args.n_gpu == 1 and args.train_batch_size == 4
