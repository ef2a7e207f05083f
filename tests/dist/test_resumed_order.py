"""A checkpoint of one process goes on with the same rows on two ranks, in any epoch and any order."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from dsee_scale import DSEECallback
from tests.dist.run_inputs import stock_trainer
from tests.models import build, llama_config
from tests.unit.test_trainer_callback import CONFIG


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": ids}


def seen_rows(base: str, output: str, strategy: str, batch: int, checkpoint: str | None) -> list[list[int]]:
    """The rows of each step of this rank: six steps an epoch, ten in all."""
    rows = [{"input_ids": [number] * (4 + number % 7)} for number in range(24)]
    settings = dict(output_dir=output, max_steps=10, save_steps=4, seed=3, train_sampling_strategy=strategy)
    settings |= dict(per_device_train_batch_size=batch)
    with stock_trainer(base, checkpoint, CONFIG, rows, DSEECallback(), padded, **settings) as trainer:
        seen, step = [], trainer.training_step

        def noting(module, inputs, *others, **kwargs):
            seen.append(inputs["input_ids"][:, 0].tolist())
            return step(module, inputs, *others, **kwargs)

        trainer.training_step = noting  # type: ignore[method-assign]
        trainer.train(resume_from_checkpoint=checkpoint)
        return seen


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_ranks_go_on_with_the_rows_that_one_process_would_have_seen(pools, tmp_path, strategy):
    build(llama_config()).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    base, output = str(tmp_path / "base"), str(tmp_path / "run")
    whole = pools(1).run(seen_rows, base, output, strategy, 4, None)[0]
    for step in (8, 4):  # in the second epoch, and in the first
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        ranks = pools(2).run(seen_rows, base, output, strategy, 2, checkpoint)
        found = [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)]
        assert found == [sorted(batch) for batch in whole[step:]], step
