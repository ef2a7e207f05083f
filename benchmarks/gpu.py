"""Every benchmark that a GPU makes meaningful, the most important first, each in a process of its own.

    python benchmarks/gpu.py [FOLDER] [--seconds 540]
    python benchmarks/gpu.py --device cpu --tiny [FOLDER]

A case that fails or runs out of time is said so in a line of its own, and the others go on; so do the parts of a case.
What is left of the whole time bounds each case besides its own limit. FOLDER (runs/gpu) gets two files, to which
output is added as it comes: results.jsonl, JSON lines, and log.txt, everything else, each case's part under a heading.
At the end a table says what became of each case and of each goal. The exit code is 1 where a case failed or was
stopped, or was left out of a dry run. A line holds, besides what every benchmark prints:

- device: the card's name;
- model, blocks: the shape, and how many blocks it has here (a 7B model may be cut to fewer);
- floor: what the case cannot be faster than, its bytes over 3.35 TB/s (an H200's: 4.8) and its FLOPs over 989 TFLOP/s
  (an H100's or H200's memory, and their dense bfloat16 units), whichever takes longer;
- of_floor: floor / ours, the fraction of it that is reached. It may exceed 1 where a second-level cache of 50 MB keeps
  a part of the bytes from one call to the next (the residual, 2:4 products of 4096 x 4096), and where ours is a
  difference of two steps;
- goal, value, met: where there is a goal, the key that it is about with its bounds, that key's value, and whether it is
  met; null where there is no value, as for a ratio to a peer that is not above 0.

`--device cpu --tiny` runs all cases on tiny shapes on the CPU, so that a run on a GPU can't fail on its form; of tests
it finds those that a run would take. `--quick` does so with a few cases, on whatever device there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil

HERE = Path(__file__).parent
PATIENT = 240
"""Seconds of each case of a dry run, which may be on a busy machine."""
LEAST = 20
"""Seconds: a case that has fewer is left out, as it takes about as long to import what it needs."""
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        name: of the case.
        seconds: it is stopped after so many.
        words: what Python is to run; relative paths are the repository's.
        tiny: further words of a dry run.
    """

    name: str
    seconds: int
    words: tuple[str, ...]
    tiny: tuple[str, ...] = ("--tiny",)


@dataclass
class Result:
    """What became of a case: "ok", or what went wrong; and its lines."""

    outcome: str
    lines: list[dict[str, Any]] = field(default_factory=list)


def own(name: str, seconds: int, *words: str) -> Case:
    """A case of `_gpu_cases`."""
    return Case(name, seconds, ("benchmarks/_gpu_cases.py", "--case", *words))


def tests(name: str, seconds: int, *words: str) -> Case:
    """Tests; a dry run finds them, and fails if there are none."""
    return Case(name, seconds, (*PYTEST, *words), ("--collect-only",))


