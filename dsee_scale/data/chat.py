"""Conversations to tokens, and which of them are learned: the assistant's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsee_scale.errors import ConfigError
from dsee_scale.passes.label_logits import IGNORED

ROLE = "assistant"


def chat_example(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str
) -> tuple[list[int], list[int]]:
    """Tokens of a conversation and their labels, -100 outside of the assistant's turns.

    A template with `{% generation %}` marks the turns itself. Otherwise a turn is what the template adds for
    it after the prompt that asks for it; a template for which that is no continuation is refused.

    Args:
        tokenizer: with a chat template.
        messages: dicts with `role` and `content`.
        where: names the row in errors.

    Raises:
        ConfigError: no template, a malformed conversation, or a template whose turns cannot be told apart.
    """
    _check(tokenizer, messages, where)
    if "generation" in _template(tokenizer) and "{% generation" in _template(tokenizer).replace("{%-", "{%"):
        found = _apply(tokenizer, messages, where, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
        mask[:1] = [0] * len(mask[:1])  # nothing predicts the first token
        return ids, [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]
    ids = _ids(tokenizer, messages, where)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == ROLE:
            before = _asking(tokenizer, messages[: index + 1], where)
            after = _ids(tokenizer, messages[: index + 1], where)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise ConfigError(
                    f"{where}: the chat template of {tokenizer.name_or_path!r} renders an assistant's turn "
                    "differently once another turn follows, so its tokens cannot be found; mark them in the template "
                    "with "
                    "{% generation %} ... {% endgeneration %}"
                )
            labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


def _asking(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str
) -> list[int]:
    """Tokens before the last message, the assistant's: the prompt that asks for it."""
    if len(messages) > 1:
        return _ids(tokenizer, messages[:-1], where, add_generation_prompt=True)
    # No template renders an empty conversation: the end of the prompt is looked for in what comes out with the turn.
    user = [{**messages[0], "role": "user"}]
    end = _ids(tokenizer, user, where, add_generation_prompt=True)[len(_ids(tokenizer, user, where)) :]
    found = _ids(tokenizer, messages, where)
    stops = [stop for stop in range(len(end), len(found)) if found[:stop][-len(end) :] == end]
    if not end or not stops:
        raise ConfigError(
            f"{where} begins with the assistant, and the chat template of {tokenizer.name_or_path!r} doesn't show "
            "where such a turn begins; let the user begin, or mark turns in the template with "
            "{% generation %} ... {% endgeneration %}"
        )
    return found[: stops[0]]


def turns(ids: Sequence[int], labels: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """One example for each stretch of learned tokens, with everything before it as its prompt."""
    found = []
    edges = [i for i in range(len(labels) + 1) if _learned(labels, i - 1) != _learned(labels, i)]
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        found.append((list(ids[:stop]), [IGNORED] * start + list(labels[start:stop])))
    return found


def _learned(labels: Sequence[int], index: int) -> bool:
    return 0 <= index < len(labels) and labels[index] != IGNORED


def _check(tokenizer: PreTrainedTokenizerBase, messages: Any, where: str) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which task 'chat' needs; take an "
            "instruction-tuned model's tokenizer, or put a chat_template.jinja beside it"
        )
    fits = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not fits or not messages:
        raise ConfigError(
            f"{where} is not a conversation; expected a list of "
            f"{{role: ..., content: ...}}, found {str(messages)[:80]!r}"
        )
    if all(message["role"] != ROLE for message in messages):
        raise ConfigError(f"{where} has no turn of the role {ROLE!r}, so there is nothing to learn from it")


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    return str(template.get("default", "") if isinstance(template, dict) else template)


def _ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str, **options: Any
) -> list[int]:
    return list(_apply(tokenizer, messages, where, return_dict=True, **options)["input_ids"])


def _apply(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], where: str, **options: Any
) -> Any:
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=True, **options)
    except (TemplateError, ValueError, IndexError) as error:
        raise ConfigError(f"{where}: the chat template refuses this conversation: {error}") from error
