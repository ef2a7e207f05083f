"""Every file in ds_configs/ under the real engine: it parses, starts, trains, prunes and trains again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dsee_scale
from dsee_scale import DSEEConfig, PruneConfig
from dsee_scale.adapters.linear import adapted_layers
from dsee_scale.partition import open_partition, unwrap
from tests.dist.run_inputs import tiny_recipe, write_inputs
from tests.models import build, llama_config, partition, token_batch

FOLDER = Path(__file__).parents[2] / "ds_configs"
NAMES = ["zero2_bf16", "zero3_bf16", "zero3_cpu", "zero3_fp16", "zero3_hpz", "zero3_offload"]
STAGE_3 = [name for name in NAMES if name.startswith("zero3")]
FILLED = {
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.5,
    "lr": 1e-2,
    "betas": [0.9, 0.99],
    "eps": 1e-8,
    "weight_decay": 0.0,
}
"""What stands for "auto", as the Trainer would write it."""
GLOBAL_BATCH = 8
DSEE = DSEEConfig(
    rank=3, num_sparse=7, support="magnitude", target_modules=("q_proj", "v_proj", "down_proj"), seed=1
)
PRUNE = PruneConfig(sparsity=0.5, score="WABS")


def engine_config(name: str, world_size: int, dtype: str | None = None, **zero: Any) -> dict[str, Any]:
    """The file with every "auto" filled in; `dtype` replaces its precision, `zero` settings of ZeRO."""
    config = json.loads((FOLDER / f"{name}.json").read_text())
    micro = GLOBAL_BATCH // world_size // FILLED["gradient_accumulation_steps"]
    auto = {**FILLED, "train_batch_size": GLOBAL_BATCH, "train_micro_batch_size_per_gpu": micro}
    for section in (config, config["optimizer"]["params"]):
        for key, value in section.items():
            if value == "auto":
                section[key] = auto[key]
    if dtype is not None:
        config.pop("fp16", None)
        config["bf16"] = {"enabled": dtype == "bfloat16"}
    config["zero_optimization"].update(zero)
    return config


def precision(name: str) -> torch.dtype:
    config = json.loads((FOLDER / f"{name}.json").read_text())
    return torch.float16 if "fp16" in config else torch.bfloat16


def here(name: str, world_size: int) -> dict[str, Any]:
    """The settings that name hardware of a cluster, brought to the size of this machine."""
    return {"zero_hpz_partition_size": min(world_size, 2)} if name == "zero3_hpz" else {}


def test_no_config_is_left_out():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_config_parses_and_says_what_its_name_says(name):
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = (FOLDER / f"{name}.json").read_text()
    parsed = DeepSpeedConfig(engine_config(name, 1))
    zero = parsed.zero_config
    assert int(zero.stage) == int(name[4])
    assert parsed.float16_config.enabled == (name == "zero3_fp16")
    assert (zero.offload_param is not None) == (zero.offload_optimizer is not None) == ("offload" in name)
    assert (zero.zero_hpz_partition_size > 1) == ("hpz" in name)
    assert not zero.gather_16bit_weights_on_model_save
    assert '"scheduler"' not in raw, "a scheduler in the file knows no phases"


@pytest.mark.parametrize("name", [name for name in STAGE_3 if name != "zero3_cpu"])
@pytest.mark.parametrize(
    ("model", "largest_side", "smallest_matrix"),
    [
        ("Llama-3.2-1B", 8192, 512 * 2048),
        ("Llama-3.1-8B", 14336, 1024 * 4096),
        ("Llama-3.1-70B", 28672, 1024 * 8192),
        ("Llama-3.1-405B", 53248, 1024 * 16384),
    ],
)
def test_threshold_parts_adapters_from_base_weights(name, model, largest_side, smallest_matrix):
    threshold = engine_config(name, 1)["zero_optimization"]["stage3_param_persistence_threshold"]
    assert 16 * largest_side <= threshold < smallest_matrix, model


class Run:
    """One tiny run, with DeepSpeed or without: the same global batches in the same order."""

    def __init__(self, ds_config: dict[str, Any] | None, dtype: torch.dtype, config: Any = None) -> None:
        self.model: Any = build(config or llama_config(), dtype)
        self.rank, self.world_size = 0, 1
        forget_hierarchy()
        if ds_config is not None and ds_config["zero_optimization"]["stage"] == 3:
            partition(self.model, ds_config)
        dsee_scale.inject(self.model, DSEE)
        parameters = dsee_scale.trainable_parameters(self.model)
        self.engine = None
        if ds_config is None:
            settings = {key: FILLED[key] for key in ("lr", "betas", "eps", "weight_decay")}
            self.optimizer = torch.optim.AdamW(parameters, **settings)
            return
        import deepspeed

        self.engine, *_ = deepspeed.initialize(
            model=self.model, model_parameters=parameters, config=ds_config
        )
        self.rank, self.world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def step(self, seed: int) -> float:
        """One optimizer step on one global batch; the mean loss over it."""
        ids = token_batch(vocab=97, batch=GLOBAL_BATCH, seed=seed)
        parts = ids.chunk(self.world_size * FILLED["gradient_accumulation_steps"])
        mine = [p for i, p in enumerate(parts) if i % self.world_size == self.rank]
        total = torch.zeros(())
        for part in mine:
            if self.engine is None:
                loss = self.model(input_ids=part, labels=part).loss
                (loss / len(mine)).backward()
            else:
                loss = self.engine(input_ids=part, labels=part).loss
                self.engine.backward(loss)
                self.engine.step()
            total += loss.detach().float().cpu() / len(parts)
        if self.engine is None:
            parameters = dsee_scale.trainable_parameters(self.model)
            torch.nn.utils.clip_grad_norm_(parameters, FILLED["gradient_clipping"])
            self.optimizer.step()
            self.optimizer.zero_grad()
        else:
            torch.distributed.all_reduce(total)
        return total.item()

    def tune_prune_retune(self, seeds: list[int]) -> tuple[list[float], dict[str, torch.Tensor], int]:
        """Losses of both phases, zeros by weight at the end, and the number that was removed."""
        losses = [self.step(seed) for seed in seeds]
        removed = dsee_scale.prune(self.engine or self.model, PRUNE).removed
        losses += [self.step(seed) for seed in seeds]
        return losses, self.zeros(), removed

    def zeros(self) -> dict[str, torch.Tensor]:
        weights = {n: p for n, p in unwrap(self.model).named_parameters() if p_is_block_weight(n)}
        whole = open_partition(self.model).gather(list(weights.values()))
        return {name: value == 0 for name, value in zip(weights, whole, strict=True)}


def forget_hierarchy() -> None:
    """Drop hpZ's process-wide group: DeepSpeed gives it to every later engine and makes no second one."""
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def p_is_block_weight(name: str) -> bool:
    return name.endswith("proj.weight")


