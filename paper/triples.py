"""WebNLG's and DART's files as rows of two columns, `triples` and `text`, one row for each reference.

    python -m paper.triples OUT.csv FILE_OR_FOLDER ...

WebNLG comes as XML (a folder of them, or one), DART as JSON. Triples are written one after the other as
`subject : predicate : object | subject : predicate : object`.
"""

from __future__ import annotations

import csv
import json
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsee_scale.errors import ConfigError

COLUMNS = ("triples", "text", "category")
Row = tuple[str, str, str]


def read_triples(sources: Sequence[str | Path]) -> list[Row]:
    """(triples, text, category) of all files, in their order.

    Raises:
        ConfigError: a file that is missing, or is neither WebNLG's XML nor DART's JSON.
    """
    rows: list[Row] = []
    for path in _files(sources):
        try:
            rows += _webnlg(path) if path.suffix.lower() == ".xml" else _dart(path)
        except (ElementTree.ParseError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is neither WebNLG's XML nor DART's JSON: {error!r}") from error
    if not rows:
        raise ConfigError(f"no triples with a text in {', '.join(map(str, sources))}")
    return rows


def write_rows(rows: Iterable[Row], output: str | Path) -> None:
    """Write a CSV file with a header."""
    draft = Path(f"{output}.part")
    draft.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    draft.replace(output)


def _files(sources: Sequence[str | Path]) -> Iterator[Path]:
    for source in map(Path, sources):
        if source.is_dir():
            yield from sorted(source.rglob("*.xml"))
        elif source.is_file():
            yield source
        else:
            raise ConfigError(f"{source} does not exist; expected WebNLG's XML or DART's JSON")


def _webnlg(path: Path) -> Iterator[Row]:
    for entry in ElementTree.parse(path).getroot().iter("entry"):
        found = entry.find("modifiedtripleset")
        triples = [
            (node.text or "").split(" | ") for node in ([] if found is None else found.iter("mtriple"))
        ]
        for lex in entry.iter("lex"):
            # WebNLG 2020 nests further elements; the text is the lex's own or the one inside.
            inner = lex.find("text")
            text = ((lex.text if inner is None else inner.text) or "").strip()
            if triples and text:
                yield linear(triples), text, entry.get("category", "")


def _dart(path: Path) -> Iterator[Row]:
    for item in json.loads(path.read_text(encoding="utf-8")):
        for annotation in item["annotations"]:
            yield linear(item["tripleset"]), annotation["text"].strip(), str(annotation.get("source", ""))


def linear(triples: Iterable[Sequence[Any]]) -> str:
    """Triples as one line."""
    return " | ".join(
        " : ".join(str(part).replace("_", " ").strip() for part in triple) for triple in triples
    )


def main(argv: Sequence[str]) -> int:
    """Convert files; the exit status."""
    if len(argv) < 2:
        sys.stderr.write(f"{__doc__}\n")
        return 2
    rows = read_triples(argv[1:])
    write_rows(rows, argv[0])
    sys.stderr.write(f"{len(rows):,} rows in {argv[0]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
