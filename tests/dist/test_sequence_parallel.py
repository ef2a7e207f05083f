"""Ulysses sequence parallelism: two ranks that share a sequence train and prune what one rank with all of it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from tests.models import build, llama_config, partition, token_batch, zero3_config

LENGTH = 16
SIZES = dict(hidden_size=32, head_dim=8, num_attention_heads=4, num_key_value_heads=4)


def losses(parallel: bool) -> tuple[list[float], int]:
    """Two steps, a pruning that looks at activations, two steps under the mask; and the zeros. On a pool's rank."""
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]  # the rank serves other tests too
    rank = torch.distributed.get_rank()
    part = slice(rank * LENGTH // 2, (rank + 1) * LENGTH // 2) if parallel else slice(0, LENGTH)
    model: Any = build(llama_config(**SIZES))
    mpu = None
    if parallel:
        settings = dict(sequence_parallel_size=2, micro_batch_size=1, seq_length_is_variable=True)
        mpu = UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", **settings)
    config = zero3_config()
    partition(model, config)
    dsee_scale.inject(model, DSEEConfig(rank=2, num_sparse=5, target_modules=("q_proj", "down_proj")))
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=dsee_scale.trainable_parameters(model), config=config, mpu=mpu
    )

    def inputs(seed: int) -> dict[str, torch.Tensor]:
        ids = token_batch(batch=1, length=LENGTH, seed=seed)
        return {"input_ids": ids[:, part], "position_ids": torch.arange(LENGTH)[None, part]}

    found = []
    for step in range(4):
        if step == 2:
            dsee_scale.prune(engine, PruneConfig(refit=False), [inputs(7), inputs(8)])
        ids = token_batch(batch=1, length=LENGTH, seed=step)
        labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], dim=1)[:, part]
        logits = engine(**inputs(step), use_cache=False).logits
        total = functional.cross_entropy(logits[0].float(), labels[0], reduction="sum") / (LENGTH - 1)
        engine.backward(total * (2 if parallel else 1))  # gradients are averaged over both ranks
        engine.step()
        if parallel:
            torch.distributed.all_reduce(total)
        found.append(float(total))
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    port = dsee_scale.partition.open_partition(engine)
    zeros = [int((port.shard(p).data == 0).sum()) for n, p in model.named_parameters() if "_proj.w" in n]
    return found, int(port.sum_over_shards(torch.tensor([sum(zeros)])))


def test_two_ranks_with_half_a_sequence_each_do_what_each_does_with_all_of_it(pools):
    expected, found = pools(2).run(losses, False), pools(2).run(losses, True)
    assert found[0][0] == pytest.approx(expected[0][0], rel=1e-4)
    assert len(set(expected[0][0])) == 4 and expected[0][1] == found[0][1] > 0
