"""Losses and metrics read from reduced logits equal those of a plain forward pass over everything."""

import math

import pytest
import torch

from dsee_scale.data.encoding import IGNORED, Choice
from dsee_scale.evaluation.evaluate import (
    EvaluationSet,
    Tally,
    class_metrics,
    corpus_bleu,
    evaluate,
    rank_batches,
)
from dsee_scale.passes.label_logits import label_loss, logits_at, predicting, select_logits
from tests.models import build, gpt2_config, llama_config

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    torch.manual_seed(0)
    return build(llama_config() if request.param == "llama" else gpt2_config()).eval()


def random_ids(length, seed):
    return torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def naive_nll(model, prompt, answer):
    """One unpadded sequence, full logits."""
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
    return -sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def test_reduced_logits_give_the_transformers_loss_and_gradients(model):
    ids = torch.tensor([random_ids(9, 0), random_ids(9, 1)])
    labels = ids.clone()
    labels[0, :6] = IGNORED
    labels[1, 2:4] = IGNORED
    labels[1, 0] = IGNORED
    plain = model(input_ids=ids, labels=labels).loss
    expected = torch.autograd.grad(plain, model.get_input_embeddings().weight)[0]
    with logits_at(model, predicting(labels)):
        logits = model(input_ids=ids).logits
    assert logits.shape[:2] == (1, int(predicting(labels).sum()))
    loss = label_loss(logits, labels, None)
    found = torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(found, expected)
    full = model(input_ids=ids).logits
    torch.testing.assert_close(label_loss(full, labels, None), plain)


def test_the_hook_is_gone_afterwards_and_after_errors(model):
    ids = torch.tensor([random_ids(5, 2)])
    wanted = torch.tensor([[False, True, False, False, True]])
    with pytest.raises(RuntimeError, match="stop"), logits_at(model, wanted):
        raise RuntimeError("stop")
    assert model(input_ids=ids).logits.shape[1] == 5


def test_select_logits_reads_full_and_reduced_ones_alike(model):
    ids = torch.tensor([random_ids(5, 3), random_ids(5, 4)])
    wanted = torch.tensor([[False, True, False, False, True], [True, False, False, False, False]])
    with torch.no_grad(), logits_at(model, wanted):
        reduced = model(input_ids=ids).logits
    with torch.no_grad():
        full = model(input_ids=ids).logits
    torch.testing.assert_close(select_logits(reduced, wanted), select_logits(full, wanted))
    everywhere = torch.ones(1, 5, dtype=torch.bool)
    torch.testing.assert_close(select_logits(full[:1], everywhere), full[0])


def test_loss_is_divided_by_the_labels_of_the_whole_step(model):
    ids = torch.tensor([random_ids(6, 5)])
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(label_loss(logits, ids, 20) * 20, label_loss(logits, ids, None) * 5)
    none = torch.full_like(ids, IGNORED)
    assert label_loss(logits, none, None).item() == 0


def test_label_smoothing_is_that_of_the_trainer(model):
    from transformers.trainer_pt_utils import LabelSmoother

    ids = torch.tensor([random_ids(6, 6)])
    output = model(input_ids=ids)
    expected = LabelSmoother(epsilon=0.1)(output, ids, shift_labels=True)
    torch.testing.assert_close(label_loss(output.logits, ids, None, 0.1), expected)


@pytest.mark.parametrize("answers", [[[5], [6], [7]], [[5, 8], [6], [7, 9, 4]]], ids=["one token", "several"])
def test_classification_takes_the_likeliest_label_string(model, answers):
    choices = [Choice(random_ids(3 + i % 4, 10 + i), answers, i % 3) for i in range(11)]
    data = EvaluationSet(choices=choices)
    tally = evaluate(model, model, data, batch_size=4, device=torch.device("cpu"))
    nll = [[naive_nll(model, choice.prompt, answer) for answer in answers] for choice in choices]
    expected_right = sum(
        min(range(3), key=v.__getitem__) == c.label for v, c in zip(nll, choices, strict=True)
    )
    expected_nll = sum(v[c.label] for v, c in zip(nll, choices, strict=True))
    metrics = tally.metrics()
    assert metrics["accuracy"] == pytest.approx(expected_right / 11)
    labels = sum(len(answers[c.label]) for c in choices)
    assert metrics["loss"] == pytest.approx(expected_nll / labels, rel=1e-4)


def test_answer_loss_is_that_of_unpadded_sequences(model):
    rows = []
    for i in range(7):
        prompt, answer = random_ids(2 + i, 30 + i), random_ids(1 + i % 3, 50 + i)
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    data = EvaluationSet(answers=rows)
    metrics = evaluate(model, model, data, batch_size=3, device=torch.device("cpu")).metrics()
    total = sum(naive_nll(model, random_ids(2 + i, 30 + i), random_ids(1 + i % 3, 50 + i)) for i in range(7))
    loss = total / sum(1 + i % 3 for i in range(7))
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    assert model.training is False


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 5, 12])
def test_examples_are_dealt_once_in_equally_many_batches(monkeypatch, world, count):
    import dsee_scale.evaluation.evaluate as module

    seen, batches = [], set()
    for rank in range(world):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(module, "world_size", lambda: world)
        mine = list(rank_batches(list(range(count)), 2, key=lambda item: item))
        batches.add(len(mine))
        assert all(batch for batch, _ in mine)
        seen += [item for batch, counted in mine for item in batch[:counted]]
    assert sorted(seen) == list(range(count))
    assert len(batches) == 1


def test_tallies_add_up():
    a = Tally(nll=2.0, num_labels=2, predicted=[0], expected=[0], hypotheses=["x"], references=[["x"]])
    b = Tally(nll=4.0, num_labels=1, predicted=[1], expected=[0])
    found = (a + b).metrics()
    assert found["loss"] == 2.0
    assert found["accuracy"] == 0.5
    assert Tally().metrics() == {}


def test_class_metrics():
    found = class_metrics([0, 0, 1, 1], [0, 1, 1, 1])
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.8) / 2)


def test_bleu_takes_any_number_of_references_and_is_sacrebleus():
    import sacrebleu

    texts = ["the cat sat on the mat today", "a dog barked at the red car"]
    references = [["the cat sat on a mat today", "the cat is on the mat"], ["a dog barked at the blue car"]]
    expected = sacrebleu.corpus_bleu(texts, [[r[0] for r in references], ["the cat is on the mat", None]])
    assert corpus_bleu(texts, references) == pytest.approx(expected.score)
    assert corpus_bleu(["a b c d e"], [["a b c d e"]]) == pytest.approx(100)
