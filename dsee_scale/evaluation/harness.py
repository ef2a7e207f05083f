"""A folder's quality as the field measures it: tasks of EleutherAI's lm-evaluation-harness (lm-eval)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dsee_scale.checkpoint.adapter import load_adapter
from dsee_scale.checkpoint.adapter_file import KINDS_WITH_ADAPTER
from dsee_scale.checkpoint.files import read_json
from dsee_scale.checkpoint.folder import open_folder, open_if_saved
from dsee_scale.checkpoint.lora_folder import CONFIG_NAME, is_lora_folder
from dsee_scale.checkpoint.record import AdapterRecord
from dsee_scale.data.tokenizer import check_vocabulary, open_tokenizer
from dsee_scale.errors import ConfigError
from dsee_scale.export.export import BASE_FOLDER
from dsee_scale.export.load import load_pretrained
from dsee_scale.export.lora import KIND as LORA
from dsee_scale.export.report import KIND as EXPORT
from dsee_scale.export.writer import ADAPTER_FOLDER

LENGTH = 2048
"""Tokens that a model sees at once at most, as the pruning papers have it."""


@dataclass(frozen=True)
class TaskReport:
    """What lm-eval found; printing it shows lm-eval's table, and the sequence length beside every perplexity.

    Attributes:
        results: task -> metric -> value, as lm-eval names them.
        length: tokens that the model saw at once at most.
        table: lm-eval's own table.
    """

    results: dict[str, dict[str, Any]]
    length: int
    table: str

    def __str__(self) -> str:
        return f"{self.table.rstrip()}\n\nsequence length: {self.length} tokens at most"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "table"}


def evaluate_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    *,
    base: str | None = None,
    length: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    device: torch.device | str | None = None,
) -> TaskReport:
    """Run lm-eval's tasks on an export, on any plain model folder, or on an adapter put onto its base; in one process.

    Args:
        folder: the export, adapter, training checkpoint or LoRA folder.
        tasks: names that lm-eval knows, or YAML files in its format. `!function` in such a file runs code beside it.
        base: hub id or folder of an adapter's base; None takes what the adapter names.
        length: tokens that the model sees at once at most; None is 2048, or the model's own limit below it.
        batch_size: sequences per forward pass.
        limit: documents of each task, its first ones; None takes all.
        device: where the model goes; None is the GPU where there is one.

    Raises:
        ConfigError: lm-eval is missing, knows no such task or cannot run it, or a number is out of its range.
        FormatError: a file is damaged, or does not fit the base.
    """
    for name, value in (("batch size (--batch)", batch_size), ("limit (--limit)", limit)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, found {value}")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            f"evaluation by tasks needs lm-eval ({error}): pip install 'dsee_scale[eval]'"
        ) from error
    manager, paths = _open_tasks(tasks)
    model, tokenizer = load_folder(Path(folder), base)
    size = _length(model.config, length)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    # In bfloat16 a log-probability would be off by up to 2^-8 of its size.
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=size,
        batch_size=batch_size,
        softmax_dtype=torch.float32,
    )
    try:
        found: Any = simple_evaluate(
            harness, tasks=paths, task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=1000
        )
    except Exception as error:  # each task has its own
        bad = [task for task, path in zip(tasks, paths, strict=True) if not _loads(manager, path)]
        if isinstance(error, RuntimeError) and not bad:  # the model's or the device's
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise ConfigError(f"lm-eval cannot run task {' or '.join(bad or tasks)}: {reason}") from error
    return TaskReport(found["results"], size, _table(found, size))


def _open_tasks(tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """lm-eval's task manager, and the tasks as it takes them; task files are read as YAML, nothing is loaded."""
    from lm_eval.tasks import TaskManager

    own = [task for task in tasks if Path(task).suffix in (".yaml", ".yml")]
    missing = [task for task in own if not Path(task).is_file()]
    if missing or not tasks:
        raise ConfigError(f"no task file {missing[0]}" if missing else "name at least one task")
    for task in own:
        _check_file(task)
    # The index of lm-eval's own tasks takes seconds to build.
    manager = TaskManager(include_defaults=len(own) < len(tasks))
    unknown = [task for task in tasks if task not in own and task not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them, or give a YAML file"
        )
    return manager, [str(Path(task).absolute()) if task in own else task for task in tasks]


