"""How long `graphprune profile` takes where nothing has been measured yet: the general grid, and models.

    python benchmarks/profiling.py [--models grid,resnet50] [--repeats 1]

Each is the command itself, in a process of its own with an empty cache; the aims are 180 s for the grid and 120 s
for resnet50. A second call, which finds everything in the cache, is timed too. Writes
`results/profiling-<engine>-1t-<processor>.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common import MODELS, result_file

from graphprune.machine import environment

GRID = "grid"
AIMS = {GRID: 180, "resnet50": 120}
"""Seconds."""


CALL = "from graphprune.cli import main; main()"


def command(name: str, cache: Path) -> float:
    """Seconds of one `graphprune profile`. Raises CalledProcessError where it fails."""
    spec = [] if name == GRID else [MODELS[name]]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", CALL, "profile", *spec, "--picture", str(cache / "gains.png")],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)}, check=True, capture_output=True,
    )  # fmt: skip
    return time.perf_counter() - start


def measured(name: str, repeats: int) -> dict[str, object]:
    """A row: seconds with an empty cache and with a full one."""
    first, again = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            first.append(command(name, Path(cache)))
            again.append(command(name, Path(cache)))
    aim = f", aim {AIMS[name]} s" if name in AIMS else ""
    print(f"{name:16} {median(first):6.1f} s, from the cache {median(again):.1f} s{aim}", flush=True)
    return {"what": name, "seconds": first, "seconds_from_cache": again, "aim": AIMS.get(name)}


def main() -> None:
    """Every row, then the file."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", default=",".join((GRID, *MODELS)), help="some of: " + ", ".join((GRID, *MODELS)))
    made.add_argument("--repeats", type=int, default=1)
    options = made.parse_args()
    rows = [measured(name, options.repeats) for name in options.models.split(",")]
    result_file("profiling").write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
