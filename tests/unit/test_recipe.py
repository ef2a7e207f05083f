"""A recipe is read strictly: from a file, with every key open to the command line, and nothing guessed."""

import dataclasses
from pathlib import Path

import pytest
from transformers import TrainingArguments

from dsee_scale.config import DSEEConfig, PruneConfig
from dsee_scale.errors import ConfigError
from dsee_scale.recipe.parsing import find_file, parse_command_line, parse_value, shipped_names
from dsee_scale.recipe.recipe import build_recipe, load_recipe
from dsee_scale.recipe.sections import DataConfig, RetuneConfig

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.unit

RECIPE = """
model: {name: some/model}
data:
  task: classification
  train_file: train.csv
  prompt: "Review: {text}\\nSentiment:"
  labels: {negative: " negative", positive: " positive"}
dsee: {rank: 8, target_modules: [q_proj, v_proj]}
prune: {sparsity: 0.5, score: WABS}
training: {output_dir: runs/x, max_steps: 60, learning_rate: 1e-4, bf16: true}
retune: {max_steps: 30, learning_rate: 5e-5}
export: {delta: masked}
"""


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def test_file_fills_every_section(recipe_file):
    recipe = load_recipe(recipe_file)
    assert recipe.dsee == DSEEConfig(rank=8, target_modules=("q_proj", "v_proj"))
    assert recipe.prune == (PruneConfig(sparsity=0.5, score="WABS"),)
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.retune == RetuneConfig(max_steps=30, learning_rate=5e-5)
    assert build_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("words", "section", "key", "value"),
    [
        (["--training.learning_rate", "2e-3"], "training", "learning_rate", 2e-3),
        (["--learning_rate=2e-3"], "training", "learning_rate", 2e-3),
        (["--retune.learning-rate", "2e-3"], "retune", "learning_rate", 2e-3),
        (["--dsee.rank", "4"], "dsee", "rank", 4),
        (["--rank", "4"], "dsee", "rank", 4),
        (["--target_modules", "q_proj", "k_proj"], "dsee", "target_modules", ("q_proj", "k_proj")),
        (["--dsee.decomposition.rank", "12"], "dsee", "decomposition.rank", 12),
        (["--sparsity", "0.25"], "prune", "sparsity", 0.25),
        (["--data.labels.positive", " good"], "data", "labels.positive", " good"),
        (["--gradient_checkpointing"], "training", "gradient_checkpointing", True),
        (["--max_eval_samples", "100"], "data", "max_eval_samples", 100),
        (["--resume"], "training", "resume_from_checkpoint", True),
        (["--resume", "runs/x/checkpoint-5"], "training", "resume_from_checkpoint", "runs/x/checkpoint-5"),
        (["--deepspeed", "null"], "training", "deepspeed", None),
    ],
)
def test_every_key_can_be_overridden(recipe_file, words, section, key, value):
    found = getattr(load_recipe(recipe_file, words), section)
    found = found[0] if section == "prune" else found
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_whole_sections_can_be_switched_off(recipe_file):
    recipe = load_recipe(recipe_file, ["--prune", "null", "--retune", "null", "--export", "null"])
    assert recipe.prune == () and recipe.retune is recipe.export is None


