"""Calibration batches: what is wrong with one is said, and what blocks are called with stays where asked."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    OPTConfig,
    OPTForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
)

import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.errors import CalibrationError, TargetError
from dsee_scale.partition import open_partition
from dsee_scale.passes.batches import _malloc_trim, named, problem
from dsee_scale.passes.blocks import capture, find_blocks
from dsee_scale.passes.pools import block_linears
from tests.models import build, llama_config, token_batch
from tests.unit.test_calibrate import batches, make

pytestmark = pytest.mark.unit
IDS = token_batch()
BAD = [
    ({"tokens": IDS}, "does not run through the model"),
    ({"input_ids": IDS.float()}, "float32 of shape"),
    ({"input_ids": IDS[0]}, r"shape \(12,\), expected"),
    ({"input_ids": IDS + 90}, "the model knows 0 to 96"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, r"attention_mask is \(2, 5\)"),
    ({"input_ids": IDS[:, :0]}, "empty"),
    ("a text", "found str"),
    (None, "found NoneType"),
    (
        {"input_ids": IDS, "position_ids": torch.ones(7, 12, dtype=torch.int64)},
        r"position_ids are torch.int64 of shape \(7, 12\)",
    ),
]


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(("batch", "words"), BAD, ids=[words for _, words in BAD])
def test_a_batch_that_is_no_input_is_refused_and_nothing_is_removed(batch, words, refit):
    model = make("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=words):
        dsee_scale.prune(model, PruneConfig(refit=refit), [*batches(1), batch])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_arguments_that_a_model_does_not_take_are_named():
    linear = torch.nn.Linear(2, 2)
    assert "Linear takes no x, y" in str(problem(linear, {"x": 1, "y": 2}, open_partition(linear)))
    assert problem(linear, {"input": torch.ones(2), "labels": 1}, open_partition(linear)) is None


def test_what_only_some_models_take_is_told_before_it_runs():
    """Under ZeRO-3 a batch that fails inside the model leaves the other ranks waiting."""
    sizes = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=97
    )
    models = {
        "gpt2": build(GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2, vocab_size=97)),
        "bert": BertModel(BertConfig(max_position_embeddings=16, **sizes)),
        "roberta": RobertaModel(RobertaConfig(max_position_embeddings=18, pad_token_id=1, **sizes)),
        "opt": OPTForCausalLM(
            OPTConfig(max_position_embeddings=16, word_embed_proj_dim=8, ffn_dim=8, **sizes)
        ),
    }
    long = torch.arange(2, 18)[None]
    for model in models.values():
        port = open_partition(model)
        model(input_ids=long)
        assert problem(model, {"input_ids": long, "position_ids": torch.arange(16)}, port) is None
        longer = torch.cat([long, long[:, :1]], dim=1)
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=longer)
        assert "17 tokens long, and the model has positions for 16" in str(
            problem(model, {"input_ids": longer}, port)
        )
        twice = torch.cat([long, long], dim=1)
        packed = {"input_ids": twice, "position_ids": torch.arange(16).repeat(2)[None]}
        model(**packed)
        assert problem(model, packed, port) is None
    port = open_partition(models["bert"])
    for name in ("position_ids", "token_type_ids"):
        found = str(problem(models["bert"], {"input_ids": long, name: torch.full((1, 16), 99)}, port))
        assert f"{name} go from 99 to 99" in found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_tuples_count_as_the_mappings_that_they_stand_for(family):
    """GPT-2 takes a cache between the token ids and the mask."""
    mappings = batches(2)
    between = () if family == "llama" else (None,)
    tuples = [(each["input_ids"], *between, each["attention_mask"]) for each in mappings]
    assert (
        dsee_scale.calibrate(make(family), tuples).tokens
        == dsee_scale.calibrate(make(family), mappings).tokens
    )
    for config in (PruneConfig(sparsity=0.4), PruneConfig(sparsity=0.4, refit=False)):
        models = make(family), make(family)
        for model, data in zip(models, (tuples, mappings), strict=True):
            dsee_scale.prune(model, config, data)
        one, other = (model.state_dict() for model in models)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_tuple_of_more_than_the_model_takes_is_refused_and_nameless_values_stay():
    class Nameless(torch.nn.Linear):
        def forward(self, *args):
            return super().forward(*args)

    linear, nameless = torch.nn.Linear(2, 2), Nameless(2, 2)
    assert named(linear, torch.ones(2)).keys() == {"input"}
    both = (torch.ones(2), torch.ones(2))
    assert problem(linear, named(linear, both), open_partition(linear)) is not None
    assert named(nameless, both) is both
    assert problem(nameless, both, open_partition(nameless)) is None


def test_int32_and_a_number_of_logits_change_nothing_of_what_is_removed():
    """A re-fit's loss needs int64 labels, and the logits of every label."""
    plain = batches(2)
    ids = [{key: value.int() for key, value in each.items()} for each in plain]
    kept = [{**each, "logits_to_keep": 1} for each in plain]
    labelled = [{**each, "labels": each["input_ids"].int()} for each in plain]
    expected = [{**each, "labels": each["input_ids"]} for each in plain]
    for data, wanted in ((ids, plain), (kept, plain), (labelled, expected)):
        states = []
        for one in (data, wanted):
            model = make("llama")
            dsee_scale.prune(model, PruneConfig(sparsity=0.4), one)
            states.append(model.state_dict())
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_int32_labels_of_classes_are_taken():
    sizes = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=97
    )
    config = BertConfig(max_position_embeddings=16, **sizes)
    model = BertForSequenceClassification(config).requires_grad_(False)
    dsee_scale.prune(model, PruneConfig(), [{"input_ids": IDS, "labels": torch.zeros(2, dtype=torch.int32)}])


