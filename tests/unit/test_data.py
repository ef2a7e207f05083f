"""Rows are checked before training, and tokens are learned exactly where the recipe says."""

import json

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dsee_scale.data import encoding
from dsee_scale.data.encoding import IGNORED, Encoder
from dsee_scale.data.rows import load_rows, required_columns, template_columns
from dsee_scale.errors import ConfigError
from dsee_scale.recipe.sections import DataConfig

pytestmark = pytest.mark.unit

WORDS = ["<pad>", "<eos>", "<unk>", "Review", "Sentiment", ":", "good", "bad", "not", "film", "a", "so", "."]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make_tokenizer(form="$A"):
    """One of whole words; `form` is what it makes of a text by itself, `$A <eos>` for one."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single=form, special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def ids(text):
    return [WORDS.index(word) for word in text.split()]


def write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def classification(path, **changes):
    values = {
        "task": "classification",
        "train_file": path,
        "prompt": "Review : {text} Sentiment :",
        "labels": {"0": " bad", "1": " good"},
        "validation_fraction": 0.5,
    }
    return DataConfig.from_dict({**values, **changes})


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    rows = [{"text": "a film", "label": "1"}, {"text": "so bad", "label": "0"}]
    paths = [tmp_path / f"rows{ending}" for ending in (".csv", ".tsv", ".json", ".jsonl")]
    paths[0].write_text("text,label\na film,1\nso bad,0\n")
    paths[1].write_text("text\tlabel\na film\t1\nso bad\t0\n")
    paths[2].write_text(json.dumps(rows))
    paths[3].write_text("\n".join(json.dumps(row) for row in rows))
    for path in paths:
        train, _ = load_rows(classification(str(path), validation_file=str(paths[0])))
        assert [(row["text"], str(row["label"])) for row in train] == [("a film", "1"), ("so bad", "0")]


def test_words_that_look_like_missing_values_stay_words(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["NA,1", "null,0", "None,1", "nan,0"])
    train, _ = load_rows(classification(path, validation_file=path))
    assert train["text"] == ["NA", "null", "None", "nan"]


def test_split_and_subset_depend_on_the_seed_alone(tmp_path):
    path = write_csv(tmp_path / "a.csv", [f"film {i},{i % 2}" for i in range(40)])
    config = classification(path, validation_fraction=0.25, max_train_samples=8)
    train, validation = load_rows(config)
    assert (len(train), len(validation)) == (8, 10)
    assert not set(train["text"]) & set(validation["text"])
    assert load_rows(config)[0]["text"] == train["text"]
    assert (
        load_rows(classification(path, validation_fraction=0.25, split_seed=1))[1]["text"]
        != validation["text"]
    )


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (
            "title,label\nx,1\n",
            {},
            r"a\.csv has no column 'text'; columns found: title, label; expected .* label, text",
        ),
        ("text,score\nx,1\n", {}, "has no column 'label'; columns found: text, score"),
        ("text,label\n", {}, "has no rows"),
        ("", {}, "is empty: it has no rows"),
        ("text,label\nx,1\ny,2\n", {}, "column 'label' holds '2', which data.labels does not name"),
        ("text,label\nx,1\n", {"prompt": "{text} {0}"}, "expected column names in braces"),
        ("text,label\nx,1\n", {"prompt": "{text"}, "write {{ for a brace itself"),
        ('text,label\n"x,1\ny', {}, "cannot be read as csv"),
    ],
)
def test_bad_files_are_named_with_what_was_found(tmp_path, content, changes, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_rows(classification(str(path), validation_file=str(path), **changes))


def test_a_home_that_cannot_be_written_is_named_and_not_the_data(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/no/such")
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,1\n")
    with pytest.raises(ConfigError, match=r"the cache of datasets cannot be written.*set HF_HOME"):
        load_rows(classification(str(path), validation_file=str(path)))


def test_missing_file_and_unknown_ending(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.csv does not exist"):
        load_rows(classification(str(tmp_path / "none.csv")))
    (tmp_path / "a.xls").write_text("x")
    with pytest.raises(ConfigError, match=r"ending '\.xls' is unknown; valid: \.csv"):
        load_rows(classification(str(tmp_path / "a.xls")))


def test_a_missing_value_names_its_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": null, "label": 0}\n')
    with pytest.raises(ConfigError, match="column 'text' has no value in row 1"):
        load_rows(classification(str(path), validation_file=str(path)))


def test_columns_come_from_the_templates():
    assert template_columns("a {mr} {{literal}} {ref}") == ["mr", "ref"]
    config = DataConfig(task="completion", train_file="x.csv", prompt="{mr} ->", completion=" {ref}")
    assert required_columns(config) == ["mr", "ref"]


def test_classification_learns_the_label_string_only(tmp_path, tokenizer):
    path = write_csv(tmp_path / "a.csv", ["a good film,1", "not good,0"])
    config = classification(path, validation_file=path)
    encoder = Encoder(tokenizer, config)
    rows, _ = load_rows(config)
    examples = encoder.training_examples(rows)
    prompt = ids("Review : a good film Sentiment :")
    assert examples[0]["input_ids"] == prompt + ids("good")
    assert examples[0]["labels"] == [IGNORED] * len(prompt) + ids("good")
    choices = encoder.choices(rows)
    assert choices[0].prompt == prompt
    assert choices[0].answers == [ids("bad"), ids("good")]
    assert [choice.label for choice in choices] == [1, 0]


def test_long_prompts_lose_their_beginning_and_keep_the_answer(tmp_path, tokenizer):
    path = write_csv(tmp_path / "a.csv", ["so so so so a good film,1", "not good,0"])
    config = classification(path, validation_file=path, max_length=6)
    example = Encoder(tokenizer, config).training_examples(load_rows(config)[0])[0]
    assert example["input_ids"] == ids("a good film Sentiment : good")
    assert example["labels"] == [IGNORED] * 5 + ids("good")


def test_a_long_prompt_keeps_what_the_tokenizer_begins_texts_with(tmp_path):
    path = write_csv(tmp_path / "a.csv", ["so so so so a good film,1", "not good,0"])
    config = classification(path, validation_file=path, max_length=6)
    for form, expected in (("<eos> $A", "<eos> good film Sentiment :"), ("$A", "a good film Sentiment :")):
        encoder, (rows, _) = Encoder(make_tokenizer(form), config), load_rows(config)
        assert encoder.training_examples(rows)[0]["input_ids"] == ids(f"{expected} good")
        assert encoder.choices(rows)[0].prompt == ids(expected)
    assert Encoder(make_tokenizer("<eos> $A"), config).choices(rows)[1].prompt == ids(
        "<eos> not good Sentiment :"
    )


@pytest.mark.parametrize("labels", [{"0": " good", "1": " good film"}, {"0": " bad", "1": " bad "}])
def test_labels_of_which_one_begins_another_are_refused(tmp_path, tokenizer, labels):
    path = write_csv(tmp_path / "a.csv", ["so so,1", "not good,0"])
    config = classification(path, validation_file=path, labels=labels)
    with pytest.raises(ConfigError, match=r"data.labels: the tokens of ' (good|bad)' begin those of"):
        Encoder(tokenizer, config).choices(load_rows(config)[0])
    ended = classification(path, validation_file=path, labels={"0": " good.", "1": " good film."})
    assert len(Encoder(tokenizer, ended).choices(load_rows(ended)[0])) == 2


def test_all_labels_of_a_long_row_are_judged_after_the_same_prompt(tmp_path, tokenizer):
    path = write_csv(tmp_path / "a.csv", ["so so so so a good film,1", "not good,0"])
    labels = {"0": " not so bad", "1": " good"}
    config = classification(path, validation_file=path, max_length=6, labels=labels)
    rows, _ = load_rows(config)
    long, short = Encoder(tokenizer, config).choices(rows)
    assert long.prompt == ids("film Sentiment :") and short.prompt == ids("good Sentiment :")
    assert long.answers == short.answers == [ids("not so bad"), ids("good")]


def test_completion_ends_with_the_end_of_text_token(tmp_path, tokenizer):
    path = write_csv(
        tmp_path / "a.csv", ["film,a good film", "film,so good", "bad,not good"], header="mr,ref"
    )
    config = DataConfig(
        task="completion", train_file=path, validation_file=path, prompt="{mr} :", completion=" {ref}"
    )
    encoder = Encoder(tokenizer, config)
    rows, _ = load_rows(config)
    example = encoder.training_examples(rows)[0]
    assert example["labels"] == [IGNORED] * 2 + ids("a good film <eos>")
    found = encoder.generations(rows, limit=5)
    assert [(g.prompt, g.references) for g in found] == [
        (ids("film :"), ["a good film", "so good"]),
        (ids("bad :"), ["not good"]),
    ]


@pytest.mark.parametrize("bos", [None, "<pad>"])
def test_an_empty_prompt_is_the_token_that_begins_or_else_separates_texts(tmp_path, bos):
    path = write_csv(tmp_path / "a.csv", ['"",good,1', '"",so bad,0'], header="text,ref,label")
    words = make_tokenizer()
    words.bos_token = bos
    first = ids(bos or "<eos>")
    chosen = Encoder(words, classification(path, validation_file=path, prompt="{text}"))
    rows, _ = load_rows(chosen.config)
    assert chosen.training_examples(rows)["input_ids"] == [[*first, *ids("good")], [*first, *ids("bad")]]
    assert [choice.prompt for choice in chosen.choices(rows)] == [first, first]
    told = DataConfig(
        task="completion", train_file=path, validation_file=path, prompt="{text}", completion="{ref}"
    )
    encoder, (rows, _) = Encoder(words, told), load_rows(told)
    assert encoder.training_examples(rows)[1]["input_ids"] == [*first, *ids("so bad <eos>")]
    assert encoder.training_examples(rows)[1]["labels"] == [IGNORED, *ids("so bad <eos>")]
    assert encoder.generations(rows, limit=1)[0].prompt == first


@pytest.mark.parametrize("form", ["$A", "$A <eos>", "<eos> $A", "<eos> $A <eos>"])
def test_an_end_of_text_token_is_the_tokenizers_only_where_the_text_has_none(tmp_path, form):
    path = write_csv(tmp_path / "a.csv", ["film,a good film", "bad <eos>,so bad <eos>"], header="mr,ref")
    config = DataConfig(
        task="completion", train_file=path, validation_file=path, prompt="{mr}", completion=" {ref}"
    )
    encoder = Encoder(make_tokenizer(form), config)
    rows, _ = load_rows(config)
    first = ids("<eos>") if form.startswith("<eos>") else []
    plain, marked = encoder.training_examples(rows)
    assert plain["input_ids"] == [*first, *ids("film a good film <eos>")]
    assert marked["input_ids"] == [*first, *ids("bad <eos> so bad <eos>")]
    assert marked["labels"] == [IGNORED] * len([*first, 0, 0]) + ids("so bad <eos>")
    prompts = [[*first, *ids("film")], [*first, *ids("bad <eos>")]]
    assert [found.prompt for found in encoder.generations(rows, limit=2)] == prompts


def test_plain_text_is_packed_into_full_blocks(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("a good film\nso bad\nnot so good .\n")
    config = DataConfig(
        task="language_modelling", train_file=str(path), validation_file=str(path), max_length=4
    )
    examples = Encoder(tokenizer, config).training_examples(load_rows(config)[0])
    stream = ids("a good film <eos> so bad <eos> not so good . <eos>")
    assert examples["input_ids"] == [stream[0:4], stream[4:8], stream[8:12]]
    assert examples["labels"] == [[IGNORED, *block[1:]] for block in examples["input_ids"]]
    joined = DataConfig.from_dict({**config.to_dict(), "separator": " . "})
    first = Encoder(tokenizer, joined).training_examples(load_rows(joined)[0])["input_ids"][0]
    assert first == ids("a good film .")


def test_blocks_do_not_depend_on_the_number_of_workers(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    words = ["a", "good", "film", "so", "bad"]
    lines = [" ".join(words[: index % 5 + 1]) for index in range(1500)]
    path.write_text("\n".join(lines) + "\n")
    found = []
    for workers in (1, 4):
        config = DataConfig(
            task="language_modelling",
            train_file=str(path),
            validation_file=str(path),
            max_length=50,
            num_workers=workers,
        )
        found.append(Encoder(tokenizer, config).training_examples(load_rows(config)[0])["input_ids"])
    assert found[0] == found[1]
    tokens = sum(len(ids(line + " <eos>")) for line in lines)
    assert len(found[0]) == tokens // 50 > 20


@pytest.mark.parametrize("task", ["language_modelling", "completion"])
def test_another_version_of_the_package_reads_no_tokens_of_this_one(tmp_path, tokenizer, monkeypatch, task):
    path = tmp_path / "a.txt"
    path.write_text(f"a good film {task}\n")
    templates = {} if task == "language_modelling" else {"prompt": "{text}", "completion": " good"}
    config = DataConfig(task=task, train_file=str(path), validation_file=str(path), **templates)

    def cache_files():
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        examples = Encoder(tokenizer, config).training_examples(load_rows(config)[0])
        return [entry["filename"] for entry in examples.cache_files]

    here = cache_files()
    assert here and cache_files() == here
    monkeypatch.setattr(encoding, "__version__", "0.0.0")
    assert not set(here) & set(cache_files())


def test_a_text_of_one_token_gives_no_block(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("so\n")
    config = DataConfig(
        task="language_modelling",
        train_file=str(path),
        validation_file=str(path),
        max_length=64,
        separator="",
    )
    assert len(Encoder(tokenizer, config).training_examples(load_rows(config)[0])) == 0


def test_a_text_shorter_than_a_block_is_one_block(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("so bad\n")
    config = DataConfig(
        task="language_modelling", train_file=str(path), validation_file=str(path), max_length=64
    )
    assert Encoder(tokenizer, config).training_examples(load_rows(config)[0])["input_ids"] == [
        ids("so bad <eos>")
    ]
