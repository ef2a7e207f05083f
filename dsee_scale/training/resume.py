"""Which checkpoint a launch goes on from."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dsee_scale.checkpoint.files import open_folder
from dsee_scale.checkpoint.training_state import KIND
from dsee_scale.errors import ConfigError, DSEEError, FormatError
from dsee_scale.training.recipe import Recipe
from dsee_scale.training.together import together

logger = logging.getLogger(__name__)

AUTO = "auto"
"""Value of `resume_from_checkpoint` for launches that are repeated unchanged: resume if there is something."""


def resume_folder(recipe: Recipe, args: TrainingArguments) -> Path | None:
    """Collective. The checkpoint to go on from, or None for a fresh run.

    `true` takes the newest whole checkpoint of the output folder, `auto` the same or none if there is none,
    a path exactly that one. A damaged checkpoint is passed over with a warning.

    Raises:
        ConfigError: the output folder is not empty and nothing is resumed, or there is nothing to resume.
        FormatError: there are checkpoints, and none is whole.
    """
    wanted = recipe.training.get("resume_from_checkpoint")
    output = Path(str(args.output_dir))
    what = "looking at the output folder"
    if wanted and wanted not in (True, AUTO):
        return together(lambda: existing(Path(str(wanted))), what=what)
    found = same_everywhere(together(lambda: newest_first(output), what=what))
    if not wanted:
        together(lambda: _check_empty(output), what=what)
        return None
    problem: DSEEError | None = None
    for folder in found:
        try:
            together(lambda folder=folder: verify_share(folder), what=f"reading {folder}")  # type: ignore[misc]
        except DSEEError as error:
            say("%s cannot be used: %s; trying the one before", folder, error)
            problem = problem or error
        else:
            say("going on from %s", folder)
            return folder
    if problem is not None:
        raise FormatError(f"no checkpoint in {output} is whole; the newest one: {problem}")
    if wanted == AUTO:
        say("%s holds no checkpoint: starting from the beginning", output)
        return None
    raise ConfigError(
        f"nothing to resume: {output} holds no checkpoint-STEP folder (--resume {AUTO} starts afresh then)"
    )


def say(text: str, *values: object) -> None:
    """On one rank: all of them see the same."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        logger.warning(text, *values)


def existing(folder: Path) -> Path:
    """The folder, if there is one. Local."""
    if not folder.is_dir():
        raise ConfigError(f"checkpoint {folder} does not exist")
    return folder


def _check_empty(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        raise ConfigError(
            f"output folder {output} is not empty; choose another training.output_dir, or --resume"
        )


def newest_first(output: Path) -> list[Path]:
    """Checkpoints `checkpoint-STEP` of a run, the last step first; folders with more in their name are not. Local."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {
        int(step): path
        for path in output.glob(f"{prefix}*")
        if path.is_dir() and (step := path.name.removeprefix(prefix)).isdecimal()
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def same_everywhere(folders: list[Path]) -> list[Path]:
    """Collective. What rank 0 sees: file systems may show new folders to others later."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        box = [folders]
        dist.broadcast_object_list(box, src=0)
        return box[0]
    return folders


def verify_share(folder: Path) -> None:
    """Compare the hashes of this rank's share of the files. Local."""
    stored = open_folder(folder, (KIND,))
    several = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    stored.verify(sorted(stored.files), rank=rank, world_size=world_size)
