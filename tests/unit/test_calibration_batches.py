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
from dsee_scale.passes.inputs.watch import Watch
from dsee_scale.passes.pools import block_linears
from tests.models import build, llama_config, moe_config, token_batch
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


@pytest.mark.parametrize("given", [None, 3])
def test_what_cannot_be_iterated_is_named(given):
    with pytest.raises(
        CalibrationError, match=f"calibration is a {type(given).__name__}; expected an iterable of"
    ):
        dsee_scale.calibrate(make("llama"), given)


def test_batches_may_be_given_by_position():
    """As a map-style data set gives them."""

    class Rows:
        def __getitem__(self, index):
            return batches(2)[index]

    assert (
        dsee_scale.calibrate(make("llama"), Rows()).tokens
        == dsee_scale.calibrate(make("llama"), batches(2)).tokens
    )


def chunked(chunk: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=97
    )
    config = BertConfig(max_position_embeddings=16, chunk_size_feed_forward=chunk, **sizes)
    return BertForSequenceClassification(config).requires_grad_(False)


def test_layers_that_are_called_in_chunks_leave_out_their_padding():
    expected, found = (dsee_scale.calibrate(chunked(size), batches()) for size in (0, 4))
    assert found.tokens == expected.tokens and set(found.tokens.values()) == {2 * 4 * 12 - 10}
    for name, squares in expected.squares.items():
        torch.testing.assert_close(found.squares[name], squares)
    labelled = [{**batch, "labels": torch.tensor([0, 1])} for batch in batches()]
    models = chunked(0), chunked(4)
    for model in models:
        dsee_scale.prune(model, PruneConfig(scope="matrix"), labelled)
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("refit", [True, False])
def test_keys_and_values_that_all_heads_share_leave_out_their_padding(refit):
    """DeepSeek-V3's are as wide as one head: (B, 1, T, rank)."""
    model, alone = (build(moe_config("deepseek_v3")).requires_grad_(False) for _ in range(2))
    data = [{**batch, "position_ids": torch.arange(12).expand(2, 12)} for batch in batches(3)]
    rows = [
        {"input_ids": ids[mask.bool()][None]}
        for batch in data
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    found, expected = dsee_scale.calibrate(model, data), dsee_scale.calibrate(alone, rows)
    name = "model.layers.0.self_attn.kv_b_proj"
    assert found.tokens[name] == expected.tokens[name] == 3 * 24 - 6
    torch.testing.assert_close(found.squares[name], expected.squares[name])
    settings = PruneConfig(refit=refit, scope="matrix", modules=("kv_b_proj",))
    for each, given in ((model, data), (alone, rows)):
        dsee_scale.prune(each, settings, given)
    for one, two in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


class Cut(torch.nn.Module):
    """A block whose second layer sees as many positions as it likes."""

    def __init__(self, calls, name):
        super().__init__()
        self.calls, self.name = calls, name
        self.whole, self.part = torch.nn.Linear(8, 8), torch.nn.ModuleDict({name: torch.nn.Linear(8, 8)})

    def forward(self, hidden_states):
        x = self.whole(hidden_states)
        for call in self.calls:
            self.part[self.name](call(x))
        return x


class Reader(torch.nn.Module):
    def __init__(self, *calls, name="cut"):
        super().__init__()
        self.emb, self.layers = torch.nn.Embedding(97, 8), torch.nn.ModuleList([Cut(calls, name)])
        self.requires_grad_(False)

    def forward(self, input_ids, attention_mask=None):
        return self.layers[0](self.emb(input_ids))


KEPT = 2 * 12 - 3
CALLS = {
    "heads": ([lambda x: x.view(2, 12, 2, 4).repeat(1, 1, 1, 2)], 2 * KEPT),
    "beside": ([lambda x: x, lambda x: x[:, :5]], KEPT + 10),
    "beside, first": ([lambda x: x[:1, :7], lambda x: x], KEPT + 7),
    "chunks": ([lambda x: x[:, :7], lambda x: x[:, 7:]], KEPT),
    "of a row": ([lambda x: x[:, 0]], 2),
    "of all rows": ([lambda x: x[:1, :7]], 7),
    "flat": ([lambda x: x.reshape(-1, 8)], KEPT),
    "sequence first": ([lambda x: x.transpose(0, 1)], KEPT),
    "as many": ([lambda x: x.reshape(1, -1, 8)], 24),
    "one head": ([lambda x: x[:, None]], KEPT),
    "few chunks": ([lambda x: x[:, :7]], "(2, 7)"),
    "long chunks": ([lambda x: x[:, :7], lambda x: x[:, :7]], "(2, 7)"),
    "some": ([lambda x: x.reshape(-1, 8)[:17]], "(17,)"),
    "chunks and all": ([lambda x: x[:, :7], lambda x: x], "(2, 7)"),
}


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("case", list(CALLS))
def test_a_mask_that_fits_no_call_of_a_layer_is_refused(case, refit):
    calls, counted = CALLS[case]
    model, data = Reader(*calls), [batches(3)[2]]
    if not isinstance(counted, str):
        assert dsee_scale.calibrate(model, data).tokens["layers.0.part.cut"] == counted
        return
    before = [param.clone() for param in model.parameters()]
    words = f"layers.0.part.cut reads inputs of shape {counted}.* expected .*2, 12.* batches without padding"
    with pytest.raises(CalibrationError, match=words.replace("(", r"\(").replace(")", r"\)")):
        dsee_scale.prune(model, PruneConfig(refit=refit, scope="matrix" if refit else None), data)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    whole = [{"input_ids": batch["input_ids"], "attention_mask": torch.ones(2, 12)} for batch in data]
    dsee_scale.prune(model, PruneConfig(refit=refit, scope="matrix" if refit else None), whole)


def test_experts_that_are_modules_see_single_tokens_and_towers_of_their_own_other_inputs():
    class Expert(Cut):
        def __init__(self):
            super().__init__([], "up")
            self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8)])

        def forward(self, hidden_states):
            x = self.whole(hidden_states)
            self.experts[0](x.reshape(-1, 8)[:17])
            return x

    class Pictures(Reader):
        def __init__(self):
            super().__init__()
            self.layers, self.patches = (
                torch.nn.ModuleList([Expert()]),
                torch.nn.ModuleList([torch.nn.Linear(8, 8)]),
            )

        def forward(self, input_ids, attention_mask=None):
            self.patches[0](torch.ones(2, 9, 8))
            return super().forward(input_ids)

    tokens = dsee_scale.calibrate(Pictures().requires_grad_(False), [batches(3)[2]]).tokens
    assert [tokens[f"layers.0.{name}"] for name in ("whole", "experts.0")] == [KEPT, 17]
    assert tokens["patches.0"] == 18


