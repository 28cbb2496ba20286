"""`graphprune demo`, timed, with its tables kept.

    python benchmarks/demo.py

Runs the command in an empty folder with an empty profile cache. Writes `results/demo-<engine>-1t-<processor>.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

from common import result_file

from graphprune.machine import environment


def main() -> None:
    """Run, time, write."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.run(
            [sys.executable, "-c", "from graphprune.cli import main; main()", "demo", "--json", "--out", "demo"],
            cwd=folder,
            env={**os.environ, "GRAPHPRUNE_CACHE": f"{folder}/cache"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - start
    try:
        told = json.loads(process.stdout)
    except ValueError:
        raise SystemExit(f"the demo printed what is no JSON: {process.stdout[:500]!r}") from None
    body = {"seconds": seconds, "demo": told, "environment": environment()}
    path = result_file("demo")
    path.write_text(json.dumps(body, indent=1) + "\n")
    print(f"{seconds:.0f} s: {path.name}")


if __name__ == "__main__":
    main()
