"""MkDocs hook: pages that exist elsewhere or in the code, so that nothing is written twice.

The README and its like become pages, links between files become links between pages, and the references of recipe
keys and commands are made from the lines under the fields and from `--help`.
"""

from __future__ import annotations

import dataclasses
import posixpath
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
COPIES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "guides/launch.md": "launch/README.md",
    "guides/deepspeed_configs.md": "ds_configs/README.md",
}
FIELDS = "dsee_scale/recipe/sections.py"
"""What the recipe's page is made of; links to it lead to that page, so that they work in the repository too."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the security page into the navigation where the repository has one."""
    if (ROOT / "SECURITY.md").is_file() and config.nav:
        config.nav[-1]["Project"].append({"Security": "security.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    made = {page: (ROOT / source).read_text() for page, source in COPIES.items() if (ROOT / source).is_file()}
    made |= {"reference/recipe.md": recipe_page(), "reference/cli.md": cli_page()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at pages of the site; a link to a file that is no page becomes plain text."""
    at = page.file.src_uri
    source = COPIES.get(at, f"docs/{at}")
    return LINK.sub(lambda match: relinked(match, source, at), markdown)


def relinked(match: re.Match[str], source: str, at: str) -> str:
    """One Markdown link of the file `source`, which is shown as the page `at`."""
    image, text, target, anchor = match.groups()
    if "://" in target or target.startswith("mailto:"):
        return match[0]
    named = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    pages = {path: name for name, path in COPIES.items()} | {FIELDS: "reference/recipe.md"}
    if named in pages or named.startswith("docs/"):
        found = pages.get(named, named.removeprefix("docs/"))
        return f"{image}[{text}]({posixpath.relpath(found, posixpath.dirname(at) or '.')}{anchor or ''})"
    return text if (ROOT / named).exists() else match[0]


def recipe_page() -> str:
    """Every section of a recipe as a table, from the code."""
    from dsee_scale.config import DecompositionConfig, Pool
    from dsee_scale.recipe.recipe import SECTIONS

    parts = [
        "# Recipe",
        "A recipe is one YAML file. Every key can be set on the command line as well: `--dsee.rank 8`, or "
        "`--rank 8` where the name is unambiguous. Section `training` takes transformers' [TrainingArguments]"
        "(https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments) under "
        "their own names, `base` names another recipe that this one changes, and `prune` is one section or a "
        "list of them. This page is made from the code.",
    ]
    sections = {f"`{name}`": cls for name, cls in SECTIONS.items()}
    sections |= {"`dsee.decomposition`": DecompositionConfig, "`prune.pools`, each": Pool}
    for title, cls in sections.items():
        summary = (cls.__doc__ or "").strip().splitlines()[0]
        parts += [f"## {title}", summary, table_of(cls)]
    return "\n\n".join(parts) + "\n"


def table_of(cls: Any) -> str:
    """Key, type, default and documentation of each field."""
    from dsee_scale.recipe.help import field_lines

    lines, hints = field_lines(cls), get_type_hints(cls)
    rows = ["| key | type | default | |", "| --- | --- | --- | --- |"]
    for field in dataclasses.fields(cls):
        cells = (f"`{field.name}`", type_text(hints[field.name]), default_text(field), lines[field.name])
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def type_text(hint: Any) -> str:
    """A type as a reader of YAML knows it."""
    if hint is type(None):
        return "null"
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        return ", ".join(f"`{option}`" for option in options)
    origin = getattr(hint, "__origin__", None)
    if origin is not None and getattr(origin, "__name__", "") in ("tuple", "list", "Mapping", "dict"):
        return "list" if origin.__name__ in ("tuple", "list") else "mapping"
    if options:
        return ", ".join(dict.fromkeys(type_text(option) for option in options))
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(hint, "__name__", ""), getattr(hint, "__name__", str(hint))
    )


def default_text(field: dataclasses.Field[Any]) -> str:
    """A default as YAML has it."""
    if field.default is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
        return "see below" if dataclasses.is_dataclass(value) else "empty"
    value = field.default
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower().replace('none', 'null')}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`" if value else "empty"
    return f"`{value}`"


def cli_page() -> str:
    """What each command's --help prints."""
    import contextlib
    import io

    from dsee_scale.cli import RUN_HELP, _parser
    from dsee_scale.recipe.parsing import shipped_names

    parts = [
        "# Command line",
        "`dsee-scale COMMAND`, or `python -m dsee_scale COMMAND`. This page is what `--help` prints.",
    ]
    names, configs = shipped_names("recipes"), shipped_names("ds_configs")
    run = RUN_HELP.format(names=", ".join(names), configs=", ".join(configs))
    parts += ["## dsee-scale run", f"```text\n{run}```", "All keys: [Recipe](recipe.md)."]
    (commands,) = (a for a in _parser()._actions if hasattr(a, "choices") and isinstance(a.choices, dict))
    for name, command in commands.choices.items():
        if name == "run":
            continue
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            command.print_help()
        parts += [f"## dsee-scale {name}", f"```text\n{text.getvalue()}```"]
    return "\n\n".join(parts) + "\n"