def test_fused_experts_that_see_some_of_the_tokens_are_told_too():
    """They are handed all tokens with the experts that each goes to."""

    class Sums:
        def add(self, values, kept):
            self.kept = kept

    sums, batch = Sums(), batches(3)[2]
    watch = Watch(lambda *_: None, None)
    for tokens, words in ((24, "None"), (17, r"layers.0.mlp.experts reads inputs of shape (17,)")):
        with watch.batch(batch):
            watch.see("layers.0.q", torch.ones(2, 12, 8))
            watch.see_routed("layers.0.mlp.experts", sums, (torch.ones(tokens, 8),))
        assert words in str(watch.problem)
        assert (
            torch.equal(sums.kept, batch["attention_mask"].bool().view(-1))
            if tokens == 24
            else sums.kept is None
        )


def with_whole_masks(data, kind):
    """The same batches with masks of (batch, 1, queries, keys)."""
    found = []
    for batch in data:
        seen = batch["attention_mask"].bool()[:, None, None, :] & torch.ones(12, 12, dtype=torch.bool).tril()
        if kind == "additive":
            seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        found.append({**batch, "attention_mask": seen})
    return found


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_of_queries_and_keys_leaves_out_keys_that_no_query_sees(kind):
    data = batches()
    expected = dsee_scale.calibrate(make("llama"), data)
    found = dsee_scale.calibrate(make("llama"), with_whole_masks(data, kind))
    assert found.tokens == expected.tokens
    for name, squares in expected.squares.items():
        torch.testing.assert_close(found.squares[name], squares, rtol=1e-4, atol=1e-6)
    shared = [{"input_ids": IDS, "attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()}]
    assert set(dsee_scale.calibrate(make("llama"), shared).tokens.values()) == {24}


FILLED = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
FILLED[:, :, :3] = True  # queries that see nothing, on the left, are often given everything
UNCLEAR = {
    "int64": (FILLED.long(), "int64"),
    "ones and zeros": (FILLED.float(), "values above 0"),
    "three": (torch.ones(2, 12, 12), r"of shape \(2, 12, 12\)"),
    "keys": (torch.ones(2, 1, 12, 9, dtype=torch.bool), r"9 keys, and input_ids are \(2, 12\)"),
    "more rows": (torch.ones(3, 1, 12, 12, dtype=torch.bool), r"3 rows"),
    "filled": (FILLED, "queries that see every key"),
    "a mapping": ({"full_attention": FILLED}, "dict"),
}


@pytest.mark.parametrize("case", list(UNCLEAR))
def test_a_mask_that_does_not_say_which_tokens_are_padding_is_refused(case):
    mask, words = UNCLEAR[case]
    model = make("llama")
    assert words.split("\\")[0] in str(
        problem(model, {"input_ids": IDS, "attention_mask": mask}, open_partition(model))
    )
    for refit in (True, False):
        with pytest.raises(CalibrationError, match=f"attention_mask .*{words}"):
            dsee_scale.prune(model, PruneConfig(refit=refit), [{"input_ids": IDS, "attention_mask": mask}])


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
