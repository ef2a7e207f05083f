"""What `import dsee_scale` costs over what it stands on: torch and the lazy part of transformers.

    python benchmarks/import_time.py [--json] [--quick]

Each import runs in processes of its own, in turn; the medians are printed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _report import Report, parser

CODE = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
BASE, OURS = "torch, transformers", "dsee_scale"


def seconds(rounds: int) -> dict[str, float]:
    """Median time of each import."""
    found: dict[str, list[float]] = {BASE: [], OURS: []}
    for _ in range(rounds):
        for names, values in found.items():
            done = subprocess.run(
                [sys.executable, "-c", CODE.format(names)], capture_output=True, text=True, check=True
            )
            values.append(float(done.stdout))
    return {names: statistics.median(values) for names, values in found.items()}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    report = Report("import_time", arguments.json)
    times = seconds(3 if arguments.quick else 9)
    report.add("import dsee_scale", "time", "s", times[OURS], times[BASE])


if __name__ == "__main__":
    main()
