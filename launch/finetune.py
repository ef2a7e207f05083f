"""Tune, prune, retune and export in one launch: `launch/finetune.py RECIPE.yaml [--flag value ...]`.

Start it with `deepspeed`, `accelerate launch`, `torchrun`, or plain `python` on one device.
Every key of the recipe can be overridden: `--training.learning_rate 1e-4`, `--dsee.rank 8`; names of
TrainingArguments also directly: `--learning_rate 1e-4`. `--resume` goes on from the last whole checkpoint,
`--resume auto` starts afresh where there is none.

Exit codes of a rank: 2, something must be changed first (the message says what); 75, relaunch with --resume.
"""

import logging
import os
import sys
import warnings

from dsee_scale.errors import DSEEError, RunStoppedError
from dsee_scale.recipe.parsing import cache_folder

RELAUNCH = 75  # EX_TEMPFAIL: it failed for now, the same command may be tried again


def main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        from dsee_scale.recipe.help import recipe_help

        sys.stdout.write(f"{__doc__}\n{recipe_help()}\n")
        return 0 if words else 2
    rank = int(os.environ.get("RANK", "0"))
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 warns about, at every step's first use.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format=f"[rank {rank}] %(message)s", force=True
    )
    from dsee_scale.recipe.recipe import load_recipe
    from dsee_scale.training.report import summary_table
    from dsee_scale.training.run import run

    path, *flags = [word for word in words if not word.startswith(("--local_rank", "--local-rank"))]
    try:
        output = run(load_recipe(path, flags, {"DSEE_SCALE_CACHE": str(cache_folder())}))
    except DSEEError as error:
        logging.getLogger("dsee_scale").error("%s: %s", type(error).__name__, error)
        return RELAUNCH if isinstance(error, RunStoppedError) else 2
    if rank == 0:
        sys.stdout.write(f"\n{summary_table(output)}\n\nlook at {output / 'report.html'}\n")
    return 0


if __name__ == "__main__":
    from dsee_scale.distributed import exit_process

    exit_process(main(sys.argv[1:]))
