"""Recipes and flags that make no sense: exit code 2 and one line, whatever is wrong, before anything is loaded."""

from __future__ import annotations

import logging
import signal
import time

import pytest

from dsee_scale.cli import run_recipe
from dsee_scale.config import DSEEConfig
from dsee_scale.errors import ConfigError
from dsee_scale.recipe.recipe import load_recipe

pytestmark = pytest.mark.unit
GOOD = "model: {name: x}\ndata: {task: language_modelling, train_file: a.txt}\n"
ALIASES = "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(12))

FILES = {
    "latin-1": (b"model: {name: caf\xe9}\n", "not UTF-8"),
    "ten thousand deep": (b"a: " + b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
    "bomb": (b"a: &a [1,1,1,1,1,1,1,1,1]\n" + ALIASES.encode(), "more than 20,000 values"),
    "itself": (b"a: &a [*a]\n", "more than 20,000 values"),
    "megabytes": (b"a: 1 #" + b"x" * (1 << 20), "longer than"),
    "code": (b'a: !!python/object/apply:os.system ["touch x"]', "not valid YAML"),
    "nothing": (b"", "holds a NoneType"),
    "zero byte": (b"\0", "not valid YAML"),
    "list": (b"[1]", "holds a list"),
    "base is no text": (b"base: [1]", "cannot be read"),
    "number as key": (GOOD.encode() + b"1: 2", "unknown key 1"),
    "section of nothing": (b"model:\ndata:\n", "section 'model' holds None"),
    "prune of numbers": (GOOD.encode() + b"prune: [1]", "section 'prune' holds 1"),
    "training of numbers": (GOOD.encode() + b"training: [1]", "section 'training' holds"),
}
FLAGS = [
    (["--dsee.alpha", ".nan"], "dsee.alpha is nan"),
    (["--learning_rate", ".inf"], "training.learning_rate is inf"),
    (["--learning_rate", "-1"], "learning_rate must lie in"),
    (["--weight_decay", "-.inf"], "weight_decay is -inf"),
    (["--adam_beta1", "1"], "adam_beta1 must lie in"),
    (["--adam_beta2", ".nan"], "adam_beta2 is nan"),
    (["--adam_epsilon", "0"], "adam_epsilon must lie in"),
    (["--retune.learning_rate", ".inf"], "retune.learning_rate is inf"),
    (["--training.lr_scheduler_kwargs", "{num_cycles: .nan}"], "num_cycles is nan"),
    (["--data.generation", "{temperature: .inf}"], "temperature is inf"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size must lie in"),
    (["--per_device_eval_batch_size", "-1"], "per_device_eval_batch_size must lie in"),
    (["--per_device_train_batch_size", "1.5"], "per_device_train_batch_size must be a whole number"),
    (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must lie in"),
    (["--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps must lie in"),
    (["--seed", "-1"], "seed must lie in"),
    (["--seed", str(2**32)], "seed must lie in"),
    (["--dsee.seed", "1" + "0" * 30], "seed must be a whole number"),
    (["--ddp_timeout", "0"], "ddp_timeout must lie in"),
    (["--ddp_timeout", "-1"], "ddp_timeout must lie in"),
    (["--ddp_timeout", "1" + "0" * 17], "ddp_timeout must lie in"),
    (["--data.num_workers", "0"], "num_workers must be a whole number of at least 1"),
    (["--data.num_workers", "-1"], "num_workers must be a whole number of at least 1"),
    (["--dataloader_num_workers", "-1"], "dataloader_num_workers must lie in"),
    (["--save_steps", "0"], "save_steps must lie in"),
    (["--max_steps", "-2"], "max_steps must lie in"),
    (["--max_grad_norm", "-1"], "max_grad_norm must lie in"),
    (["--optim", "sgdd"], "did you mean 'sgd"),
    (["--optim", "{a: 1}"], "optim must be one of"),
    (["--lr_scheduler_type", "[1]"], "lr_scheduler_type must be one of"),
    (["--deepspeed", "[1]"], "deepspeed must be a mapping or text"),
    (["--dsee.target_modules", "[5]"], "target_modules must be"),
    (["--dsee.target_modules", "(a+)+$"], "may take for ever"),
    (["--dsee.target_modules", "(a|a)*b"], "may take for ever"),
    (["--dsee.target_modules", ".*.*.*.*.*x"], "may take for ever"),
    (["--dsee.target_modules", ".?" * 30 + "Z"], "may take for ever"),
    (["--dsee.target_modules", "(ab|ab)" * 30 + "Z"], "may take for ever"),
    (["--dsee.target_modules", "(.{0,4}){0,4}" * 3 + "Z"], "may take for ever"),
    (["--dsee.target_modules", "x" * 2000], "of 2000 characters"),
    (["--dsee.target_modules", "(" * 500], "is not a regular expression"),
    (["--dsee.output_slices", "{a: 5}"], "output_slices cannot be"),
    (["--dsee.trained_modules", "[[1]]"], "trained_modules must be"),
    (["--prune.pools", "[5]"], "pools cannot be"),
    (["--prune.pattern", "9" * 4500 + ":1"], "is unknown"),
    (["--data.labels", "{a: 1, b: 2}"], "labels must be a mapping"),
    (["--data.labels", "{1: x, '1': y}"], "name a class twice"),
    (["--data.labels", "[0, 1]"], "labels must be a mapping"),
    (["--prune.sparsity", ".nan"], "sparsity is nan"),
    (["--dsee.decomposition.threshold", "-.inf"], "threshold is -inf"),
    (["--data.max_length", "0"], "max_length must be"),
    (["--data.calibration_samples", "-1"], "calibration_samples must be"),
    (["--", "x"], "belongs to no setting"),
    (["--a.b.c", "1"], "unknown key 'a'"),
    (["--learning_rate", "1", "--training.learning_rate", "2"], "training.learning_rate is given twice"),
    (["--dsee.trained_modules", "score"], "trained_modules must be a list of text"),
    (["--prune.modules", "q_proj"], "modules must be a list of text"),
    (
        ["--prune.sparsity", "0.3", "--prune.pools", "[{name: a, sparsity: 0.5}]"],
        "sparsity 0.3 has no effect",
    ),
    (["--prune.pattern", "heads", "--prune.sparsity", "0.3", "--prune.num_per_layer", "2"], "has no effect"),
]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def refused(capsys):
    """Words of `dsee-scale run` -> the one line that it ends with, and nothing for a supervisor to repeat."""
    root, before = logging.getLogger(), signal.getsignal(signal.SIGTERM)
    handlers, level = root.handlers[:], root.level

    def run(*words: str) -> str:
        started = time.process_time()
        code, said = run_recipe(words), capsys.readouterr().err.splitlines()
        assert code == 2 and len(said) == 1 and "ConfigError: " in said[0], said
        assert time.process_time() - started < 5
        return said[0]

    yield run
    root.handlers[:], root.level = handlers, level
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_recipe(recipe, refused, name):
    content, message = FILES[name]
    recipe.write_bytes(content)
    assert message in refused(str(recipe))


@pytest.mark.parametrize(("words", "message"), FLAGS, ids=[" ".join(words)[:50] for words, _ in FLAGS])
def test_a_flag_that_makes_no_sense(recipe, refused, words, message):
    assert message in refused(str(recipe), *words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "holds a list, expected a JSON object"),
        (b"[" * 10_000, "is not valid JSON"),
        (b'{"a": "\xe9"}', "is not valid JSON"),
        (b"{}", "zero_optimization is None, expected a section"),
        (b'{"zero_optimization": {"stage": 0}}', "stage is 0, expected one of 1, 2, 3"),
        (b'{"zero_optimization": {"stage": 9}}', "stage is 9, expected one of 1, 2, 3"),
        (
            b'{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}',
            "zero_quantized_weights is true, expected false",
        ),
        (b'{"zero_optimization": {"stage": 3, "stge": 1}}', "stge"),
        (b'{"zero_optimization": {"stage": 3, "reduce_bucket_size": -1}}', "reduce_bucket_size"),
        (
            b'{"zero_optimization": {"stage": 3}, "gradient_acumulation_steps": 4}',
            "gradient_accumulation_steps",
        ),
    ],
)
def test_a_deepspeed_config_that_is_none(recipe, refused, content, message):
    config = recipe.with_suffix(".json")
    config.write_bytes(content)
    words = ["--deepspeed", str(config), "--output_dir", str(recipe.parent / "run")]
    assert message in refused(str(recipe), *words)


def test_what_people_write_is_still_read(recipe):
    read = load_recipe(
        recipe, ["--output_dir", "2024-01-01", "--seed", "007", "--dsee.target_modules", r".*\.(q|v)_proj"]
    )
    assert read.training["output_dir"] == "2024-01-01"
    words = ["--data.task", "classification", "--data.prompt", "{x}", "--prune.pattern", "2:4"]
    read = load_recipe(recipe, [*words, "--data.labels", "{yes: ' yes', no: ' no'}"])
    assert dict(read.data.labels) == {"yes": " yes", "no": " no"} and read.prune[0].n_of_m == (2, 4)
    assert dict(load_recipe(recipe, [*words, "--data.labels", "{0: a, 1: b}"]).data.labels) == {
        0: "a",
        1: "b",
    }
    recipe.write_text(GOOD + "training: {output_dir: 2024-01-01}\n")
    assert load_recipe(recipe).training["output_dir"] == "2024-01-01"
    recipe.write_text("x: &x {name: x}\nmodel: *x\n" + GOOD.splitlines()[1])
    with pytest.raises(ConfigError, match="unknown key 'x'"):  # and not for its alias
        load_recipe(recipe)


@pytest.mark.parametrize(
    "pattern", [r".*(q|v)_proj", r"model\.layers\.\d+\..*proj", r"(self_attn\.)?q", r"[a-z]+_proj", "a{2,3}"]
)
def test_a_usual_regular_expression_passes(pattern):
    assert DSEEConfig(target_modules=pattern).target_modules == pattern