STEP = (
    "benchmarks/training_step.py",
    "--json",
    "--checkpointing",
    "--floors",
    "--no-memory",
    "--rounds",
    "5",
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


ZERO3 = "tests/gpu/test_zero3.py"
OTHERS = ("tests/gpu/test_semi_structured.py", "tests/gpu/test_devices.py")
CASES = [
    tests("test_kernels", 55, "tests/gpu", *(f"--ignore={path}" for path in (ZERO3, *OTHERS))),
    tests("test_zero3", 50, ZERO3, "-k", "one_gpu and refit"),
    tests("test_2_4_and_devices", 25, *OTHERS),
    own("step_1b", 40, "step", "--model", "1b"),
    zero3("step_1b_zero3", 50, "--hidden", "2048", "--layers", "22", "--targets", "all linear"),
    own("step_7b", 65, "step", "--model", "7b"),
    zero3("step_7b_zero3", 50, "--hidden", "4096", "--layers", "6", "--targets", "all linear"),
    own("masks_7b", 35, "masks", "--model", "7b"),
    own("residual", 35, "residual"),
    own("supports_7b", 40, "supports", "--model", "7b"),
    own("refit_7b", 40, "refit", "--model", "7b", "--layers", "4"),
    own("semi_structured", 20, "semi"),
    own("memory_7b", 35, "memory", "--model", "7b", "--layers", "8"),
]
"""Their seconds come to the whole time, so that each of them starts but for what stopping others takes."""
FURTHER = [
    zero3("step_1b_zero3_qv", 50, "--hidden", "2048", "--layers", "22", "--targets", "q and v"),
    zero3("step_7b_zero3_qv", 50, "--hidden", "4096", "--layers", "6", "--targets", "q and v"),
    tests("test_zero3_rest", 200, "-vv", ZERO3, "-k", "one_gpu and not refit"),
]
"""In what time these leave."""
QUICK = ("residual", "semi_structured")


def run_cases(
    cases: Sequence[Case], folder: Path, seconds: float, environment: Mapping[str, str] | None = None
) -> dict[str, Result]:
    """Run cases one after the other; by name what became of each.

    Args:
        cases: what to run.
        folder: gets `results.jsonl` and `log.txt`, or what is added to them.
        seconds: for all together; cases that begin later are left out.
        environment: what is set besides.
    """
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds
    found = {}
    with (folder / "results.jsonl").open("a") as results, (folder / "log.txt").open("a") as log:
        for case in cases:
            left = end - time.monotonic()
            result = Result("left out: no time was left")
            if left >= LEAST:
                result = _run(case, min(case.seconds, left), environment or {}, results, log)
            found[case.name] = result
            line: dict[str, Any] = {"benchmark": "gpu", "case": case.name, "outcome": result.outcome}
            _write(json.dumps(line | {"seconds_left": round(end - time.monotonic())}) + "\n", results)
    return found


def _run(case: Case, seconds: float, environment: Mapping[str, str], results: TextIO, log: TextIO) -> Result:
    """One case, whose output goes to the files as it comes; JSON lines are printed, too."""
    log.write(f"\n=== {case.name}: {' '.join(case.words)}\n")
    log.flush()
    process = subprocess.Popen(
        [sys.executable, *case.words],
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, **environment},
        start_new_session=True,
        text=True,
        errors="replace",
    )
    lines: list[dict[str, Any]] = []
    others = [""]

    def read() -> None:
        for line in process.stdout or ():
            with contextlib.suppress(ValueError):
                if line.startswith("{"):
                    lines.append(json.loads(line))
                    _write(line, results)
                    continue
            others.append(line.strip() or others[-1])
            log.write(line)
            log.flush()

    # In a thread: what outlives its process and keeps the pipe open holds nobody up.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
        outcome = "ok" if code == 0 else f"failed with code {code}, see log.txt"
    except subprocess.TimeoutExpired:
        _kill(process)
        outcome = f"stopped after {seconds:.0f} s"
    reader.join(10)
    if "pytest" in case.words:  # whose last line says how many tests there were, and how many were skipped
        outcome += f": {others[-1].strip('= ')}"
    return Result(outcome, lines)


def _write(line: str, results: TextIO) -> None:
    results.write(line)
    results.flush()
    print(line, end="", flush=True)


def _kill(process: subprocess.Popen[str]) -> None:
    """A process and its ranks, of which launchers make groups of their own."""
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, 9)
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    psutil.wait_procs(ranks, timeout=10)
    process.wait()


def summary(found: Mapping[str, Result]) -> str:
    """A row for each case, with a row for each of its goals and of its parts that failed below."""
    rows = []
    for name, result in found.items():
        rows.append(f"{name} {result.outcome}"[:80])
        for line in result.lines:
            case = str(line.get("case")).removeprefix("ZeRO-3, ").replace(" a rank", "")[:48]
            if "goal" in line:
                met = {True: "met", False: "NOT MET", None: "no value"}[line["met"]]
                value = "" if line["value"] is None else f" {line['value']:.3g}"
                rows.append(f" {met}{value}, {line['goal']}: {case}")
            elif "outcome" in line:
                rows.append(f" {case}: {line['outcome']}"[:80])
    return "\n".join(rows)


def main() -> int:
    every = CASES + FURTHER
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/gpu"))
    parser.add_argument(
        "--seconds", type=float, help="for everything (540; 40 with --quick; as long as it takes with --tiny)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a dry run")
    parser.add_argument("--quick", action="store_true", help=f"a dry run of {', '.join(QUICK)}")
    parser.add_argument("--json", action="store_true", help="no difference: lines are JSON")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in every], help="these cases alone")
    options = parser.parse_args()
    chosen = options.only or (QUICK if options.quick else [case.name for case in every])
    cases = [case for case in every if case.name in chosen]
    if dry := options.tiny or options.quick:
        cases = [Case(case.name, PATIENT, (*case.words, *case.tiny)) for case in cases]
    whole = 40 if options.quick else PATIENT * len(cases) if dry else 540
    hidden = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if options.device == "cpu" else {}
    found = run_cases(cases, options.folder, options.seconds or whole, hidden)
    print("\n" + summary(found), flush=True)
    bad = ("failed", "stopped", "left out") if dry else ("failed", "stopped")
    return int(any(result.outcome.startswith(bad) for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
