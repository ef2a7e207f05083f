"""Phases, prunings and learning rates fall on the right steps."""

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from dsee_scale.config import PruneConfig
from dsee_scale.errors import ConfigError
from dsee_scale.recipe.checks import check_deepspeed_config
from dsee_scale.recipe.recipe import build_recipe
from dsee_scale.training.timeline import build_timeline, steps_per_epoch

pytestmark = pytest.mark.unit


def arguments(**values):
    return TrainingArguments(output_dir="unused", use_cpu=True, report_to="none", **values)


def recipe(**sections):
    data = {"task": "language_modelling", "train_file": "a.txt"}
    return build_recipe({"model": {"name": "x"}, "data": data, **sections})


def reference_rates(name, rate, warmup, steps, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = get_scheduler(name, optimizer, warmup, steps, kwargs or None)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def test_each_phase_has_the_schedule_that_transformers_would_give_it():
    args = arguments(max_steps=20, learning_rate=1e-3, warmup_steps=0.1, lr_scheduler_type="cosine")
    retune = {"max_steps": 10, "learning_rate": 2e-4, "warmup_steps": 3, "lr_scheduler_type": "linear"}
    timeline = build_timeline(recipe(prune={}, retune=retune), args, steps_per_epoch=7)
    assert [(p.name, p.start, p.stop) for p in timeline.phases] == [("tune", 0, 20), ("retune", 20, 30)]
    assert [event.step for event in timeline.prune_events] == [20]
    expected = reference_rates("cosine", 1e-3, 2, 20) + reference_rates("linear", 2e-4, 3, 10)
    assert timeline.learning_rates() == pytest.approx(expected)


def test_the_schedule_goes_on_at_twice_the_rate_after_the_prune_unless_retune_has_its_own():
    args = arguments(max_steps=20, learning_rate=1e-3, warmup_steps=0.1, lr_scheduler_type="linear")
    timeline = build_timeline(recipe(prune={}, retune={"max_steps": 10}), args, steps_per_epoch=1)
    linear = reference_rates("linear", 1e-3, 3, 30)
    expected = linear[:20] + [2 * rate for rate in linear[20:]]
    assert timeline.learning_rates() == pytest.approx(expected)
    own = build_timeline(recipe(prune={}, retune={"max_steps": 10, "learning_rate": 5e-4}), args, 1)
    expected = reference_rates("linear", 1e-3, 2, 20) + reference_rates("linear", 5e-4, 1, 10)
    assert own.learning_rates() == pytest.approx(expected)


def test_the_raised_rate_stays_below_the_schedules_peak():
    args = arguments(max_steps=6, learning_rate=1e-3, warmup_steps=0.1, lr_scheduler_type="linear")
    rates = build_timeline(recipe(prune={}, retune={"max_steps": 24}), args, 1).learning_rates()
    assert rates[6] == rates[10] == 1e-3 > rates[-1] > 0
    alone = build_timeline(recipe(prune={}, retune={"max_steps": 24}), arguments(max_steps=0), 1)
    assert alone.learning_rates() == pytest.approx(reference_rates("linear", 5e-5, 0, 24))


def test_epochs_are_counted_in_optimizer_steps():
    args = arguments(num_train_epochs=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    assert steps_per_epoch(33, args) == 5
    dropping = arguments(
        per_device_train_batch_size=4, gradient_accumulation_steps=2, dataloader_drop_last=True
    )
    assert steps_per_epoch(33, dropping) == 4
    timeline = build_timeline(recipe(prune={}, retune={"num_train_epochs": 0.5}), args, steps_per_epoch=5)
    assert [phase.stop for phase in timeline.phases] == [10, 13]


def test_pruning_without_tune_or_without_retune():
    first = build_timeline(recipe(prune={}, retune={"max_steps": 3}), arguments(max_steps=0), 1)
    assert [event.step for event in first.prune_events] == [0]
    assert first.phase_at(0).name == "retune"
    last = build_timeline(recipe(prune={}), arguments(max_steps=3), 1)
    assert [event.step for event in last.prune_events] == [3] == [last.num_steps]
    with pytest.raises(ConfigError, match="would train nothing"):
        build_timeline(recipe(), arguments(max_steps=0), 1)


def test_gradual_pruning_rises_to_the_final_sparsity():
    sections = {
        "prune": {"sparsity": 0.6, "score": "W"},
        "retune": {"max_steps": 10},
        "gradual": {"num_steps": 6, "every": 2},
    }
    events = build_timeline(recipe(**sections), arguments(max_steps=4), 1).prune_events
    assert [event.step for event in events] == [4, 6, 8, 10]
    assert [event.configs[0].sparsity for event in events] == pytest.approx(
        [0.6 * (1 - (1 - t / 6) ** 3) for t in (0, 2, 4, 6)]
    )
    assert events[-1].configs == (PruneConfig(sparsity=0.6, score="W"),)
    sections["gradual"]["num_steps"] = 11
    with pytest.raises(ConfigError, match="the last cut is at step 15, after the run's last step 14"):
        build_timeline(recipe(**sections), arguments(max_steps=4), 1)


def test_wrong_schedule_arguments_are_named():
    args = arguments(max_steps=4, lr_scheduler_type="cosine", lr_scheduler_kwargs={"cycles": 2})
    with pytest.raises(ConfigError, match=r"training: lr_scheduler_kwargs .*cycles"):
        build_timeline(recipe(), args, 1).learning_rates()


def test_a_deepspeed_config_may_say_auto_or_the_same():
    args = arguments(per_device_train_batch_size=4, learning_rate=1e-3, bf16=True, max_grad_norm=1.0)
    agreeing = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": "auto"}},
        "zero_optimization": {"stage": 3},
    }
    check_deepspeed_config(agreeing, args, "ds.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu is 8.*per_device_train_batch_size is 4",
        ),
        (
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps is 2.*gradient_accumulation_steps is 1",
        ),
        ({"train_batch_size": 32}, "train_batch_size is 32"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5.*max_grad_norm is 1.0"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False.*training.bf16 is True"),
        ({}, "bf16.enabled is absent, but training.bf16 is True"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True.*training.fp16 is False"),
        ({"optimizer": {"params": {"lr": 5e-5}}}, "optimizer.params.lr is 5e-05.*learning_rate is 0.001"),
        ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, "optimizer.params.betas"),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, "weight_decay is 0.1"),
        ({"scheduler": {"type": "WarmupLR"}}, "section scheduler knows no phases"),
    ],
)
def test_a_deepspeed_config_that_contradicts_is_refused_naming_both_sides(config, message):
    args = arguments(per_device_train_batch_size=4, learning_rate=1e-3, bf16=True)
    with pytest.raises(ConfigError, match=message):
        check_deepspeed_config(config, args, "ds.json")