def run_config(name: str, dtype: str, seeds: list[int], zero: dict[str, Any]) -> Any:
    world_size = torch.distributed.get_world_size()
    ds_config = engine_config(name, world_size, dtype, **here(name, world_size), **zero)
    try:
        return Run(ds_config, getattr(torch, dtype)).tune_prune_retune(seeds)
    finally:
        forget_hierarchy()


def assert_like_dense(results: list[Any], seeds: list[int]) -> None:
    losses, zeros, removed = Run(None, torch.float32).tune_prune_retune(seeds)
    assert removed == sum(int(each.sum()) for each in zeros.values())
    for found_losses, found_zeros, found_removed in results:
        assert found_losses == pytest.approx(losses, abs=2e-5)
        assert found_removed == removed
        assert found_zeros.keys() == zeros.keys()
        for key in zeros:
            assert torch.equal(found_zeros[key], zeros[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_config_in_fp32_trains_and_prunes_like_one_process_without_deepspeed(pools, name):
    seeds = [0, 1, 2]
    assert_like_dense(pools(2).run(run_config, name, "float32", seeds, {}), seeds)


@pytest.mark.timeout(600)
def test_hierarchical_groups_smaller_than_the_world_train_and_prune_like_one_process(pools):
    seeds = [0, 1, 2]
    assert_like_dense(pools(4).run(run_config, "zero3_hpz", "float32", seeds, {}, timeout=500), seeds)


@pytest.mark.parametrize("name", NAMES)
def test_config_as_shipped_learns_and_keeps_its_zeros(pools, name):
    from deepspeed.accelerator import get_accelerator

    dtype = precision(name)
    if dtype not in get_accelerator().supported_dtypes():
        pytest.skip(f"{name}.json needs {dtype}, which DeepSpeed does not support on this machine's device")
    seeds = [0] * 4
    for losses, zeros, removed in pools(2).run(run_config, name, str(dtype).split(".")[1], seeds, {}):
        assert losses[3] < losses[0] - 0.02
        assert losses[7] < losses[4] - 0.02
        assert sum(int(each.sum()) for each in zeros.values()) == removed


def residents(name: str) -> dict[str, tuple[bool, bool]]:
    """By parameter: stays whole on every rank, and is whole after a step."""
    world_size = torch.distributed.get_world_size()
    ds_config = engine_config(name, world_size, "float32", **here(name, world_size))
    sizes = dict(hidden_size=1024, intermediate_size=1100, num_hidden_layers=1)
    heads = dict(num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    run = Run(ds_config, torch.float32, llama_config(**sizes, **heads))
    run.step(0)
    forget_hierarchy()
    named = run.model.named_parameters()
    return {n: (p.ds_persist, p.ds_status.name == "AVAILABLE") for n, p in named if "layers" in n}


@pytest.mark.parametrize("name", STAGE_3)
def test_after_a_step_adapters_are_whole_and_base_weights_are_shards(pools, name):
    for found in pools(2).run(residents, name):
        adapters = {key: value for key, value in found.items() if "dsee_" in key}
        matrices = {key: value for key, value in found.items() if p_is_block_weight(key)}
        assert len(adapters) == 3 and len(matrices) == 7
        assert set(adapters.values()) == {(True, True)}
        assert set(matrices.values()) == {(False, False)}


def test_adapters_are_counted():
    assert len(adapted_layers(Run(None, torch.float32).model)) == 6


def optimizer_of(name: str) -> tuple[str, list[int]]:
    """The class of the optimizer that works behind the engine, and the parameters of each of its groups."""
    run: Any = Run(engine_config(name, 2, "float32"), torch.float32)
    run.step(0)
    return type(run.engine.optimizer.optimizer).__name__, group_sizes(run.engine)


def group_sizes(engine: Any) -> list[int]:
    """Parameters of each group; DeepSpeed hands them to the optimizer only while it steps."""
    zero = engine.optimizer
    sizes = [
        len(group) for group in (zero.fp16_groups if hasattr(zero, "fp16_groups") else zero.bit16_groups)
    ]
    assert len(sizes) >= len(zero.optimizer.param_groups)
    return sizes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("zero3_cpu", "AdamW"), ("zero2_bf16", "AdamW"), ("zero3_offload", "DeepSpeedCPUAdam")],
)
def test_the_file_chooses_the_optimizer_and_no_group_is_empty(pools, name, expected):
    for found, groups in pools(2).run(optimizer_of, name):
        assert found == expected
        assert groups and all(groups)


def test_without_torch_adam_deepspeed_takes_its_own():
    """FusedAdam needs a GPU; without one only the choice can be seen."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = engine_config("zero3_bf16", 1)
    del config["optimizer"]["params"]["torch_adam"]
    parsed = DeepSpeedConfig(config)
    assert parsed.optimizer_name == "adamw" and "torch_adam" not in parsed.optimizer_params
    assert not parsed.zero_config.offload_optimizer


def train_with(values: dict[str, Any]) -> tuple[str, list[int], list[float]]:
    """A run through the Trainer: optimizer, parameters of its groups, losses."""
    from dsee_scale.recipe.recipe import build_recipe
    from dsee_scale.training.journal import Journal
    from dsee_scale.training.run import build_trainer
    from dsee_scale.training.setup import kept_environment, training_arguments

    with kept_environment():
        recipe = build_recipe(values)
        trainer: Any = build_trainer(recipe, training_arguments(recipe), None, Journal())
        trainer.train()
        engine = trainer.model_wrapped
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return type(engine.optimizer.optimizer).__name__, group_sizes(engine), losses


@pytest.mark.timeout(600)
def test_the_trainer_runs_every_optimizer_that_a_config_may_name(pools, tmp_path):
    """Named in the JSON file, DeepSpeed's own under offload, or left to training.optim: the same losses."""
    write_inputs(tmp_path)
    offloaded = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "torch": ("AdamW", {}),
        "cpu": ("DeepSpeedCPUAdam", offloaded),
    }
    cases["recipe"] = ("AdamW", {})
    losses = {}
    for case, (expected, zero) in cases.items():
        values = tiny_recipe(tmp_path, tmp_path / case, training__save_strategy="no", retune={"max_steps": 2})
        config = values["training"]["deepspeed"]
        config["zero_optimization"].update(zero)
        if case == "cpu":
            del config["optimizer"]["params"]["torch_adam"]
        if case == "recipe":
            del config["optimizer"]
        for found, groups, losses[case] in pools(2).run(train_with, values, timeout=400):
            assert found == expected, case
            assert groups and all(groups), case
    assert len(losses["torch"]) == 8
    assert losses["cpu"] == pytest.approx(losses["torch"], abs=1e-5)
    assert losses["recipe"] == pytest.approx(losses["torch"], abs=1e-5)
