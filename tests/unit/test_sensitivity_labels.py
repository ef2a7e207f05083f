"""Which labels the loss is asked at: none across packed documents or at padding, and several classes for one text."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from dsee_scale.errors import CalibrationError
from dsee_scale.partition import open_partition
from dsee_scale.passes.sensitivity import Sensitivity, has_loss
from tests.models import build, gpt2_config, llama_config
from tests.unit.test_calibrate import batches
from tests.unit.test_sensitivity import found, reference

SEQUENCES = [
    torch.randint(3, 97, (length,), generator=torch.Generator().manual_seed(length))
    for length in (9, 14, 6, 11)
]
PAIRS = (SEQUENCES[:2], SEQUENCES[2:])
ALONE = [{"input_ids": each[None]} for each in SEQUENCES]


def assert_alike(values: Sensitivity, expected: Sensitivity) -> None:
    for name, value in expected.outputs.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(values.outputs[name], value, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("config", [llama_config, gpt2_config])
def test_documents_packed_into_a_row_count_as_if_each_were_alone(config):
    """Though transformers looks for them only where no cache is asked for, and models ask for one."""
    packed = [
        {
            "input_ids": torch.cat(pair)[None],
            "position_ids": torch.cat([torch.arange(len(each)) for each in pair])[None],
        }
        for pair in PAIRS
    ]
    model = build(config(use_cache=True)).requires_grad_(False)
    assert_alike(found(model, packed), found(model, ALONE))
    asking = [{**batch, "use_cache": True} for batch in packed]
    assert_alike(found(model, asking), found(model, ALONE))


def padded(pair: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, pair))
    ids = torch.zeros(len(pair), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, each in enumerate(pair):
        at = slice(length - len(each), None) if side == "left" else slice(len(each))
        ids[row, at], mask[row, at] = each, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [None, "of tokens", "of padding too"])
def test_padding_changes_nothing_on_either_side(side, labels):
    """In eager attention a padded query reaches real tokens."""
    model = build(llama_config(attn_implementation="eager")).requires_grad_(False)
    data = [padded(pair, side) for pair in PAIRS]
    for batch in data if labels else ():
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        batch["labels"] = ids if labels == "of padding too" else ids.masked_fill(~mask, -100)
    assert_alike(found(model, data), found(model, ALONE))


def encoder(kind: type[torch.nn.Module], **changes: object) -> torch.nn.Module:
    sizes = dict(
        vocab_size=97, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    return kind(BertConfig(**sizes, max_position_embeddings=16, num_labels=3, **changes)).requires_grad_(
        False
    )


def test_padding_of_a_model_whose_sequence_comes_first_is_left_out():
    """XLNet's layers give (T, B, O); its padding is on the left."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=97, d_model=16, n_layer=2, n_head=2, d_inner=24, num_labels=2, dropout=0.0)
    sizes["initializer_range"] = 0.3  # so that every token says something
    model = XLNetForSequenceClassification(XLNetConfig(**sizes)).requires_grad_(False)
    kinds = [torch.tensor([at % 2]) for at in range(len(SEQUENCES))]
    alone = [{**batch, "labels": kind} for batch, kind in zip(ALONE, kinds, strict=True)]
    together = [padded(pair[::-1], "left") for pair in PAIRS]
    for batch, pair in zip(together, (kinds[1::-1], kinds[:1:-1]), strict=True):
        del batch["position_ids"]
        batch["labels"] = torch.cat(pair)
    assert_alike(found(model, together), found(model, alone))


def test_several_classes_for_one_text_are_labels():
    model, data = (
        encoder(BertForSequenceClassification, problem_type="multi_label_classification"),
        batches(2),
    )
    port = open_partition(model)
    given = [{**batch, "labels": torch.tensor([[1.0, 0, 1], [0, 0, 1]])} for batch in data]
    assert has_loss(model, given, port)
    values, expected = found(model, given), reference(model, given)
    for name, value in values.outputs.items():
        torch.testing.assert_close(value, expected.outputs[name].float(), rtol=1e-4, atol=1e-10)
    with pytest.raises(CalibrationError, match=r"shape \(2, 4\); expected \(2, 12\) or \(2,\) or \(2, 3\)"):
        has_loss(model, [{**data[0], "labels": torch.ones(2, 4)}], port)


def test_labels_of_tokens_are_compared_with_what_the_model_tells_apart():
    model, data = encoder(BertForTokenClassification), batches(1)[0]
    port = open_partition(model)
    labels = torch.full((2, 12), 2)
    assert has_loss(model, [{**data, "labels": labels}], port)
    with pytest.raises(CalibrationError, match=r"go from 7 to 7; expected 0 to 2 \(num_labels\)"):
        has_loss(model, [{**data, "labels": labels + 5}], port)
