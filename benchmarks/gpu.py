"""Every benchmark that a GPU makes meaningful, the most important first, each in a process of its own.

    python benchmarks/gpu.py [--folder runs/gpu] [--seconds 540]
    python benchmarks/gpu.py --device cpu --tiny

A case that fails or runs out of time is said so in a line of its own, and the others go on. What is left of the
whole time bounds each case besides its own limit. A line holds, besides what every benchmark prints:

- device: the card's name;
- floor: what the case cannot be faster than, its bytes over 3.35 TB/s (an H200's: 4.8) and its FLOPs over 989 TFLOP/s
  (an H100's or H200's memory, and their dense bfloat16 units), whichever takes longer;
- of_floor: floor / ours, the fraction of it that is reached;
- goal, met: where there is a goal, the key that it is about with its bound, and whether it is met.

`--device cpu --tiny` runs all cases on tiny shapes on the CPU, so that a run on a GPU can't fail on its form.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
PATIENT = 240
"""Seconds of each case of a dry run, which may be on a busy machine."""
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        name: of the case and of its file.
        seconds: it is stopped after so many.
        words: what Python is to run; relative paths are the repository's.
        tiny: further words of a dry run; None leaves the case out of it.
    """

    name: str
    seconds: int
    words: tuple[str, ...]
    tiny: tuple[str, ...] | None = ("--tiny",)


def own(name: str, seconds: int, *words: str) -> Case:
    """A case of `_gpu_cases`."""
    return Case(name, seconds, ("benchmarks/_gpu_cases.py", "--case", *words))


STEP = (
    "benchmarks/training_step.py",
    "--json",
    "--checkpointing",
    "--floors",
    "--no-memory",
    "--rounds",
    "7",
    "--processes",
    "1",
    "--batch",
    "1",
    "--lengths",
    "2048",
    "8192",
)
TINY_STEP = ("--hidden", "128", "--layers", "1", "--lengths", "8", "--rounds", "1", "--batch", "1",
             "--targets", "q and v")  # fmt: skip


def zero3(name: str, seconds: int, *words: str) -> Case:
    """A case of `training_step`, under ZeRO-3 with NCCL; its dry run takes the last of repeated options."""
    return Case(name, seconds, (*STEP, *words), TINY_STEP)


CASES = [
    Case("test_kernels", 120, (*PYTEST, "tests/gpu/test_kernels.py"), None),
    Case("test_zero3", 110, (*PYTEST, "tests/gpu/test_zero3.py", "-k", "one_gpu and (refit or global)"), None),
    Case("test_devices", 40, (*PYTEST, "tests/gpu/test_devices.py"), None),
    own("step_1b", 60, "step", "--model", "1b"),
    own("step_7b", 90, "step", "--model", "7b"),
    own("masks_7b", 60, "masks", "--model", "7b"),
    own("refit_7b", 90, "refit", "--model", "7b", "--layers", "8"),
    own("residual", 45, "residual"),
    own("semi_structured", 40, "semi"),
    Case("test_semi_structured", 40, (*PYTEST, "tests/gpu/test_semi_structured.py"), None),
    own("supports_7b", 45, "supports", "--model", "7b"),
    own("memory_7b", 75, "memory", "--model", "7b", "--layers", "8"),
    zero3("step_1b_zero3", 75, "--hidden", "2048", "--layers", "22", "--targets", "all linear"),
    zero3("step_7b_zero3", 75, "--hidden", "4096", "--layers", "6", "--targets", "all linear"),
    zero3("step_1b_zero3_qv", 60, "--hidden", "2048", "--layers", "22", "--targets", "q and v"),
    zero3("step_7b_zero3_qv", 60, "--hidden", "4096", "--layers", "6", "--targets", "q and v"),
    Case("test_zero3_rest", 200, (*PYTEST, "tests/gpu/test_zero3.py", "-k", "one_gpu and not refit and not global"),
         None),
]  # fmt: skip


def run_cases(
    cases: Sequence[Case], folder: Path, seconds: float, environment: dict[str, str] | None = None
) -> dict[str, str]:
    """Run cases one after the other; by name "ok", or what went wrong.

    Args:
        cases: what to run.
        folder: gets `NAME.jsonl` (what a case printed) and `NAME.log` (its errors).
        seconds: for all together; cases that begin later are left out.
        environment: what is set besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    found = {}
    for case in cases:
        left = end - time.monotonic()
        if left < 5:
            found[case.name] = "left out: no time was left"
        else:
            found[case.name] = _run(case, folder, min(case.seconds, left), environment or {})
        line = {"benchmark": "gpu", "case": case.name, "outcome": found[case.name]}
        line["seconds_left"] = round(end - time.monotonic())
        print(json.dumps(line), flush=True)
    return found


def _run(case: Case, folder: Path, seconds: float, environment: dict[str, str]) -> str:
    """What became of one case; its output goes to the folder as it comes, and is printed at its end."""
    output = folder / f"{case.name}.jsonl"
    with output.open("w") as out, (folder / f"{case.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *case.words],
            cwd=HERE.parent,
            stdout=out,
            stderr=log,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # Launchers give their ranks groups of their own.
            ranks = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, 9)
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
            psutil.wait_procs(ranks, timeout=10)
            code = None
            process.wait()
    print(output.read_text(), end="", flush=True)
    if code is None:
        return f"stopped after {seconds:.0f} s"
    return "ok" if code == 0 else f"failed with code {code}, see {case.name}.log"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a dry run")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="these cases alone")
    options = parser.parse_args()
    cases = [case for case in CASES if not options.only or case.name in options.only]
    if options.tiny:
        cases = [
            Case(case.name, PATIENT, (*case.words, *case.tiny)) for case in cases if case.tiny is not None
        ]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if options.device == "cpu" else {}
    found = run_cases(cases, options.folder, options.seconds, hidden)
    return int(any(outcome != "ok" for outcome in found.values()))


if __name__ == "__main__":
    sys.exit(main())
