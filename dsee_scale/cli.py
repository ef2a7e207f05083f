"""The `dsee-scale` command: look into folders and export models, with no cluster."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from dsee_scale.errors import ConfigError, DSEEError
from dsee_scale.version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for an error that was explained, 2 for wrong usage."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except DSEEError as error:
        print(f"dsee-scale {args.command}: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"dsee-scale {args.command}: {error.filename or ''}: {error.strerror or error}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsee-scale",
        description="Look into what dsee_scale saved, and export models from files, without a cluster.",
    )
    parser.add_argument("--version", action="version", version=f"dsee-scale {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_export(commands)
    return parser


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "inspect",
        help="settings, sparsity of each matrix, and sizes of a folder",
        description="Print what a folder holds: settings, sparsity and sizes. The folder may be an adapter, a "
        "training checkpoint, an exported model, or any model with safetensors files. No model is built; "
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
        help="merge an adapter into its base model's files, or convert a model's files",
        description="Write a Hugging Face model from an adapter (or a training checkpoint) and its base model's "
        "safetensors files; or, without --base, write a model's folder again with dense or sparse files. "
        "Tensors are streamed: memory stays at about one weight.",
        epilog="examples: dsee-scale export out/adapter --base models/llama --output out/model --delta masked; "
        "dsee-scale export out/model --output out/small --format sparse",
    )
    command.add_argument(
        "folder",
        metavar="FOLDER",
        help="what save_adapter or a training run wrote; without --base, a model's folder",
    )
    command.add_argument("--base", metavar="FOLDER", help="folder of the base model")
    command.add_argument("--output", required=True, metavar="FOLDER", help="where the model goes")
    command.add_argument(
        "--delta",
        choices=("masked", "dense", "separate"),
        help="masked: (W + D) * M, as sparse as W (default); dense: W * M + D; separate: W * M with the "
        "adapter beside it",
    )
    command.add_argument(
        "--format",
        choices=("dense", "sparse"),
        default="dense",
        help="dense: plain safetensors (default); sparse: a bit for each entry of a pruned weight and the kept "
        "values, for dsee_scale.load_pretrained",
    )
    command.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_export)


def _inspect(args: argparse.Namespace) -> None:
    from dsee_scale.checkpoint.inspect_folder import inspect_folder

    report = inspect_folder(args.folder, verify=args.verify, progress=sys.stderr.isatty())
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.table(each=args.each))


def _export(args: argparse.Namespace) -> None:
    from dsee_scale.checkpoint.convert_files import convert_folder
    from dsee_scale.checkpoint.export_files import export_files

    if args.base is None and args.delta is not None:
        raise ConfigError(
            "--delta goes with an adapter and --base FOLDER; a model's folder has no update left"
        )
    if args.base is None:
        report = convert_folder(args.folder, args.output, format=args.format, overwrite=args.overwrite)
    else:
        report = export_files(
            args.folder,
            args.base,
            args.output,
            delta=args.delta or "masked",
            format=args.format,
            overwrite=args.overwrite,
        )
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)


if __name__ == "__main__":
    sys.exit(main())
