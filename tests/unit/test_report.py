"""The report shows the run's numbers and needs nothing but itself."""

import json
import re
from html.parser import HTMLParser

import pytest

from dsee_scale.passes.pools import block_matrices
from dsee_scale.training.figures import sparsity_map, zero_shares
from dsee_scale.training.journal import Journal, count_zeros, to_jsonable
from dsee_scale.training.report import (
    card_notes,
    headline_metric,
    phase_table,
    summary_table,
    write_metrics,
    write_report,
)
from tests.models import build, gpt2_config, moe_config

pytestmark = pytest.mark.unit


def journal(**changes):
    phases = [
        {
            "phase": "before",
            "step": 0,
            "quality": {"loss": 5.8, "accuracy": 0.8125},
            "sparsity": 0.0,
            "zeros": 0,
        },
        {
            "phase": "tuned",
            "step": 60,
            "quality": {"loss": 0.3, "accuracy": 0.9},
            "sparsity": 0.0,
            "zeros": 0,
        },
        {
            "phase": "pruned",
            "step": 60,
            "quality": {"loss": 3.0, "accuracy": 0.55},
            "sparsity": 0.5,
            "zeros": 5000,
        },
        {
            "phase": "retuned",
            "step": 90,
            "quality": {"loss": 0.4, "accuracy": 0.8575},
            "sparsity": 0.5,
            "zeros": 5000,
        },
    ]
    for phase in phases:
        phase |= {"seconds": 12.5, "peak_memory_bytes": [2**30, 2**31]}
    run = {
        "model": "folder/some<model>",
        "task": "classification",
        "length": 64,
        "world_size": 2,
        "device": "CPU",
        "dtype": "bfloat16",
        "deepspeed": True,
        "dsee_scale": "0.1.0",
        "trainable_parameters": 1056,
        "parameters": 1987736,
        "trainable_share": 1056 / 1987736,
        "dsee": {"rank": 16},
        "prune": {"sparsity": 0.5},
    }
    values = {
        "run": run,
        "phases": phases,
        "matrices": {
            f"model.layers.{i}.mlp.{k}": [50, 100] for i in range(30) for k in ("up_proj", "down_proj")
        },
        "seconds": {"train": 30.0, "export": 2.0},
        "sizes": {"adapter": 1_500_000, "masks": 40_000, "exported weights": 270_000_000},
    }
    return Journal(**{**values, **changes})


HISTORY = [{"step": s, "loss": 6 / s, "learning_rate": 1e-3 / s, "grad_norm": 1.0} for s in range(5, 95, 5)]


