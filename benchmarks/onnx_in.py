"""Which models are cut alike by both routes: as torch modules, and as the ONNX files they were exported to.

    python benchmarks/onnx_in.py [--models SPEC,...]

The models of `coverage.py`, with random weights, a uniform plan at keep 0.5, one process and 300 seconds each.
The files have a fixed batch: with a free one torch takes three times as long over all of this. Resumable:
`results/onnx_in.json` is written after each model, and models that it has are not run again.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "onnx_in.json"
TOLERANCE = 1e-4
PATIENCE = 1200
"""Seconds until a process is ended that makes no use of its processor."""


def examine(spec: str) -> dict[str, Any]:
    """The facts of one model: how far the cut file's outputs are from those of the cut module."""
    import torch

    sys.path.insert(0, str(ROOT))
    from coverage import built

    import graphprune as gp
    from tests.graphprune.onnx_route import difference
    from tests.graphprune.oracle import scramble

    model, example = built(spec)
    model = scramble(model, dtype=torch.float32)
    graph = gp.trace(model, example)
    plan = gp.uniform_plan(graph, 0.5, align=8)
    file = Path(os.environ["ONNX_IN_FOLDER"]) / "dense.onnx"
    gp.export_onnx(model, file, example, dynamic_batch=False, tolerance=1e-2)
    start = time.perf_counter()
    found = difference(model, graph, plan, file, len(example))
    return {"choices": len(plan.choices), "difference": found, "seconds": round(time.perf_counter() - start, 1)}


def run(spec: str, options: argparse.Namespace) -> dict[str, Any]:
    """The facts of one model, from a new process."""
    command = [sys.executable, __file__, "--one", spec, "--limit", str(options.limit)]
    facts: dict[str, Any] = {"model": spec}
    with TemporaryDirectory() as folder:
        env = os.environ | {"OMP_NUM_THREADS": "1", "ONNX_IN_FOLDER": folder}
        try:
            done = subprocess.run(command, timeout=PATIENCE, capture_output=True, text=True, check=False, env=env)
            lines = done.stdout.strip().splitlines()
            ended = {
                "error": f"not done in {options.limit} s" if done.returncode < 0 else f"ended with {done.returncode}"
            }
            facts |= json.loads(lines[-1]) if lines else ended
        except subprocess.TimeoutExpired:
            facts["error"] = f"not done in {options.limit} s"
    print(f"{spec:50} {facts.get('difference', float('nan')):.1e} {facts.get('error', '')}", flush=True)
    return facts


def one(spec: str, limit: int) -> None:
    """Examine a model in this process, which is killed past the limit in seconds of processor time."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    try:
        facts = examine(spec)
    except Exception as error:  # whatever it is, it belongs in the table
        facts = {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
    print(json.dumps(facts))


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Keep what is known."""
    table = [rows[spec] for spec in sorted(rows)]
    alike = sum(facts.get("difference", 1) <= TOLERANCE for facts in table)
    summary = {"models": len(table), "cut alike": alike, "share": alike / max(len(table), 1)}
    RESULTS.write_text(json.dumps({"summary": summary, "models": table}, indent=1) + "\n")


def main() -> None:
    """Run what is missing; the table is written after each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="specs, separated by commas; all of the table by default")
    parser.add_argument("--limit", type=int, default=300, help="seconds of processor time per model")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--again", action="store_true", help="also run models again that failed")
    parser.add_argument("--afresh", action="store_true", help="run models again that the results file has")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.limit)
        return
    from coverage import all_specs

    specs = options.models.split(",") if options.models else all_specs()
    known = [] if options.afresh or not RESULTS.exists() else json.loads(RESULTS.read_text())["models"]
    stale = {facts["model"] for facts in known if options.again and "error" in facts} & set(specs)
    rows = {facts["model"]: facts for facts in known if facts["model"] not in stale}
    with ThreadPoolExecutor(options.jobs) as pool:
        for facts in pool.map(lambda spec: run(spec, options), [spec for spec in specs if spec not in rows]):
            rows[facts["model"]] = facts
            write(rows)


if __name__ == "__main__":
    main()
