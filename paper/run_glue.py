"""Tune, prune and retune an encoder on GLUE by the flags of the paper's programs.

Start it with `deepspeed`, `accelerate launch`, `torchrun`, or plain `python` on one device; `--deepspeed
ds_configs/zero3_cpu.json` partitions the weights. One program stands for the repository's four: the second
stage is the same command with the tuned model as --model_name_or_path and --pruning_ratio,
--ad_pruning_ratio or --prune_heads_num. `--help` lists all flags; docs/paper.md has the commands.
"""

import logging
import os
import sys
from pathlib import Path

from dsee_scale.errors import DSEEError, RunStoppedError

sys.path.insert(0, str(Path(__file__).parents[1]))  # `paper` is not installed

RELAUNCH = 75  # as launch/finetune.py


def main(argv: list[str]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format=f"[rank {rank}] %(message)s", force=True
    )
    from paper.glue.arguments import parse_flags
    from paper.glue.run import run_glue

    try:
        run_glue(parse_flags(argv))
    except DSEEError as error:
        logging.getLogger("dsee_scale").error("%s: %s", type(error).__name__, error)
        return RELAUNCH if isinstance(error, RunStoppedError) else 2
    return 0


if __name__ == "__main__":
    from dsee_scale.distributed import exit_process

    exit_process(main(sys.argv[1:]))
