"""How a run ends early: by SIGTERM, when a rank is lost, or when the loss is NaN.

Each time every rank leaves soon, with an error that says what to do, and the last checkpoint is intact.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dsee_scale.checkpoint.contents import check_output
from dsee_scale.checkpoint.folder import open_folder
from dsee_scale.checkpoint.training_state import KIND
from dsee_scale.distributed import (
    from_rank0,
    is_active,
    log_rank0,
    max_over_ranks,
    raise_on_all_ranks,
    rank,
    world_size,
)
from dsee_scale.errors import ConfigError, DSEEError, FormatError, RunError, RunStoppedError
from dsee_scale.partition import open_partition, unwrap
from dsee_scale.recipe.recipe import Recipe
from dsee_scale.sigterm import expect_it_again
from dsee_scale.training.journal import Journal
from dsee_scale.training.start import check_fresh

if TYPE_CHECKING:
    from dsee_scale.training.timeline import Timeline

logger = logging.getLogger(__name__)

LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|timeout", re.IGNORECASE)
"""What messages of failed collectives hold; PyTorch raises many of them as plain RuntimeError."""
DEFAULT_TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")
"""Of torch.distributed.distributed_c10d, read whenever a group is made."""
RESUME = "relaunch with --resume to go on from the last checkpoint, on as many ranks as there are"


class RunWatch(TrainerCallback):
    """Ends training in good order.

    After each optimizer step the ranks agree in one message of two numbers: whether the loss was a number
    everywhere, and whether any rank was told to stop. Put it before callbacks that change the model.
    """

    def __init__(self, timeline: Timeline, journal: Journal) -> None:
        self._timeline, self._journal = timeline, journal
        self._told_to_stop = self.stopping = False
        self._is_number: Tensor | None = None

    def saw(self, loss: Tensor) -> None:
        """Take note of one micro-batch's loss; no waiting for the device."""
        number = torch.isfinite(loss.detach()).all()
        self._is_number = number if self._is_number is None else self._is_number & number

    @contextlib.contextmanager
    def obeying_sigterm(self) -> Iterator[None]:
        """Within the block SIGTERM means: save after the step, and leave. One long after the first ends at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._note_signal)
        try:
            yield
        finally:
            if not self.stopping:  # else a launcher may still pass it on
                signal.signal(signal.SIGTERM, before)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Note where the run is, for messages."""
        step = state.global_step
        self._journal.started = True
        self._journal.doing = f"{self._timeline.phase_at(step).name}, step {step + 1}"

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Collective. Raise if a loss was NaN or infinite; ask for a checkpoint if a rank was told to stop."""
        is_number = True if self._is_number is None else bool(self._is_number)
        self._is_number = None
        bad, stop = max_over_ranks(
            0 if is_number else rank() + 1, int(self._told_to_stop), device=args.device
        )
        if bad:
            last = state.global_step - 1
            raise RunError(
                f"the loss of step {state.global_step} on rank {bad - 1} is not a finite number; nothing was "
                f"saved of this step, checkpoints up to step {last} are intact. Lower "
                "training.learning_rate or training.max_grad_norm, look at the data, and relaunch with --resume "
                "(with --resume FOLDER from an earlier checkpoint if the last one is past saving)"
            )
        if stop:
            self.stopping = control.should_save = True

    def leave_if_told(self, state: TrainerState) -> None:
        """Leave once the checkpoint that SIGTERM asked for is there."""
        if self.stopping:
            raise RunStoppedError(
                f"stopped by SIGTERM; saved at step {state.global_step} of {state.max_steps}: {RESUME}"
            )

    def _note_signal(self, number: int, frame: Any) -> None:
        self._told_to_stop = True
        expect_it_again()


@torch.no_grad()
def check_trained_values(model: nn.Module) -> None:
    """Collective. A NaN gradient leaves a finite loss, and parameters that must not be saved.

    Raises:
        RunError: on every rank, naming the first parameter with a value that is not finite.
    """
    partition = open_partition(model)
    with raise_on_all_ranks(partition):
        for name, param in unwrap(model).named_parameters():
            if param.requires_grad and not partition.shard(param).data.isfinite().all():
                raise RunError(
                    f"{name} holds values that are not finite, so nothing was saved; earlier checkpoints are "
                    "intact: lower training.learning_rate, and relaunch with --resume"
                )


@contextlib.contextmanager
def limited_waiting(seconds: float) -> Iterator[None]:
    """How long a collective may wait for the slowest rank, in process groups that exist and those made inside. Local.

    DeepSpeed makes its groups without naming a timeout, and making one waits for all ranks, so PyTorch's defaults
    are set besides.
    """
    if not is_active():
        yield
        return
    world, limit = dist.distributed_c10d, timedelta(seconds=seconds)
    before = {name: getattr(world, name) for name in DEFAULT_TIMEOUTS}
    for name in DEFAULT_TIMEOUTS:
        setattr(world, name, limit)
    for group in list(world._world.pg_map):
        if dist.get_backend(group) in ("gloo", "nccl"):
            world._set_pg_timeout(limit, group)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(world, name, value)


@contextlib.contextmanager
def report_lost_rank(journal: Journal, seconds: float, resume: str = RESUME) -> Iterator[None]:
    """A collective that fails inside raises an error that names this rank and what it was doing.

    Args:
        journal: knows what the run is doing.
        seconds: the limit on waiting; shortly before it, a rank that still waits says where.
        resume: how to go on, for the message.
    """
    over = threading.Event()
    reporter = threading.Thread(target=_report_waiting, args=(journal, seconds, over), daemon=True)
    waits = world_size() > 1
    if waits:
        reporter.start()
    try:
        yield
    except DSEEError:
        raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        first = re.sub(r"^\[[^\]]*\] ", "", str(error).strip().splitlines()[0])[:120]
        raise RunStoppedError(
            f"rank {rank()} lost another rank during {journal.doing!r}: {first}. If no other rank says why, "
            f"its machine is gone or it was too slow for ddp_timeout ({seconds:g} s); {resume}"
        ) from error
    finally:
        over.set()
        if waits:
            reporter.join()  # a thread that wakes while the interpreter ends aborts the process


def _report_waiting(journal: Journal, seconds: float, over: threading.Event) -> None:
    """With NCCL the process is aborted at the limit, and this is the only word about the phase."""
    doing, since, said = journal.doing, time.monotonic(), False
    while not over.wait(min(seconds / 20, 10)):
        if journal.doing != doing:
            doing, since, said = journal.doing, time.monotonic(), False
        elif not said and time.monotonic() - since > 0.8 * seconds:
            said = True
            waited = time.monotonic() - since
            logger.warning(
                "rank %d has been at %r for %.0f s; a collective that waits for ddp_timeout (%g s) fails",
                rank(),
                doing,
                waited,
                seconds,
            )


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
        with raise_on_all_ranks(what=what):
            return existing(Path(str(wanted)))
    with raise_on_all_ranks(what=what):
        found = newest_first(output)
        if not wanted:
            check_fresh(output)
    if not wanted:
        return None
    found = from_rank0(found)  # file systems may show new folders to other ranks later
    problem: DSEEError | None = None
    for folder in found:
        try:
            with raise_on_all_ranks(what=f"reading {folder}"):
                verify_share(folder)
        except DSEEError as error:
            log_rank0(logger, "%s cannot be used: %s; trying the one before", folder, error)
            problem = problem or error
        else:
            log_rank0(logger, "going on from %s", folder)
            return folder
    if problem is not None:
        raise FormatError(f"no checkpoint in {output} is complete; the newest one: {problem}")
    if wanted == AUTO:
        log_rank0(logger, "%s holds no checkpoint: starting from the beginning", output)
        return None
    raise ConfigError(
        f"nothing to resume: {output} holds no checkpoint-STEP folder (--resume {AUTO} starts afresh then)"
    )


def existing(folder: Path) -> Path:
    """The folder, if there is one. Local."""
    if not folder.is_dir():
        raise ConfigError(f"checkpoint {folder} does not exist")
    return folder


def newest_first(output: Path) -> list[Path]:
    """Checkpoints `checkpoint-STEP` of a run, the last step first; folders with more in their name are not. Local."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {
        int(step): path
        for path in output.glob(f"{prefix}*")
        if path.is_dir() and (step := path.name.removeprefix(prefix)).isdecimal()
    }
    return [steps[step] for step in sorted(steps, reverse=True)]