class Checker(HTMLParser):
    """Collects unclosed tags and anything that would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_startendtag(self, tag, attrs):
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def written(folder, found, history=HISTORY):
    write_metrics(folder, found, history)
    return write_report(folder).read_text()


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    page = written(tmp_path, journal())
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert [link for link in checker.fetched if not link.startswith("data:")] == []
    assert "@import" not in page
    assert page.count("<svg") == 4
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S)


def test_the_page_shows_the_numbers(tmp_path):
    page = written(tmp_path, journal())
    for text in (
        "0.812 → 0.858",
        "50.00%",
        "0.053%",
        "1.5 MB",
        "some&lt;model&gt;",
        "1,056 of 1,987,736",
        "0.550",
    ):
        assert text in page, text
    assert "some<model>" not in page


def test_metrics_hold_everything_as_plain_json(tmp_path):
    found = journal()
    found.phases[2]["quality"]["perplexity"] = float("inf")
    write_metrics(tmp_path, found, HISTORY)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert [phase["phase"] for phase in metrics["phases"]] == ["before", "tuned", "pruned", "retuned"]
    assert metrics["phases"][2]["quality"]["perplexity"] is None
    assert metrics["training"][0] == {"step": 5, "loss": 1.2, "learning_rate": 2e-4, "grad_norm": 1.0}
    assert metrics["sizes"]["adapter"] == 1_500_000


@pytest.mark.parametrize("history", [HISTORY[:1], []], ids=["one point", "no loss"])
def test_short_runs_without_pruning_or_files_have_a_page_too(tmp_path, history):
    found = journal(matrices={}, sizes={})
    found.phases = found.phases[:2]
    assert "tuned" in written(tmp_path, found, history)


def test_the_terminal_table_lines_up(tmp_path):
    write_metrics(tmp_path, journal(), HISTORY)
    lines = summary_table(tmp_path).splitlines()[: 2 + 4]
    assert len({len(line) for line in lines}) == 1
    assert "0.858" in lines[-1]


def test_a_phase_that_is_worse_than_the_untouched_model_is_named(tmp_path):
    found = journal()
    page = written(tmp_path, found)
    said = "Worse than before the run: accuracy 0.550 pruned, 0.812 before."
    assert said in summary_table(tmp_path)
    assert said in page
    assert said in card_notes(to_jsonable(found.to_dict()))[0]
    assert "Retuning" not in summary_table(tmp_path), "it won accuracy back"


def test_retuning_that_takes_more_than_it_gives_is_named(tmp_path):
    found = journal()
    found.phases[2]["quality"], found.phases[3]["quality"] = {"loss": 0.31}, {"loss": 0.4}
    for phase in found.phases[:2]:
        del phase["quality"]["accuracy"]
    write_metrics(tmp_path, found, HISTORY)
    assert "Retuning made it worse: loss 0.310 before it, 0.400 after" in summary_table(tmp_path)
    assert "a lower retune.learning_rate" in summary_table(tmp_path)
    assert "Worse" not in summary_table(tmp_path), "a lower loss is better"


def test_a_metric_that_fell_where_the_loss_did_not_says_so(tmp_path):
    found = journal()
    found.phases[2]["quality"] = {"accuracy": 0.9, "loss": 0.326}
    found.phases[3]["quality"] = {"accuracy": 0.892, "loss": 0.242}
    write_metrics(tmp_path, found, HISTORY)
    said = "accuracy 0.900 before it, 0.892 after; but the loss fell from 0.326 to 0.242"
    assert said in summary_table(tmp_path)
    assert "a lower retune.learning_rate" not in summary_table(tmp_path)


def test_the_headline_is_the_tasks_own_metric():
    phases = [{"quality": {"loss": 1.0, "perplexity": 2.7, "bleu": 30.0}}]
    assert headline_metric({"phases": phases}) == "bleu"
    assert headline_metric({"phases": [{"quality": {}}]}) == "loss"


def test_a_perplexity_is_never_shown_without_its_sequence_length(tmp_path):
    found = journal()
    for phase in found.phases:
        phase["quality"] = {"loss": 2.0, "perplexity": 7.4}
    page = written(tmp_path, found)
    shown = [*re.findall(r"perplexity\S*", re.sub("<[^>]*>", " ", page)), *summary_table(tmp_path).split()]
    assert {word for word in shown if "perplexity" in word} == {"perplexity@64"}


def test_a_resumed_run_keeps_earlier_phases_and_adds_times():
    first, second = journal(), Journal(seconds={"train": 1.0})
    second.restore(to_jsonable(first.to_dict()))
    assert second.phase("tuned")["quality"]["accuracy"] == 0.9
    assert second.seconds["train"] == 31.0
    second.add_phase("tuned", quality={}, sparsity=0.0)
    assert [phase["phase"] for phase in second.phases] == ["before", "pruned", "retuned", "tuned"]


@pytest.mark.parametrize(
    ("name", "config", "kinds"),
    [
        ("gpt2", gpt2_config(), {"c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"}),
        (
            "experts",
            moe_config("qwen3_moe"),
            {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
        ),
    ],
)
def test_the_map_of_zeros_shows_every_matrix(name, config, kinds):
    """Also where a block has two of a name, or many experts."""
    model = build(config)
    for index, matrix in enumerate(block_matrices(model, lambda param: param.shape).values()):
        matrix.param.data.view(-1)[matrix.offset :][:index] = 0
    counted = count_zeros(model)
    shares = zero_shares(counted)
    assert kinds == set(shares) and all(len(blocks) == 2 for blocks in shares.values())
    if name == "gpt2":
        for block in range(2):
            for part in ("attn", "mlp"):
                zeros, entries = counted[f"transformer.h.{block}.{part}.c_proj"]
                assert shares[f"{part}.c_proj"][block] == zeros / entries
    else:
        of_block = [counts for key, counts in counted.items() if ".1.mlp.experts" in key and "down" in key]
        assert len(of_block) > 1
        assert shares["down_proj"][1] == sum(z for z, _ in of_block) / sum(n for _, n in of_block)
    assert "mlp.c_proj" in sparsity_map(counted) or name == "experts"


def test_the_memory_of_many_ranks_is_one_range():
    many = journal().to_dict()
    for phase in many["phases"]:
        phase["peak_memory_bytes"] = [2**30 + rank * 2**24 for rank in range(64)]
    few = journal().to_dict()
    few["phases"][0]["peak_memory_bytes"] = [2**30, 2**30 + 1]
    assert phase_table(many).count("1.00 to 1.98 GiB") == 4
    assert "| 1.00 GiB " in phase_table(few) and "1.00 to 2.00 GiB" in phase_table(few)
