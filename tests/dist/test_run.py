"""The whole run under real ZeRO-3: all phases, resume anywhere, files without base weights, shared errors."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import dsee_scale
from dsee_scale.errors import DSEEError
from dsee_scale.recipe.recipe import load_recipe
from tests.dist.run_inputs import WORDS, losses, tiny_recipe, zero_share
from tests.models import build, moe_config

# The first run of a process imports transformers' Trainer and all that hangs on it.
LONG = 400.0
pytestmark = pytest.mark.timeout(900)


def run_recipe(values: dict[str, Any]) -> None:
    """One run on a pool's rank."""
    from dsee_scale.recipe.recipe import build_recipe
    from dsee_scale.training.run import run

    try:
        run(build_recipe(values))
    finally:
        gc.collect()


def run_and_tell(values: dict[str, Any]) -> tuple[str, str]:
    """The error of a run on a pool's rank: type and text."""
    try:
        run_recipe(values)
    except DSEEError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.fixture(scope="module")
def finished(inputs, pools, tmp_path_factory):
    """An undisturbed run on two ranks."""
    output = tmp_path_factory.mktemp("finished") / "run"
    pools(2).run(run_recipe, tiny_recipe(inputs, output), timeout=LONG)
    return output


def test_every_phase_is_measured_and_half_of_the_weights_are_zero(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    phases = {phase["phase"]: phase for phase in metrics["phases"]}
    assert list(phases) == ["before", "tuned", "pruned", "retuned", "exported"]
    assert phases["tuned"]["quality"]["loss"] < phases["before"]["quality"]["loss"] - 0.1
    assert phases["retuned"]["quality"]["loss"] < phases["pruned"]["quality"]["loss"]
    zeros, entries = zero_share(finished / "model")
    assert phases["tuned"]["zeros"] == 0
    assert phases["pruned"]["zeros"] == phases["retuned"]["zeros"] == zeros == round(entries / 2)
    assert all(len(phase["peak_memory_bytes"]) == 2 for phase in metrics["phases"])
    assert metrics["run"]["world_size"] == 2
    assert (finished / "report.html").stat().st_size > 10_000


def test_the_export_was_judged_without_dsee_scale(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    exported = metrics["phases"][-1]
    assert exported["dsee_scale_imported"] is False
    assert exported["same_tokens"] is True


def test_checkpoints_hold_no_base_weight_and_nothing_empty(finished):
    checkpoints = sorted(path.name for path in finished.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-11", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    files = [path for path in finished.glob("checkpoint-*/*")] + list((finished / "adapter").iterdir())
    assert all(path.stat().st_size for path in files)
    for path in (path for path in files if path.suffix == ".safetensors"):
        with safe_open(path, "pt") as reader:
            for name in reader.keys():  # noqa: SIM118 (the reader is no mapping)
                assert reader.get_slice(name).get_shape() not in ([], [0]), (path, name)
                if "random" not in path.name and "mask" not in path.name:
                    assert ".dsee_" in name, (path, name)


@pytest.mark.parametrize(
    ("step", "world", "batch", "accumulation"), [(4, 2, 6, 1), (8, 3, 4, 1), (8, 1, 6, 2)]
)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    finished, inputs, pools, tmp_path, step, world, batch, accumulation
):
    """In both phases, on two, three and one rank."""
    output = tmp_path / "run"
    shutil.copytree(finished / f"checkpoint-{step}", output / f"checkpoint-{step}")
    values = tiny_recipe(
        inputs,
        output,
        training__resume_from_checkpoint=True,
        training__per_device_train_batch_size=batch,
        training__gradient_accumulation_steps=accumulation,
        export={"delta": "masked", "check": False},
    )
    pools(world).run(run_recipe, values, timeout=LONG)
    expected, found = losses(finished), losses(output)
    assert found.keys() == expected.keys()
    for at, loss in expected.items():
        assert found[at] == pytest.approx(loss, abs=1e-6 if world == 2 else 1e-4), at
    ours = json.loads((output / "metrics.json").read_text())["phases"]
    theirs = json.loads((finished / "metrics.json").read_text())["phases"]
    assert [p["phase"] for p in ours] == [p["phase"] for p in theirs][:4]
    assert zero_share(output / "model") == zero_share(finished / "model")


def test_a_finished_run_resumes_into_its_export_without_a_step_more(finished, inputs, pools, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-11", output / "checkpoint-11")
    values = tiny_recipe(inputs, output, training__resume_from_checkpoint=True, export={"check": False})
    pools(2).run(run_recipe, values, timeout=LONG)
    assert losses(output) == losses(finished)
    files = [folder / "adapter" / "dsee_adapter.safetensors" for folder in (finished, output)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_resuming_with_another_batch_or_other_adapters_is_refused_on_every_rank(
    finished, inputs, pools, tmp_path
):
    output = tmp_path / "run"
    shutil.copytree(finished / "checkpoint-4", output / "checkpoint-4")
    changes = {
        "12 examples per step": {"training__per_device_train_batch_size": 5},
        "other dsee settings (rank: 4 there, 2 here)": {"dsee__rank": 2},
    }
    for message, change in changes.items():
        values = tiny_recipe(inputs, output, training__resume_from_checkpoint=True, **change)
        found = pools(2).run(run_and_tell, values, timeout=LONG)
        assert found[0] == found[1]
        assert found[0][0] == "ConfigError"
        assert message in found[0][1]


def test_the_best_pruned_model_is_kept_and_loaded_at_the_end(inputs, pools, tmp_path):
    values = tiny_recipe(
        inputs,
        tmp_path / "run",
        training__load_best_model_at_end=True,
        training__eval_strategy="steps",
        training__eval_steps=2,
        training__save_steps=2,
        training__save_total_limit=1,
        training__metric_for_best_model="loss",
        retune={"max_steps": 6, "learning_rate": 0.5, "lr_scheduler_type": "constant", "warmup_steps": 0},
        export=None,
    )
    pools(2).run(run_recipe, values, timeout=LONG)
    kept = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(kept) <= 2
    state = json.loads((kept[-1] / "dsee_state.json").read_text())["extra"]["trainer"]
    best = Path(state["best_model_checkpoint"])
    assert int(best.name.split("-")[1]) >= 6
    with (
        safe_open(best / "dsee_adapter.safetensors", "pt") as expected,
        safe_open(tmp_path / "run" / "adapter" / "dsee_adapter.safetensors", "pt") as found,
    ):
        for name in expected.keys():  # noqa: SIM118
            assert (expected.get_tensor(name) == found.get_tensor(name)).all(), name


def test_bad_input_is_the_same_error_on_every_rank(finished, inputs, pools, tmp_path):
    (tmp_path / "wrong.csv").write_text("title,label\nx,positive\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    cases = {
        "has no column 'text'; columns found: title, label": {
            "data__train_file": str(tmp_path / "wrong.csv")
        },
        "is not empty": {"training__output_dir": str(tmp_path / "full")},
        "nothing to resume": {"training__resume_from_checkpoint": True},
        "gradient_clipping is 0.5, but training.max_grad_norm is 1.0": {
            "training__deepspeed": {"gradient_clipping": 0.5, "zero_optimization": {"stage": 3}}
        },
        "tokenizer": {"model__name": str(tmp_path / "no_model")},
        "no module": {"dsee__target_modules": ["q_prj"]},
    }
    for message, changes in cases.items():
        output = tmp_path / "out"
        found = pools(2).run(run_and_tell, tiny_recipe(inputs, output, **changes), timeout=LONG)
        assert found[0] == found[1], message
        assert message.lower() in found[0][1].lower(), found[0]
        assert not output.exists() or not any(output.iterdir()), message


def test_a_refitted_run_writes_its_base_once_and_resumes_from_it(inputs, pools, tmp_path):
    """The default pruning: by activations, re-fitted. A checkpoint holds none of the new weights."""
    changes: dict[str, Any] = dict(prune={"sparsity": 0.5}, data__calibration_samples=24)
    pools(2).run(run_recipe, tiny_recipe(inputs, tmp_path / "run", **changes), timeout=LONG)
    phases = json.loads((tmp_path / "run" / "metrics.json").read_text())["phases"]
    zeros, entries = zero_share(tmp_path / "run" / "model")
    assert [phase["zeros"] for phase in phases[2:]] == [zeros] * 3 and zeros == pytest.approx(
        entries / 2, abs=14
    )
    assert phases[-1]["same_tokens"] is True
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "base")
    dsee_scale.load_adapter(base, tmp_path / "run" / "adapter")
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "run" / "checkpoint-8", resumed / "checkpoint-8")
    changes["export"] = None
    values = tiny_recipe(inputs, resumed, training__resume_from_checkpoint=True, **changes)
    found = pools(2).run(run_and_tell, values, timeout=LONG)
    assert found[0] == found[1] and "base is missing; resume an older checkpoint" in found[0][1]
    values["training"]["resume_from_checkpoint"] = str(tmp_path / "run" / "checkpoint-8")
    found = pools(2).run(run_and_tell, values, timeout=LONG)
    assert found[0] == found[1] and f"copy {tmp_path / 'run' / 'base'} there" in found[0][1]
    shutil.copytree(tmp_path / "run" / "base", resumed / "base")
    values["training"]["resume_from_checkpoint"] = True
    pools(2).run(run_recipe, values, timeout=LONG)
    assert losses(resumed) == losses(tmp_path / "run")
    files = [folder / "adapter" / "dsee_adapter.safetensors" for folder in (tmp_path / "run", resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_recipe_for_experts_leaves_a_smaller_stock_model(inputs, pools, tmp_path):
    shipped = load_recipe(
        Path(__file__).parents[2] / "recipes" / "moe.yaml", variables={"DSEE_SCALE_CACHE": "/"}
    )
    shutil.copytree(inputs, tmp_path / "inputs")
    sizes = dict(vocab_size=len(WORDS), eos_token_id=1, pad_token_id=0, bos_token_id=None)
    build(moe_config("qwen3_moe", 8, **sizes)).save_pretrained(tmp_path / "inputs" / "model")
    sections = {"dsee": {**shipped.to_dict()["dsee"], "num_sparse": 8}, "prune": shipped.to_dict()["prune"]}
    values = tiny_recipe(tmp_path / "inputs", tmp_path / "run", **sections, training__save_strategy="no")
    pools(2).run(run_recipe, values, timeout=LONG)
    phases = {p["phase"]: p for p in json.loads((tmp_path / "run" / "metrics.json").read_text())["phases"]}
    experts = 2 * 2 * (2 * 12 * 20 + 12 * 20)  # two of eight in each of two layers
    assert phases["tuned"]["zeros"] == 0 and phases["retuned"]["zeros"] == experts
    assert phases["retuned"]["quality"]["loss"] < phases["before"]["quality"]["loss"] - 0.1
    assert phases["exported"]["same_tokens"] and phases["exported"]["max_logit_difference"] < 1e-4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.num_experts == 6


def test_completion_with_bleu_gradual_pruning_and_a_dense_export_like_the_live_model(inputs, pools, tmp_path):
    (tmp_path / "pairs.csv").write_text("mr,ref\n" + "the film,is fine\nthe plot,is dull\n" * 30)
    data = {
        "task": "completion",
        "train_file": str(tmp_path / "pairs.csv"),
        "prompt": "{mr} :",
        "completion": " {ref}",
        "generate_samples": 3,
        "generation": {"max_new_tokens": 5},
    }
    values = tiny_recipe(
        inputs,
        tmp_path / "run",
        data=data,
        gradual={"num_steps": 4, "every": 2},
        training__save_strategy="no",
        export={"check": True, "delta": "dense"},
        prune__mask_update=False,
    )
    pools(2).run(run_recipe, values, timeout=LONG)
    phases = json.loads((tmp_path / "run" / "metrics.json").read_text())["phases"]
    assert [phase["phase"] for phase in phases] == ["before", "tuned", "pruned", "retuned", "exported"]
    assert phases[2]["step"] == 10
    assert phases[2]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert all("bleu" in phase["quality"] for phase in phases[:4])
    assert phases[4]["max_logit_difference"] < 1e-4
    for name, value in phases[4]["quality"].items():
        assert value == pytest.approx(phases[3]["quality"][name], rel=1e-4)


def read_and_count(values: dict[str, Any]) -> tuple[int, list[list[int]]]:
    """How many tables a pool's rank writes to read the data, and the examples."""
    from datasets.arrow_writer import ArrowWriter

    from dsee_scale.data.encoding import Encoder
    from dsee_scale.recipe.recipe import build_recipe
    from dsee_scale.training.run import read_data
    from dsee_scale.training.setup import kept_environment, load_tokenizer, training_arguments

    written: list[Any] = []
    finalize = ArrowWriter.finalize
    recipe = build_recipe(values)
    with kept_environment(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArrowWriter, "finalize", lambda *a, **k: written.append(a) or finalize(*a, **k))
        args = training_arguments(recipe)
        rows, _ = read_data(recipe, args, Encoder(load_tokenizer(recipe.model), recipe.data))
    return len(written), rows["input_ids"][:]


def test_rank_0_tokenises_and_packs_and_the_others_read_its_cache(inputs, pools, tmp_path):
    values = tiny_recipe(inputs, tmp_path / "run")
    for part in ("train_file", "validation_file"):  # no other test's cache
        values["data"][part] = shutil.copy(values["data"][part], tmp_path)
    for key in ("labels", "prompt"):
        del values["data"][key]
    values["data"] |= {"task": "language_modelling", "text_column": "text", "max_length": 16}
    (first, mine), (other, theirs) = pools(2).run(read_and_count, values, timeout=LONG)
    assert first >= 6 and other == 0  # each file read, tokenized and packed
    assert mine == theirs and mine


def test_plain_text_without_deepspeed_in_one_process(inputs, tmp_path, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "a.txt").write_text("the film is fine and the plot is dull\n" * 60)
    data = {"task": "language_modelling", "train_file": str(tmp_path / "a.txt"), "max_length": 16}
    values = tiny_recipe(
        inputs,
        tmp_path / "run",
        data=data,
        training__deepspeed=None,
        training__per_device_train_batch_size=2,
        training__save_strategy="no",
    )
    run_recipe(values)
    phases = json.loads((tmp_path / "run" / "metrics.json").read_text())["phases"]
    assert phases[1]["quality"]["perplexity"] < phases[0]["quality"]["perplexity"]
    assert phases[-1]["phase"] == "exported"