def _check_file(task: str) -> None:
    try:
        node = yaml.compose(Path(task).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"task file {task} is not valid YAML: {' '.join(str(error).split())}") from error
    keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
    if not any(key in keys for key in ("task", "group", "include")):
        raise ConfigError(
            f"task file {task} names no task; expected a mapping with `task: NAME`, as lm-eval describes tasks"
        )


def _loads(manager: Any, task: str) -> bool:
    try:
        manager.load([task])
    except Exception:  # each task has its own
        return False
    return True


def load_folder(folder: Path, base: str | None = None) -> tuple[Any, Any]:
    """A folder's model as it was trained, update included, and its tokenizer.

    Args:
        folder: an export, a plain model, an adapter, a training checkpoint or a LoRA folder.
        base: hub id or folder of an adapter's base; None takes what the adapter names.

    Raises:
        ConfigError: the base is not known, or is given for a folder that has none.
        FormatError: a file is damaged, or does not fit the base.
    """
    saved = open_if_saved(folder, (EXPORT, LORA, *KINDS_WITH_ADAPTER))
    lora = is_lora_folder(folder) and (saved is None or saved.kind == LORA)
    if not lora and (saved is None or saved.kind == EXPORT):
        if base is not None:
            raise ConfigError(f"{folder} is a complete model: leave out --base")
        model = load_pretrained(folder)
        if (folder / ADAPTER_FOLDER).is_dir():
            load_adapter(model, folder / ADAPTER_FOLDER)
        return model, _tokenizer_of(model, str(folder))
    name = base or _named_base(folder, lora)
    model = _open_base(folder, name)
    load_adapter(model, folder)
    return model, _tokenizer_of(model, name)


def _tokenizer_of(model: Any, name: str) -> Any:
    """The tokenizer in a model's folder; transformers makes one of a single token where there are no files for it."""
    if not model.can_generate():
        raise ConfigError(
            f"{name} holds a {type(model).__name__}; lm-eval's tasks need a causal language model"
        )
    tokenizer = open_tokenizer(name)
    check_vocabulary(tokenizer, model.get_input_embeddings().weight.shape[0], name)
    return tokenizer


def _named_base(folder: Path, lora: bool) -> str:
    if lora:
        beside = folder / BASE_FOLDER
        name = beside if beside.is_dir() else read_json(folder / CONFIG_NAME).get("base_model_name_or_path")
    else:
        name = AdapterRecord.read(open_folder(folder, KINDS_WITH_ADAPTER)).base.get("id")
    if not name:
        raise ConfigError(f"{folder} does not name its base: give its folder or hub id (--base)")
    return str(name)


def _open_base(folder: Path, name: str) -> Any:
    from transformers import AutoModelForCausalLM

    if Path(name).is_dir():
        return load_pretrained(name)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}, the base of {folder}, does not load (--base): {error}") from error


def _length(config: Any, asked: int | None) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or LENGTH
    if asked is None:
        return min(LENGTH, limit)
    if not 2 <= asked <= limit:
        raise ConfigError(f"--length {asked} must lie in [2, {limit}], the model's own limit")
    return asked


def _table(found: dict[str, Any], length: int) -> str:
    """lm-eval's table, with the sequence length in the name of every perplexity."""
    from lm_eval.utils import make_table

    named = {
        task: {_with_length(metric, length): value for metric, value in metrics.items()}
        for task, metrics in found["results"].items()
    }
    return make_table({**found, "results": named})


def _with_length(metric: str, length: int) -> str:
    return metric.replace("perplexity", f"perplexity@{length}", 1)
