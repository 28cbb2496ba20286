"""Which models are cut alike by both routes: as torch modules, and as the ONNX files they were exported to.

    python benchmarks/onnx_in.py [--sample N] [--models SPEC,...]

The models of `coverage.py`, with random weights, a uniform plan at keep 0.5, one process and 300 seconds each.
Resumable: what is known of a model is kept in `--work`. Writes `results/onnx_in.json` when all are through.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
TOLERANCE = 1e-4


def examine(spec: str) -> dict[str, Any]:
    """The facts of one model: how far the cut file's outputs are from those of the cut module."""
    import torch

    sys.path.insert(0, str(ROOT))
    import graphprune as gp
    from graphprune import models
    from tests.graphprune.onnx_route import difference
    from tests.graphprune.oracle import scramble

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = scramble(models.create(spec).eval(), dtype=torch.float32)
    example = torch.randn(2, *models.default_input_size(spec, model))
    graph = gp.trace(model, example)
    plan = gp.uniform_plan(graph, 0.5, align=8)
    file = gp.export_onnx(model, Path(os.environ["ONNX_IN_FOLDER"]) / "dense.onnx", example, tolerance=1e-2)
    start = time.perf_counter()
    found = difference(model, graph, plan, file)
    return {"choices": len(plan.choices), "difference": found, "seconds": round(time.perf_counter() - start, 1)}


def run(spec: str, options: argparse.Namespace) -> dict[str, Any]:
    """The facts of one model, from the folder or from a new process."""
    from coverage import file_name

    folder = options.work / file_name(spec)
    known = folder / "facts.json"
    if known.exists():
        facts: dict[str, Any] = json.loads(known.read_text())
        if "error" not in facts or not options.again:
            return facts
    folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "ONNX_IN_FOLDER": str(folder)}
    command = [sys.executable, __file__, "--one", spec]
    facts = {"model": spec}
    try:
        done = subprocess.run(command, timeout=options.limit, capture_output=True, text=True, check=False, env=env)
        lines = done.stdout.strip().splitlines()
        facts |= json.loads(lines[-1]) if lines else {"error": f"the process ended with {done.returncode}"}
    except subprocess.TimeoutExpired:
        facts["error"] = f"not done in {options.limit} s"
    (folder / "dense.onnx").unlink(missing_ok=True)
    known.write_text(json.dumps(facts))
    print(f"{spec:50} {facts.get('difference', float('nan')):.1e} {facts.get('error', '')}", flush=True)
    return facts


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="specs, separated by commas; all of the table by default")
    parser.add_argument("--sample", type=int, default=0, help="that many of them, drawn with seed 0")
    parser.add_argument("--limit", type=float, default=300, help="seconds per model")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--again", action="store_true", help="also run models again that failed")
    parser.add_argument("--work", type=Path, default=Path("onnx_in_work"))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        try:
            facts = examine(options.one)
        except Exception as error:  # whatever it is, it belongs in the table
            facts = {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"}
        print(json.dumps(facts))
        return
    from coverage import all_specs

    specs = options.models.split(",") if options.models else all_specs()
    if options.sample:
        specs = random.Random(0).sample(specs, options.sample)
    with ThreadPoolExecutor(options.jobs) as pool:
        table = list(pool.map(lambda spec: run(spec, options), specs))
    equal = [facts for facts in table if facts.get("difference", 1) <= TOLERANCE]
    summary = {"models": len(table), "cut alike": len(equal), "share": len(equal) / max(len(table), 1)}
    print(json.dumps(summary))
    if not options.models and not options.sample:
        (RESULTS / "onnx_in.json").write_text(json.dumps({"summary": summary, "models": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
