"""The quality of a model on validation rows: the same numbers on any number of ranks.

Under ZeRO-3 every rank must run the same number of forward passes. Examples are dealt out in equal batches,
and a rank that runs out repeats an example without counting it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional

from dsee_scale.data.encoding import IGNORED, Choice, Encoder, Generation, pad
from dsee_scale.data.rows import load_rows
from dsee_scale.distributed import gather_objects, rank, world_size
from dsee_scale.errors import ConfigError
from dsee_scale.passes.label_logits import logits_at, predicting, select_logits

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSet:
    """Validation examples as tokens; empty parts are not evaluated."""

    answers: Sequence[tuple[list[int], list[int]]] = ()
    """(input_ids, labels) rows, for loss and perplexity."""
    choices: Sequence[Choice] = ()
    """Classification examples."""
    generations: Sequence[Generation] = ()
    """Prompts to complete."""
    pad_id: int = 0
    """Token that fills short rows; it is masked."""


def load_examples(encoder: Encoder, *, num_generations: int | None = None) -> tuple[Dataset, EvaluationSet]:
    """Local. What a recipe's data section names, as tokens: examples to train on and those to judge by.

    Args:
        encoder: tokenizer and data section.
        num_generations: prompts to complete, of a completion task.

    Raises:
        ConfigError: see `load_rows`; or no example is left.
    """
    train, validation = load_rows(encoder.config)
    examples = encoder.training_examples(train)
    classified = encoder.config.task == "classification"
    found = EvaluationSet(
        answers=() if classified else encoder.evaluation_examples(validation),
        choices=encoder.choices(validation) if classified else (),
        generations=encoder.generations(validation, num_generations) if num_generations else (),
        pad_id=int(encoder.tokenizer.pad_token_id),  # type: ignore[arg-type]
    )
    if not len(examples) or not (found.answers or found.choices):
        raise ConfigError(
            f"the data hold too little text for a single example of task {encoder.config.task!r}"
        )
    return examples, found


@torch.no_grad()
def evaluate(
    model: nn.Module, module: nn.Module, data: EvaluationSet, *, batch_size: int, device: torch.device
) -> Tally:
    """Collective. Count labels, classes and log-likelihoods over all ranks.

    Peak extra memory per rank: one batch's activations and its logits at the label positions.

    Args:
        model: what is called, an engine or the model itself.
        module: the transformers model inside it.
        data: examples, the same on every rank.
        batch_size: examples per rank and forward pass.
        device: where inputs go.
    """
    was_training = model.training
    model.eval()
    tally = Tally()
    for batch, counted in rank_batches(data.answers, batch_size, key=lambda row: len(row[0])):
        rows, labels = [row for row, _ in batch], [found for _, found in batch]
        nll, count = _row_nll(model, module, rows, labels, data.pad_id, device)
        tally.nll += float(nll[:counted].sum())
        tally.num_labels += int(count[:counted].sum())
    for picks, counted in rank_batches(data.choices, batch_size, key=lambda choice: len(choice.prompt)):
        _count_choices(model, module, picks, counted, data.pad_id, device, tally)
    model.train(was_training)
    return sum(gather_objects(tally), Tally())


@torch.no_grad()
def generate_texts(
    module: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    arguments: dict[str, Any],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device,
) -> list[str]:
    """Collective. What the model says after each prompt, in their order, on every rank.

    Under ZeRO-3 transformers keeps ranks in step until the longest text is done (`synced_gpus`).

    Args:
        module: a transformers decoder, not wrapped by an engine.
        tokenizer: its tokenizer.
        prompts: tokens, the same on every rank.
        arguments: of transformers' `generate`; greedy and 64 new tokens where they say nothing.
        pad_id: token that fills short prompts, on the left.
        batch_size: prompts per rank and call.
        device: where inputs go.
    """
    was_training = module.training
    module.eval()
    texts: dict[int, str] = {}
    for batch, counted in rank_batches(list(enumerate(prompts)), batch_size, key=lambda item: len(item[1])):
        rows = [prompt for _, prompt in batch]
        ids = torch.tensor(pad(rows, pad_id, left=True), device=device)
        mask = torch.tensor(pad([[1] * len(row) for row in rows], 0, left=True), device=device)
        settings = {
            "max_new_tokens": 64,
            "do_sample": False,
            "use_cache": True,
            "pad_token_id": pad_id,
        } | arguments
        found = module.generate(input_ids=ids, attention_mask=mask, **settings)  # type: ignore[operator]
        decoded = tokenizer.batch_decode(found[:counted, ids.shape[1] :], skip_special_tokens=True)
        texts |= {index: text.strip() for (index, _), text in zip(batch, decoded, strict=False)}
    module.train(was_training)
    texts = {index: text for part in gather_objects(texts) for index, text in part.items()}
    return [texts[index] for index in range(len(prompts))]


def rank_batches(items: Sequence[T], batch_size: int, key: Any) -> Iterator[tuple[list[T], int]]:
    """This rank's batches and how many of each batch count; every rank gets the same number of batches.

    Examples of similar length share a batch, so that little is padded.
    """
    ordered, world = sorted(items, key=key, reverse=True), world_size()
    for start in range(0, len(ordered), batch_size * world):
        mine = ordered[start + rank() : start + batch_size * world : world]
        yield (mine, len(mine)) if mine else ([ordered[start]], 0)


def add_choices(tally: Tally, choices: Sequence[Choice], nll: Sequence[Sequence[float]]) -> None:
    """Count classification examples, given the negative log-likelihood of each of their label strings."""
    for choice, values in zip(choices, nll, strict=False):
        tally.nll += values[choice.label]
        tally.num_labels += len(choice.answers[choice.label])
        tally.predicted.append(min(range(len(values)), key=values.__getitem__))
        tally.expected.append(choice.label)


def _count_choices(
    model: nn.Module,
    module: nn.Module,
    choices: list[Choice],
    counted: int,
    pad_id: int,
    device: torch.device,
    tally: Tally,
) -> None:
    """Likeliest label strings of one batch; the loss is that of the right string's tokens."""
    if all(len(answer) == 1 for choice in choices for answer in choice.answers):
        # One forward pass serves all label strings: they are read from the same position.
        rows = [choice.prompt + choice.answers[0] for choice in choices]
        labels = [[IGNORED] * len(choice.prompt) + choice.answers[0] for choice in choices]
        log_p = functional.log_softmax(_forward(model, module, rows, labels, pad_id, device)[0], dim=-1)
        answers = torch.tensor([[a[0] for a in choice.answers] for choice in choices], device=device)
        nll = -log_p.gather(1, answers)
    else:
        rows = [choice.prompt + answer for choice in choices for answer in choice.answers]
        labels = [[IGNORED] * len(c.prompt) + answer for c in choices for answer in c.answers]
        nll = _row_nll(model, module, rows, labels, pad_id, device)[0].view(len(choices), -1)
    add_choices(tally, choices[:counted], nll.tolist())