def step_of(checkpoint: Path) -> int:
    """The step in the name of one that `newest_first` found. Local."""
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


def set_aside_later(output: Path, step: int, resumed: Path) -> None:
    """Collective. Rename the checkpoints after `step`: the run goes on from an older one, and they aren't its own.

    Left there, they would be taken for its newest ones. None is deleted.

    Args:
        output: the run's folder.
        step: where the run goes on.
        resumed: the checkpoint that it goes on from, which keeps its name.

    Raises:
        ConfigError: one cannot be renamed.
    """
    with raise_on_all_ranks(what=f"renaming the checkpoints in {output} after step {step}"):
        later = [each for each in newest_first(output) if step_of(each) > step] if rank() == 0 else []
        for folder in later:
            if folder.samefile(resumed):
                continue
            ends = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
            names = (folder.with_name(f"abandoned-{folder.name}{end}") for end in ends)
            target = next(path for path in names if not path.exists())
            folder.rename(target)
            logger.warning(
                "%s is now called %s: this run goes on from step %d, by %s; delete it if it is not needed",
                folder,
                target.name,
                step,
                resumed,
            )


def delete_old_checkpoints(
    output: Path, limit: int | None, *, step: int, best: str = "", told: set[Path]
) -> None:
    """Delete a run's checkpoints beyond `limit`: the last one, of `step`, and the best one stay. Local.

    So do those of later steps: another run left them. What can't be deleted is said once (`told` holds it) and tried
    again at the next call. transformers' own way deletes any folder called `checkpoint-*`, with all that is in it.
    """
    found = [folder for folder in newest_first(output) if step_of(folder) <= step]
    order = sorted(found, key=lambda folder: (folder != found[0], folder.name != best))
    spared = max(limit or len(found), 2 if best in [folder.name for folder in found[1:]] else 1)
    for folder in order[spared:]:
        # Storage may refuse what is in use, on this rank alone: the others train on, and would wait for it.
        try:
            check_output(folder, KIND, overwrite=True)
            shutil.rmtree(folder)
        except (ConfigError, OSError) as error:
            if folder not in told:
                logger.warning("%s is kept in spite of save_total_limit: %s", folder, error)
            told.add(folder)


def verify_share(folder: Path) -> None:
    """Compare the hashes of this rank's share of the files. Local."""
    stored = open_folder(folder, (KIND,))
    stored.verify(sorted(stored.files), rank=rank(), world_size=world_size())
