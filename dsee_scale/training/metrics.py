"""Quality numbers from what the ranks counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from dsee_scale.errors import ConfigError


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
