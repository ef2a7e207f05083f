"""Rows to tokens: blocks of text, prompts with completions or label strings, conversations.

An encoded example is a prompt, of which nothing is learned, and an answer, which is learned. Plain text is an
answer without a prompt.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from dsee_scale.data.chat import chat_example, turns
from dsee_scale.distributed import log_rank0
from dsee_scale.errors import ConfigError
from dsee_scale.passes.label_logits import IGNORED
from dsee_scale.recipe.sections import DataConfig
from dsee_scale.version import __version__

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A prompt with several possible answers, one of them right.

    Attributes:
        prompt: its tokens.
        answers: tokens of each label string, in the order of `DataConfig.labels`.
        label: index of the right one.
    """

    prompt: list[int]
    answers: list[list[int]]
    label: int


@dataclasses.dataclass(frozen=True)
class Generation:
    """A prompt to complete, with every reference that the validation rows have for it."""

    prompt: list[int]
    references: list[str]


class Encoder:
    """A tokenizer together with the data section of a recipe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer {tokenizer.name_or_path!r} has no end-of-text token")
        self.tokenizer = tokenizer
        self.config = config
        self.num_prepended, self.num_appended = _num_around(tokenizer)
        # `datasets` keeps tokens by what an encoder holds, and doesn't see what the package's code does.
        self.version = __version__

    def training_examples(self, rows: Dataset) -> Dataset:
        """Columns `input_ids` and `labels`; labels are -100 where nothing is learned."""
        encode: Callable[..., Any] = self._pairs
        if self.config.task in ("language_modelling", "chat"):
            encode = self._texts if self.config.task == "language_modelling" else self._chats
        workers = self.config.num_workers if self.config.num_workers > 1 else None
        encoded = rows.map(
            encode,
            batched=True,
            with_indices=self.config.task == "chat",
            batch_size=1000,
            remove_columns=rows.column_names,
            num_proc=workers,
            desc="tokenize",
        )
        if len(encoded) < len(rows) and self.config.task == "chat":
            log_rank0(
                logger,
                "%d of %d conversations are left out: their first %d tokens (data.max_length) hold no turn of the "
                "assistant",
                len(rows) - len(encoded),
                len(rows),
                self.config.max_length,
            )
        if self.config.task != "language_modelling":
            return encoded
        # In one process and over all rows: blocks must depend neither on the workers nor on their batches.
        settings = {"rows": encoded, "size": self.config.max_length}
        if next(pack(**settings), None) is None:
            return Dataset.from_dict({"input_ids": [], "labels": []})
        return Dataset.from_generator(pack, gen_kwargs=settings)  # type: ignore[return-value]

    def evaluation_examples(self, rows: Dataset) -> list[tuple[list[int], list[int]]]:
        """Tokens and labels of validation rows; each turn of a chat is an example of its own."""
        encoded = [(row["input_ids"], row["labels"]) for row in self.training_examples(rows)]
        if self.config.task != "chat":
            return encoded
        return [turn for ids, labels in encoded for turn in turns(ids, labels)]

    def choices(self, rows: Dataset) -> list[Choice]:
        """Validation examples of a classification task."""
        classes = [str(key) for key in self.config.labels]
        examples = []
        for row in rows:
            prompt, answers = self._split(row, *self.config.labels.values())
            self._reject_alike(answers)
            right = classes.index(str(row[self.config.label_column]))
            examples.append(Choice(prompt, answers, right))
        return examples

    def _reject_alike(self, answers: Sequence[Sequence[int]]) -> None:
        """Refuse labels of which one begins another: it is at least as probable in every row."""
        strings = list(self.config.labels.values())
        order = sorted(range(len(answers)), key=lambda index: tuple(answers[index]))
        for one, other in itertools.pairwise(order):
            if answers[other][: len(answers[one])] == answers[one]:
                raise ConfigError(
                    f"data.labels: the tokens of {strings[one]!r} begin those of {strings[other]!r} (or what max_length"
                    " leaves of them), so the first would always be the likelier answer; let labels differ before "
                    f"either ends, e.g. {strings[one] + '.'!r} and {strings[other] + '.'!r}"
                )

    def generations(self, rows: Dataset, limit: int) -> list[Generation]:
        """Up to `limit` different prompts of a completion task, with their references."""
        references: dict[str, list[str]] = {}
        for row in rows:
            text = (self.config.prompt or "").format(**row)
            references.setdefault(text, []).append((self.config.completion or "").format(**row).strip())
        chosen = itertools.islice(references.items(), limit)
        room = self.config.max_length
        return [Generation(self._last(self._prompt(text), room), found) for text, found in chosen]

    def answer_text(self, row: dict[str, Any]) -> str:
        """What the model should say after a row's prompt."""
        if self.config.task == "classification":
            return {str(k): v for k, v in self.config.labels.items()}[str(row[self.config.label_column])]
        return (self.config.completion or "").format(**row)

    def _pairs(self, columns: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        names = list(columns)
        encoded = []
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(names, values, strict=True))
            prompt, (answer,) = self._split(row, self.answer_text(row))
            encoded.append((prompt, answer))
        return {
            "input_ids": [prompt + answer for prompt, answer in encoded],
            "labels": [[IGNORED] * len(prompt) + answer for prompt, answer in encoded],
        }

    def _chats(self, columns: dict[str, list[Any]], indices: list[int]) -> dict[str, list[list[int]]]:
        """Conversations, cut at `max_length`; one of which nothing to learn is left is dropped."""
        name, size = self.config.messages_column, self.config.max_length
        found = [
            chat_example(self.tokenizer, messages, f"column {name!r} in row {index} (counted from 0)")
            for index, messages in zip(indices, columns[name], strict=True)
        ]
        cut = [(ids[:size], labels[:size]) for ids, labels in found]
        kept = [(ids, labels) for ids, labels in cut if any(label != IGNORED for label in labels)]
        return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}

    def _texts(self, columns: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        """Tokens of each text with what separates it from the next one."""
        separator, found = self.config.separator, []
        for text in columns[self.config.text_column]:
            if separator is not None:
                found.append(self._ids(text + separator, special=False))
            elif text.strip():
                # A document begins as the tokenizer begins a text: Llama's with <s>.
                found.append(self._ended(self._ids(text, special=True)))
        return {"input_ids": found}

    def _split(self, row: dict[str, Any], *answers: str) -> tuple[list[int], list[list[int]]]:
        """Tokens of a prompt and of answers to it; the prompt loses its beginning where the longest answer needs room.

        Prompt and longest answer have `max_length` tokens together at most.
        """
        text, size = (self.config.prompt or "").format(**row), self.config.max_length
        prompt = self._prompt(text)
        found = [self._answer(text, prompt, answer)[: size - 1] for answer in answers]
        return self._last(prompt, size - max(map(len, found))), found

    def _last(self, prompt: list[int], room: int) -> list[int]:
        """The end of a prompt, after what the tokenizer begins every text with (Llama's `<s>`)."""
        first = prompt[: self.num_prepended] if len(prompt) > room > self.num_prepended else []
        return [*first, *prompt[-(room - len(first)) :]]

    def _prompt(self, text: str) -> list[int]:
        """Tokens of a prompt, at least one: an empty prompt is what begins texts, or else separates them."""
        first = self.tokenizer.bos_token_id
        return self._ids(text, special=True) or [self.tokenizer.eos_token_id if first is None else first]

    def _answer(self, prompt_text: str, prompt: list[int], answer: str) -> list[int]:
        """Tokens of an answer as it follows a prompt; by itself where the tokenizer merges it with the prompt's end."""
        whole = self._ids(prompt_text + answer, special=True)
        joined = whole[: len(prompt)] == prompt
        answer_ids = whole[len(prompt) :] if joined else self._ids(answer, special=False)
        return self._ended(answer_ids) if self.config.task == "completion" else answer_ids

    def _ids(self, text: str, *, special: bool) -> list[int]:
        """Tokens of a text. `special` adds what belongs before a text, never what belongs after it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]  # type: ignore[assignment]
        return ids[: len(ids) - self.num_appended] if special else ids

    def _ended(self, ids: list[int]) -> list[int]:
        """Tokens that end with the end-of-text token, once where the text itself ends with it."""
        end = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [end] else [*ids, end]


def _num_around(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens that the tokenizer puts before and after every text by itself: Llama's `<s>` before, T5's `</s>` after."""
    whole, bare = (list(tokenizer("a", add_special_tokens=s)["input_ids"]) for s in (True, False))  # type: ignore[arg-type]
    starts = [i for i in range(len(whole)) if bare and whole[i : i + len(bare)] == bare]
    return (starts[0], len(whole) - starts[0] - len(bare)) if starts else (0, 0)


def pack(rows: Dataset, size: int) -> Iterator[dict[str, list[int]]]:
    """Texts joined and cut into blocks; a last short block is dropped unless it is the only one.

    Args:
        rows: column `input_ids`, tokens of each text.
        size: tokens of a block.
    """
    stream: list[int] = []
    packed = False
    for row in rows:
        stream += row["input_ids"]  # type: ignore[call-overload, index]
        for start in range(0, len(stream) - size + 1, size):
            packed = True
            yield _block(stream[start : start + size])
        stream = stream[len(stream) // size * size :]
    if not packed and len(stream) > 1:
        yield _block(stream)


def _block(tokens: list[int]) -> dict[str, list[int]]:
    return {"input_ids": tokens, "labels": [IGNORED, *tokens[1:]]}


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> list[list[int]]:
    """Rows of equal length."""
    width = max(len(row) for row in rows)
    gaps = [[value] * (width - len(row)) for row in rows]
    return [[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, gaps, strict=True)]


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Pads on the right, where causal attention never looks, so that positions need no correction."""
    tokenizer = copy.deepcopy(tokenizer)  # the export keeps the side that the tokenizer came with
    tokenizer.padding_side = "right"
    return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
