"""The `dsee-scale` command: train by a recipe; plan, look into folders, export and evaluate with no cluster."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from dsee_scale.errors import ConfigError, DSEEError, RunStoppedError
from dsee_scale.sigterm import expect_it_again
from dsee_scale.version import __version__

RELAUNCH = 75  # EX_TEMPFAIL: it failed for now, the same command may be tried again
LARGEST_PLAN = 10**9
RUN_HELP = """usage: dsee-scale run RECIPE [--flag value ...]

Tune, prune, retune and export in one launch. RECIPE is a YAML file or the name of a shipped one:
{names}.
Start it with `deepspeed --module dsee_scale run ...`, `accelerate launch -m dsee_scale run ...`, `torchrun -m
dsee_scale run ...`, or by itself on one device.

Every key of the recipe can be set here: `--training.learning_rate 1e-4`, `--dsee.rank 8`; TrainingArguments
also by their bare names: `--learning_rate 1e-4`. `--deepspeed` takes a file or one of these names:
{configs}.
`--resume` continues from the last complete checkpoint, `--resume auto` starts from the beginning if there is none.

Exit codes of a rank: 2, change something first (the message says what); 75, relaunch with --resume.
"""


def entry() -> NoReturn:
    """The program: `main` on the command line, and the end of the process."""
    argv = [word for word in sys.argv[1:] if not word.startswith(("--local_rank", "--local-rank"))]
    code = main(argv)
    if argv[:1] == ["run"]:
        from dsee_scale.distributed import exit_process

        exit_process(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error that was explained, 2 for wrong usage."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["run"]:
        return run_recipe(argv[1:])
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except DSEEError as error:
        print(f"dsee-scale {args.command}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `dsee-scale inspect FOLDER | head`: what reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"dsee-scale {args.command}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run_recipe(argv: Sequence[str]) -> int:
    """Collective. One run by a recipe and flags; 0, 2 for what must be changed first, 75 for a relaunch."""
    if not argv or argv[0] in ("-h", "--help"):
        from dsee_scale.recipe.help import recipe_help
        from dsee_scale.recipe.parsing import shipped_names

        shipped = {
            "names": ", ".join(shipped_names("recipes")),
            "configs": ", ".join(shipped_names("ds_configs")),
        }
        print(f"{RUN_HELP.format(**shipped)}\n{recipe_help()}")
        return 0 if argv else 2
    rank = int(os.environ.get("RANK", "0"))
    # DeepSpeed 0.19 calls collectives by the names that torch 2.13 warns about, at every step's first use.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format=f"[rank {rank}] %(message)s", force=True
    )
    try:
        _stop_on_sigterm()
        from dsee_scale.recipe.parsing import cache_folder
        from dsee_scale.recipe.recipe import load_recipe

        recipe = load_recipe(argv[0], argv[1:], {"DSEE_SCALE_CACHE": str(cache_folder())})
        from dsee_scale.training.report import summary_table
        from dsee_scale.training.run import run

        output = run(recipe)
    except DSEEError as error:
        logging.getLogger("dsee_scale").error("%s: %s", type(error).__name__, error)
        return RELAUNCH if isinstance(error, RunStoppedError) else 2
    if rank == 0:
        print(f"\n{summary_table(output)}\n\nlook at {output / 'report.html'}")
    return 0


def _stop_on_sigterm() -> None:
    """From now on SIGTERM ends the run with the code for a relaunch; while it trains, after a checkpoint."""

    def stop(number: int, frame: Any) -> None:
        expect_it_again()
        raise RunStoppedError(
            "stopped by SIGTERM outside training: only the work since the last checkpoint is lost; "
            "relaunch with --resume auto"
        )

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsee-scale",
        description="Train from a recipe; without a cluster, plan runs, inspect folders, export and evaluate models.",
    )
    parser.add_argument("--version", action="version", version=f"dsee-scale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="tune, prune, retune and export from a recipe", add_help=False)
    _add_inspect(commands)
    _add_export(commands)
    _add_push(commands)
    _add_eval(commands)
    _add_plan(commands)
    return parser


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "inspect",
        help="settings, sparsity of each matrix, and sizes of a folder",
        description="Print what a folder holds: settings, sparsity and sizes. The folder may be an adapter, a "
        "LoRA, a training checkpoint, an exported model, or any model with safetensors files. No model is built; "
        "weights are read one at a time.",
    )
    command.add_argument("folder", metavar="FOLDER", help="the folder to look into")
    command.add_argument("--each", action="store_true", help="list every matrix, not groups of equal ones")
    command.add_argument("--verify", action="store_true", help="compare every file with its saved hash")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_inspect)


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "export",
        help="merge an adapter into its base model's files",
        description="Write a Hugging Face model from an adapter (or a training checkpoint) and its base model's "
        "safetensors files. Tensors are streamed: memory stays at about one weight.",
        epilog="example: dsee-scale export out/adapter --base models/llama --output out/model --delta masked",
    )
    command.add_argument("folder", metavar="FOLDER", help="what save_adapter or a training run wrote")
    command.add_argument(
        "--base",
        metavar="FOLDER",
        help="folder of the base model (default: the folder that the adapter names)",
    )
    command.add_argument("--output", required=True, metavar="FOLDER", help="where the model goes")
    command.add_argument(
        "--delta",
        choices=("masked", "dense", "separate"),
        default="masked",
        help="masked: (W + D) * M, as sparse as W (default); dense: W * M + D; separate: W * M with the "
        "adapter beside it",
    )
    command.add_argument(
        "--format",
        choices=("model", "lora"),
        default="model",
        help="model: weights with the update in them (default); lora: a LoRA folder for PEFT and vLLM, with the "
        "pruned base in it",
    )
    command.add_argument(
        "--uniform-rank",
        action="store_true",
        help="lora: the same rank for every module, for servers with one scale",
    )
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    command.add_argument(
        "--push-to-hub", "--push_to_hub", metavar="OWNER/NAME", help="then upload it, as `push` does"
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_export)


def _add_push(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "push",
        help="upload an export or an adapter to the hub",
        description="Upload what export, save_adapter or a run wrote, in one commit or not at all. The token is "
        "the one of `hf auth login`.",
        epilog="example: dsee-scale push runs/sentiment/model me/smollm2-sentiment",
    )
    command.add_argument("folder", metavar="FOLDER", help="an export, a LoRA folder or an adapter")
    command.add_argument("repo", metavar="OWNER/NAME", help="the repository; created if it does not exist")
    command.add_argument("--base", metavar="OWNER/NAME", help="an adapter's base, if it names a local folder")
    command.add_argument("--private", action="store_true", default=None, help="for a new repository")
    command.set_defaults(run=_push)


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "eval",
        help="quality by lm-eval's tasks",
        description="Score an export, a plain model, or an adapter on its base by tasks of lm-eval (extra `eval`), and "
        "print its table. Perplexities are named with their sequence length.",
        epilog="example: dsee-scale eval out/model --tasks wikitext my_task.yaml --length 2048",
    )
    command.add_argument("folder", metavar="FOLDER", help="an export, adapter, checkpoint or LoRA folder")
    command.add_argument(
        "--tasks", required=True, nargs="+", metavar="TASK", help="names of lm-eval's tasks, or YAML files"
    )
    command.add_argument("--base", metavar="ID_OR_FOLDER", help="an adapter's base (what the adapter names)")
    command.add_argument(
        "--length", type=int, metavar="N", help="longest sequence in tokens (2048, or the model's limit)"
    )
    command.add_argument("--batch", type=int, default=1, metavar="N", help="sequences in a forward pass (1)")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.set_defaults(run=_eval)


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "plan",
        help="memory, traffic, disk and time of a run, from the model's sizes",
        description="Print what each phase of a run needs on every GPU and host, and what to choose. Reads only "
        "the model's config. Built-in shapes: llama-2-7b, llama-3-8b, llama-2-13b, llama-2-70b, llama-3-70b, "
        "llama-3.1-405b, mistral-7b.",
        epilog="example: dsee-scale plan --model llama-3-70b --gpus 8 --gpu-memory 80 --quantize nf4",
    )
    command.add_argument(
        "--model", required=True, metavar="ID_OR_FOLDER", help="hub id, folder, built-in shape"
    )
    command.add_argument("--gpus", required=True, type=int, metavar="N", help="number of GPUs")
    command.add_argument("--gpu-memory", required=True, type=float, metavar="GB", help="GiB of one GPU")
    command.add_argument("--quantize", choices=("nf4", "fp4", "int8"), help="format of the base")
    command.add_argument("--offload", action="store_true", help="parameters and optimizer on the host")
    command.add_argument("--rank", type=int, default=16, help="rank of the adapters (16)")
    command.add_argument("--num-sparse", type=int, default=64, metavar="N", help="entries of S2 each (64)")
    command.add_argument("--targets", nargs="+", metavar="NAME", help="adapted layers (q_proj v_proj)")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="sequences on a GPU (1)")
    command.add_argument("--length", type=int, default=2048, metavar="N", help="tokens of one (2048)")
    command.add_argument("--no-checkpointing", action="store_true", help="no activation checkpointing")
    command.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    command.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> None:
    from dsee_scale.planning.plan import GIB, Setting, make_plan
    from dsee_scale.planning.shapes import find_shape
    from dsee_scale.planning.text import plan_dict, plan_text

    for name, low in {
        **dict.fromkeys(("gpus", "rank", "batch", "length"), 1),
        "gpu_memory": 1e-3,
        "num_sparse": 0,
    }.items():
        if not low <= getattr(args, name) <= LARGEST_PLAN:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must lie in [{low}, {LARGEST_PLAN:,}], found {getattr(args, name)}")
    shape = find_shape(args.model)
    usual = tuple(n for n in ("q_proj", "v_proj") if n in shape.matrices) or tuple(shape.matrices)[:1]
    setting = Setting(
        gpus=args.gpus,
        quantize=args.quantize,
        offload=args.offload,
        rank=args.rank,
        num_sparse=args.num_sparse,
        targets=tuple(args.targets or usual),
        batch=args.batch,
        length=args.length,
        checkpointing=not args.no_checkpointing,
    )
    plan, memory = make_plan(shape, setting), args.gpu_memory * GIB
    print(json.dumps(plan_dict(plan, memory), indent=2) if args.json else plan_text(plan, memory))


def _inspect(args: argparse.Namespace) -> None:
    from dsee_scale.export.folder_report import inspect_folder

    report = inspect_folder(args.folder, verify=args.verify, progress=sys.stderr.isatty())
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.table(each=args.each))


def _push(args: argparse.Namespace) -> None:
    from dsee_scale.export.hub import push_to_hub

    print(push_to_hub(args.folder, args.repo, base=args.base, private=args.private))


def _eval(args: argparse.Namespace) -> None:
    from dsee_scale.evaluation.harness import evaluate_tasks

    report = evaluate_tasks(
        args.folder,
        args.tasks,
        base=args.base,
        length=args.length,
        batch_size=args.batch,
        limit=args.limit,
    )
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)


def _export(args: argparse.Namespace) -> None:
    from dsee_scale.export.from_files import export_files
    from dsee_scale.export.lora import export_lora_files

    report: Any
    if args.format == "lora":
        if args.delta != "masked":
            raise ConfigError("--delta goes with --format model: a LoRA is always beside the frozen weights")
        report = export_lora_files(
            args.folder, args.output, base=args.base, uniform_rank=args.uniform_rank, overwrite=args.overwrite
        )
    else:
        if args.uniform_rank:
            raise ConfigError("--uniform-rank goes with --format lora")
        report = export_files(args.folder, args.base, args.output, delta=args.delta, overwrite=args.overwrite)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    if args.push_to_hub:
        from dsee_scale.export.hub import push_to_hub

        print(push_to_hub(args.output, args.push_to_hub), file=sys.stderr if args.json else sys.stdout)
