"""Settings reject what makes no sense, and say what to do."""

from __future__ import annotations

import dataclasses

import pytest

from dsee_scale import ConfigError, DSEEConfig, Pool, PruneConfig
from dsee_scale.config import DecompositionConfig, paper_pools


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank must be"),
        ({"rank": True}, "rank must be"),
        ({"alpha": -1}, "alpha must be"),
        ({"num_sparse": -1}, "or None or 0 for LoRA alone"),
        ({"num_sparse": -3}, "num_sparse must be"),
        ({"num_sparse": True}, "num_sparse must be"),
        ({"num_sparse": 1.5}, "num_sparse must be"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"target_modules": "q_proj("}, "not a regular expression"),
        ({"support": "grebsmoo"}, "did you mean 'grebsmo'"),
        ({"dropout": 1.0}, "dropout must"),
        ({"seed": -1}, "seed must"),
        ({"decomposition": {"rnak": 3}}, "did you mean 'rank'"),
    ],
)
def test_dsee_config_rejects(settings, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        DSEEConfig.from_dict(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, r"\[0, 1\)"),
        ({"sparsity": -0.1}, r"\[0, 1\)"),
        ({"score": "WSB"}, "did you mean"),
        ({"pattern": "striped"}, "pattern 'striped' is unknown"),
        ({"scope": "column"}, "scope 'column' is unknown"),
        ({"pools": [{"name": "a", "sparsity": 0.1}, {"name": "a", "sparsity": 0.1}]}, "different names"),
        ({"pools": [{"name": "a", "sparsity": 2}]}, r"\[0, 1\)"),
        ({"sparsty": 0.5}, "did you mean 'sparsity'"),
    ],
)
def test_prune_config_rejects(settings, words):
    with pytest.raises(ConfigError, match=words):
        PruneConfig.from_dict(settings)


def test_mistakes_are_reported_together():
    with pytest.raises(ConfigError, match=r"rank must.*alpha must.*dropout must"):
        DSEEConfig(rank=0, alpha=0, dropout=2)


def test_configs_survive_json(tmp_path):
    config = DSEEConfig(
        rank=4,
        num_sparse=0.01,
        target_modules=("c_attn",),
        output_slices={"c_attn": ("q", "v")},
        decomposition=DecompositionConfig(preset="reference"),
    )
    config.save(tmp_path / "dsee.json")
    assert DSEEConfig.load(tmp_path / "dsee.json") == config
    prune = PruneConfig(score="ABS", pools=paper_pools(0.2, 0.3))
    prune.save(tmp_path / "prune.json")
    assert PruneConfig.load(tmp_path / "prune.json") == prune
    assert isinstance(PruneConfig.load(tmp_path / "prune.json").pools[0], Pool)


def test_damaged_json_names_the_file(tmp_path):
    (tmp_path / "dsee.json").write_text("{")
    with pytest.raises(ConfigError, match=r"dsee\.json is not valid JSON"):
        DSEEConfig.load(tmp_path / "dsee.json")


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DSEEConfig().rank = 3