def test_seed_is_the_trainers_and_others_need_their_section(recipe_file):
    recipe = load_recipe(recipe_file, ["--seed", "7", "--dsee.seed", "8"])
    assert recipe.training["seed"] == 7
    assert recipe.dsee.seed == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "did you mean 'learning_rate'"),
        (["--dsee.rang", "1"], "did you mean 'rank'"),
        (["--modle.name", "x"], "did you mean 'model'"),
        (["--learning_rate", "fast"], "learning_rate must be a number, found 'fast'"),
        (["--bf16", "maybe"], "bf16 must be true or false"),
        (["--max_steps", "1.5"], "max_steps must be a whole number"),
        (["--name", "x", "--sparsity", "1.5"], "sparsity must lie in"),
        (["stray"], "'stray' on the command line belongs to no setting"),
        (["--prune", "null"], "retune comes after prune"),
        (["--export.delta", "dense"], "prune.mask_update to false"),
        (["--push_to_hub", "true"], "push_to_hub.*export.push_to_hub: OWNER/NAME uploads"),
        (["--export.push_to_hub", "mine"], "push_to_hub 'mine' is not OWNER/NAME"),
        (["--export.push_to_hub", "me/m", "--export.delta", "separate"], "push_to_hub uploads whole models"),
        (["--export.adapter_format", "peft"], "adapter_format 'peft' goes with delta 'separate'"),
        (
            ["--export.adapter_format", "peft", "--export.delta", "separate"],
            r"adapter_format 'peft' writes W \* M \+ D.*prune.mask_update to false",
        ),
        (
            [
                "--export.adapter_format",
                "peft",
                "--export.delta",
                "separate",
                "--prune",
                "{pattern: experts}",
            ],
            "base of adapter_format 'peft' has all experts.*export.delta to 'masked'",
        ),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "no form per phase"),
        (["--parallelism_config", "{sp_size: 2}"], "parallelism_config.*whole sequences"),
        (
            ["--metric_for_best_model", "eval_bleu"],
            "metric_for_best_model 'eval_bleu'.*task 'classification'.*: loss, perplexity, accuracy, macro_f1$",
        ),
        (["--data.labels", '{0: "", 1: " good"}'], "labels must not be empty"),
        (["--auto_find_batch_size"], "auto_find_batch_size is not possible here"),
        (["--data.task", "completion"], "completion goes with task 'completion'"),
        (["--data.dataset", "some/hub"], "name exactly one of dataset"),
        (["--retune.max_steps", "0"], "give max_steps or num_train_epochs above 0"),
        (["--data.labels", "3"], "labels must be a mapping"),
        (
            ["--export.delta", "mask"],
            r"did you mean 'masked'\? valid: masked, dense, separate",
        ),
    ],
)
def test_mistakes_are_named(recipe_file, words, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file, words)


@pytest.mark.parametrize("name", ["loss", "eval_perplexity", "eval_accuracy", "macro_f1"])
def test_the_metrics_of_a_task_may_choose_the_best_checkpoint(recipe_file, name):
    recipe = load_recipe(recipe_file, ["--metric_for_best_model", name])
    assert recipe.training["metric_for_best_model"] == name


def test_bleu_may_choose_where_texts_are_generated(recipe_file):
    words = ["--data.task", "completion", "--data.labels", "{}", "--data.completion", " {ref}"]
    words += ["--metric_for_best_model", "bleu"]
    assert load_recipe(recipe_file, [*words, "--data.generate_samples", "3"]).data.generate_samples == 3
    with pytest.raises(
        ConfigError, match=r"'bleu'.*valid: loss, perplexity; bleu needs data\.generate_samples"
    ):
        load_recipe(recipe_file, words)


