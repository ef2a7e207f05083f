"""Conversations: the assistant's turns are learned and nothing else, with and without marks in the template."""

from __future__ import annotations

import json
import re

import pytest

from dsee_scale.data.encoding import IGNORED, Encoder, turns
from dsee_scale.data.rows import load_rows
from dsee_scale.errors import ConfigError
from dsee_scale.recipe.sections import DataConfig
from tests.unit.test_data import ids as words_to_ids
from tests.unit.test_data import tokenizer as plain_tokenizer  # noqa: F401 (a fixture)

PLAIN = (
    "{% for m in messages %}{{ 'Review' if m.role == 'user' else 'Sentiment' }} : {{ m.content }} . {% endfor %}"
    "{% if add_generation_prompt %}Sentiment : {% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'user' %}Review : {{ m.content }} . {% else %}Sentiment : "
    "{% generation %}{{ m.content }} .{% endgeneration %} {% endif %}{% endfor %}"
)
CHANGING = (
    "{% for m in messages %}{{ m.role == 'user' and 'Review' or 'Sentiment' }} : "
    "{{ m.content if loop.last else 'so' }} . {% endfor %}{% if add_generation_prompt %}Sentiment : {% endif %}"
)
TALK = [
    {"role": "user", "content": "a film"},
    {"role": "assistant", "content": "good"},
    {"role": "user", "content": "so bad"},
    {"role": "assistant", "content": "not good"},
]
TEXT = "Review : a film . Sentiment : good . Review : so bad . Sentiment : not good ."
LEARNED = "- - - - - - - good . - - - - - - - not good ."


def encoder(tokenizer, path, template, rows, **changes):
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    tokenizer.chat_template = template
    config = DataConfig(task="chat", train_file=str(path), validation_file=str(path), **changes)
    train, _ = load_rows(config)
    return Encoder(tokenizer, config), train


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistants_turns_are_learned(plain_tokenizer, tmp_path, template):  # noqa: F811
    encode, rows = encoder(plain_tokenizer, tmp_path / "rows.jsonl", template, [TALK, TALK[:2]])
    found = encode.training_examples(rows)
    expected = words_to_ids(TEXT)
    learned = [IGNORED if w == "-" else i for w, i in zip(LEARNED.split(), expected, strict=True)]
    assert found[0]["input_ids"] == expected and found[0]["labels"] == learned
    assert found[1]["input_ids"] == expected[:9] and found[1]["labels"] == learned[:9]
    evaluated = encode.evaluation_examples(rows)
    assert evaluated[:2] == turns(expected, learned) and len(evaluated) == 3
    assert evaluated[1] == (expected, [IGNORED] * 16 + expected[16:])


@pytest.mark.parametrize("template", [PLAIN, "Film . " + PLAIN, MARKED])
def test_a_chat_may_begin_with_the_assistant(plain_tokenizer, tmp_path, template):  # noqa: F811
    encode, rows = encoder(plain_tokenizer, tmp_path / "rows.jsonl", template, [TALK[1:]])
    found = encode.training_examples(rows)[0]
    text = "Sentiment : good . Review : so bad . Sentiment : not good ."
    learned = "- - good . - - - - - - - not good ."
    if template.startswith("Film"):
        text, learned = f"<unk> . {text}", f"- - {learned}"
    assert found["input_ids"] == words_to_ids(text)
    assert [t for t in found["labels"] if t != IGNORED] == words_to_ids(learned.replace("- ", ""))
    assert [t == IGNORED for t in found["labels"]] == [word == "-" for word in learned.split()]


def test_a_chat_whose_first_tokens_are_the_assistants_learns_from_the_second(plain_tokenizer, tmp_path):  # noqa: F811
    bare = "{% for m in messages %}{% generation %}{{ m.content }} {% endgeneration %}{% endfor %}"
    encode, rows = encoder(plain_tokenizer, tmp_path / "rows.jsonl", bare, [TALK[3:]])
    assert encode.training_examples(rows)[0]["labels"] == [IGNORED, *words_to_ids("good")]
    assert encode.evaluation_examples(rows) == [(words_to_ids("not good"), [IGNORED, *words_to_ids("good")])]


def test_a_long_chat_loses_its_end_and_is_left_out_if_nothing_to_learn_stays(
    plain_tokenizer,  # noqa: F811
    tmp_path,
    caplog,
):
    path = tmp_path / "rows.jsonl"
    encode, rows = encoder(plain_tokenizer, path, PLAIN, [TALK, TALK], max_length=8)
    assert [row["input_ids"] for row in encode.training_examples(rows)] == [words_to_ids(TEXT)[:8]] * 2
    assert not caplog.records
    encode, rows = encoder(plain_tokenizer, path, PLAIN, [TALK, TALK], max_length=7)
    assert len(encode.training_examples(rows)) == 0
    assert "2 of 2 conversations are left out: their first 7 tokens (data.max_length)" in caplog.text


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (None, TALK, "has no chat template"),
        (PLAIN, [{"role": "user"}], "column 'messages' in row 1 (counted from 0) is not a conversation"),
        (PLAIN, TALK[:1], "no turn of the role 'assistant'"),
        (CHANGING, TALK, "mark them in the template with {% generation %}"),
        (
            "{{ raise_exception('roles must alternate') }}",
            TALK,
            "refuses this conversation: roles must alternate",
        ),
        (
            PLAIN + "{{ '' if messages[0].content.index('film') }}",
            TALK[2:],
            "row 1 (counted from 0): the chat template re",
        ),
        (
            PLAIN.partition("{% if add")[0],
            TALK[1:],
            "row 1 (counted from 0) begins with the assistant, and the chat",
        ),
    ],
)
def test_what_is_no_chat_is_refused_with_its_row(plain_tokenizer, tmp_path, template, row, message):  # noqa: F811
    first = row if template is None or "raise" in template or template == CHANGING else TALK
    encode, rows = encoder(plain_tokenizer, tmp_path / "rows.jsonl", template, [first, row])
    with pytest.raises(ConfigError, match=re.escape(message)):
        encode.training_examples(rows)


def test_a_prompt_template_does_not_go_with_chat():
    with pytest.raises(ConfigError, match="takes its form from the chat template"):
        DataConfig(task="chat", train_file="x.jsonl", prompt="{text}")