def test_explicit_positions_go_as_far_as_their_embedding_and_an_encoder_of_sound_sets_no_limit():
    sizes = dict(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=97
    )
    roberta = RobertaModel(RobertaConfig(max_position_embeddings=18, pad_token_id=1, **sizes))
    port, ids = open_partition(roberta), torch.arange(2, 18)[None]
    positions = torch.arange(2, 18)[None]
    roberta(input_ids=ids, position_ids=positions)
    assert problem(roberta, {"input_ids": ids, "position_ids": positions}, port) is None
    assert "go from 3 to 18" in str(problem(roberta, {"input_ids": ids, "position_ids": positions + 1}, port))

    sound = dict(d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8)
    config = Qwen2AudioConfig(
        audio_config=dict(num_mel_bins=8, max_source_positions=8, **sound),
        text_config=dict(model_type="qwen2", num_key_value_heads=2, **sizes),
        audio_token_index=90,
    )
    audio = Qwen2AudioForConditionalGeneration(config)
    assert problem(audio, {"input_ids": ids}, open_partition(audio)) is None


def test_a_loader_that_fails_is_a_calibration_error():
    def loader():
        yield batches(1)[0]
        raise OSError("the disk is gone")

    with pytest.raises(CalibrationError, match="cannot be read: OSError: the disk is gone"):
        dsee_scale.calibrate(make("llama"), loader())


def test_none_among_the_batches_does_not_end_them():
    one, two = batches(2)
    with pytest.raises(CalibrationError, match="tensor of token ids, found NoneType"):
        dsee_scale.calibrate(make("llama"), [one, None, two])


def tensors_of(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def test_all_that_blocks_are_called_with_is_kept_where_the_inputs_are():
    """In storage, and what all blocks share, such as the mask, once."""
    model = build(llama_config())
    found = find_blocks(model, list(block_linears(model)))
    calls = capture(model, found, batches(2), open_partition(model), torch.device("meta"))
    masks = 0
    for call in calls:
        assert call.hidden.is_meta
        tensors = [tensors_of([args, kwargs]) for args, kwargs in call.arguments]
        assert all(each.is_meta for one in tensors for each in one)
        assert len({tuple(map(id, one)) for one in tensors}) == 1
        masks += any(each.dim() == 4 for each in tensors[0])
    assert masks == 2


@pytest.mark.parametrize("refit", [True, False])
def test_an_encoder_with_a_decoder_is_refused(refit):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(
        vocab_size=97, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(T5Config(**sizes)).requires_grad_(False)
    calls = [lambda: dsee_scale.prune(model, PruneConfig(refit=refit, modules=("decoder*",)), batches(1))]
    calls += [lambda: dsee_scale.calibrate(model, batches(1))]
    for call in calls:
        with pytest.raises(TargetError, match=r"encoder with a decoder.*score='W'"):
            call()


GROWTH = """
import psutil, torch
import dsee_scale
from dsee_scale import PruneConfig
from dsee_scale.passes import batches
from tests.models import build, llama_config

torch.set_num_threads(1)
TRIM
sizes = dict(vocab_size=2000, hidden_size=128, intermediate_size=256, num_hidden_layers=4, max_position_embeddings=256)
sizes |= dict(num_attention_heads=16, num_key_value_heads=16)
model = build(llama_config(**sizes))
data = [{"input_ids": torch.randint(0, 2000, (8, length))} for length in range(32, 160, 8)]
dsee_scale.prune(model, PruneConfig(sparsity=0.2), data[:1])
before = psutil.Process().memory_info().rss
dsee_scale.prune(model, PruneConfig(sparsity=0.5), data)
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the activations would be the GPU's")
@pytest.mark.skipif(_malloc_trim() is None, reason="another C library")
def test_freed_memory_of_many_shapes_goes_back_to_the_system():
    """Each shape would leave holes in the C library's heap."""

    def growth(change: str) -> int:
        script = GROWTH.replace("TRIM", change)
        found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        return int(found.stdout.split()[-1])

    assert growth("") < growth("batches._malloc_trim = lambda: None") / 3