def test_missing_section_repeated_key_and_missing_file(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("model: {name: x}\n")
    with pytest.raises(ConfigError, match="'data' is missing"):
        load_recipe(path)
    path.write_text("model: {name: x}\nmodel: {name: y}\n")
    with pytest.raises(ConfigError, match="given twice: model"):
        load_recipe(path)
    with pytest.raises(ConfigError, match=r"is not a file .* not one that is shipped: .*sentiment"):
        load_recipe(tmp_path / "none.yaml")


def test_a_base_is_changed_key_by_key(recipe_file, tmp_path):
    path = tmp_path / "changed.yaml"
    path.write_text(f"base: {recipe_file.name}\ndsee: {{rank: 4}}\nexport: null\n")
    recipe, base = load_recipe(path), load_recipe(recipe_file)
    assert recipe.dsee == dataclasses.replace(base.dsee, rank=4)
    assert recipe.export is None and recipe.training == base.training
    recipe_file.write_text("base: changed.yaml\n")
    with pytest.raises(ConfigError, match="leads back to"):
        load_recipe(path)


def test_shipped_recipes_and_configs_are_found_by_name():
    assert {"sentiment", "sentiment_2_4", "wikitext"} <= set(shipped_names("recipes"))
    assert {"zero2_bf16", "zero3_bf16", "zero3_cpu"} <= set(shipped_names("ds_configs"))
    assert load_recipe("sentiment").training["deepspeed"] == "zero3_cpu"
    with pytest.raises(ConfigError, match=r"DeepSpeed config zero4 is not a file .* zero3_bf16"):
        find_file("ds_configs", "zero4")


def test_paths_are_found_beside_the_recipe_and_take_variables(recipe_file, tmp_path):
    (tmp_path / "train.csv").write_text("text,label\n")
    recipe = load_recipe(recipe_file, ["--model.name", "${CACHE}/m"], {"CACHE": "/somewhere"})
    assert recipe.data.train_file == str(tmp_path / "train.csv")
    assert recipe.model.name == "/somewhere/m"
    assert recipe.data.prompt == "Review: {text}\nSentiment:"


def test_command_line_words():
    assert parse_command_line(["--local_rank=1", "--a-b", "-1", "--c", "1", "x", "--d"]) == [
        ("a_b", -1),
        ("c", [1, "x"]),
        ("d", True),
    ]
    assert parse_value("1e-4") == 1e-4
    assert parse_value("null") is None and parse_value("~") is None
    for text in ("", " ", "\n", "\n\n", "# note", "a #b", "&a", "|"):
        assert parse_value(text) == text
    assert parse_value("!!str 5") == "5"
    assert parse_value("{a: 1}") == {"a": 1}
    assert parse_value(" {ref}") == " {ref}"
    assert parse_value("{mr} ||") == "{mr} ||"
    assert parse_value("a: 1") == {"a": 1}
    assert parse_value("generation: {max_new_tokens: 4}") == {"generation": {"max_new_tokens": 4}}
    assert parse_value('"Review: {text}\\n"') == "Review: {text}\n"


@pytest.mark.parametrize(
    "template",
    [
        "Review: {text}",
        "Review: {text}\nSentiment:",
        "{text}: ",
        "Question: what is {text}?",
        "### Text: {text}",
        "A text\n{text}",
        "Text # {text}",
        "- {text}",
    ],
)
def test_a_template_on_the_command_line_stays_as_it_is(recipe_file, template):
    assert load_recipe(recipe_file, ["--data.prompt", template]).data.prompt == template


def test_every_field_has_its_line_of_documentation():
    import inspect

    from dsee_scale.recipe import sections

    for name, cls in vars(sections).items():
        if dataclasses.is_dataclass(cls) and cls.__module__ == sections.__name__:
            source = inspect.getsource(cls)
            for field in dataclasses.fields(cls):
                after = source.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1]
                assert after.lstrip().startswith('"""'), f"{name}.{field.name}"


def test_training_accepts_exactly_the_trainers_names():
    names = {f.name for f in dataclasses.fields(TrainingArguments) if f.init}
    assert "learning_rate" in names
    data = {"task": "language_modelling", "train_file": "a.txt"}
    with pytest.raises(ConfigError, match="did you mean 'warmup_steps'"):
        build_recipe({"model": {"name": "x"}, "data": data, "training": {"warmup_step": 3}})
    assert DataConfig.from_dict(data).max_length == 512


def test_every_shipped_recipe_loads_and_names_an_existing_deepspeed_config():
    recipes = [
        path for folder in ("recipes", "paper/recipes") for path in sorted((ROOT / folder).glob("*.yaml"))
    ]
    assert {path.stem for path in recipes} >= {"sentiment", "e2e", "wikitext"}
    for path in recipes:
        recipe = load_recipe(path, variables={"DSEE_SCALE_CACHE": "/cache"})
        assert find_file("ds_configs", recipe.training["deepspeed"]).is_file(), path
        assert "$" not in str(recipe.to_dict()), path


def test_help_names_every_key():
    from dsee_scale.recipe.help import recipe_help
    from dsee_scale.recipe.recipe import SECTIONS

    text = recipe_help()
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            assert f"--{section}.{field.name}  " in text
