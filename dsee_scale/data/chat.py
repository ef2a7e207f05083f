"""Conversations to tokens by the tokenizer's own chat template; only the assistant's turns are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsee_scale.errors import ConfigError

IGNORED = -100
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
        return ids, [token if learned else IGNORED for token, learned in zip(ids, mask, strict=True)]
    ids = _ids(tokenizer, messages, where)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == ROLE:
            before = _ids(tokenizer, messages[:index], where, add_generation_prompt=True)
            after = _ids(tokenizer, messages[: index + 1], where)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise ConfigError(
                    f"{where}: the chat template of {tokenizer.name_or_path!r} writes an assistant's turn otherwise "
                    "once more is said, so its tokens cannot be told apart; mark them in the template with "
                    "{% generation %} ... {% endgeneration %}"
                )
            labels[len(before) : len(after)] = ids[len(before) : len(after)]
    return ids, labels


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
            f"{where} is no conversation; expected a list of {{role: ..., content: ...}}, found {str(messages)[:80]!r}"
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
    except TemplateError as error:
        raise ConfigError(f"{where}: the chat template refuses this conversation: {error}") from error