def _row_nll(
    model: nn.Module,
    module: nn.Module,
    rows: list[list[int]],
    labels: list[list[int]],
    pad_id: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and number of labels of each row."""
    chosen, targets, wanted = _forward(model, module, rows, labels, pad_id, device)
    nll = torch.zeros(wanted.shape, device=device)
    nll[wanted] = functional.cross_entropy(chosen, targets, reduction="none")
    return nll.sum(dim=1), wanted.sum(dim=1)


def _forward(
    model: nn.Module,
    module: nn.Module,
    rows: list[list[int]],
    labels: list[list[int]],
    pad_id: int,
    device: torch.device,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where a label follows, these labels, and where they are in the padded batch."""
    ids = torch.tensor(pad(rows, pad_id), device=device)
    mask = torch.tensor(pad([[1] * len(row) for row in rows], 0), device=device)
    known = torch.tensor(pad(labels, IGNORED), device=device)
    wanted = predicting(known)
    with logits_at(module, wanted):
        logits = model(input_ids=ids, attention_mask=mask).logits
    return select_logits(logits, wanted), known[:, 1:][wanted[:, :-1]], wanted


@dataclasses.dataclass
class Tally:
    """What one rank counted in an evaluation; tallies of all ranks add up.

    Attributes:
        nll: sum of the negative log-likelihoods of the labels, in nats.
        num_labels: labels in that sum.
        predicted, expected: classes of the classification examples seen.
        hypotheses, references: generated texts and their references.
    """

    nll: float = 0.0
    num_labels: int = 0
    predicted: list[int] = dataclasses.field(default_factory=list)
    expected: list[int] = dataclasses.field(default_factory=list)
    hypotheses: list[str] = dataclasses.field(default_factory=list)
    references: list[list[str]] = dataclasses.field(default_factory=list)

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(mine + theirs for mine, theirs in zip(_values(self), _values(other), strict=True)))

    def metrics(self) -> dict[str, float]:
        """loss and perplexity; accuracy and macro_f1 for classes; bleu for generated texts."""
        found = {}
        if self.num_labels:
            loss = self.nll / self.num_labels
            found = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        if self.expected:
            found |= class_metrics(self.predicted, self.expected)
        if self.hypotheses:
            found["bleu"] = corpus_bleu(self.hypotheses, self.references)
        return found


def class_metrics(predicted: Sequence[int], expected: Sequence[int]) -> dict[str, float]:
    """Accuracy and the unweighted mean of the classes' F1."""
    try:
        from sklearn.metrics import accuracy_score, f1_score
    except ImportError as error:
        raise ConfigError(
            "classification metrics need scikit-learn: pip install 'dsee_scale[train]'"
        ) from error
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "macro_f1": float(f1_score(expected, predicted, average="macro")),
    }


def corpus_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU (0 to 100) by sacrebleu; each hypothesis may have its own number of references."""
    try:
        import sacrebleu
    except ImportError as error:
        raise ConfigError("BLEU needs sacrebleu: pip install 'dsee_scale[train]'") from error
    most = max(len(found) for found in references)
    streams = [[found[i] if i < len(found) else None for found in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(list(hypotheses), streams).score)  # type: ignore[arg-type]


def _values(tally: Tally) -> list:
    return [getattr(tally, field.name) for field in dataclasses.fields(tally)]
