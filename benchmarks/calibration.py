"""Calibration and the whole table of errors at scale: how long they take, and in how much memory.

    python benchmarks/calibration.py [--models vit_base,resnet50] [--images 256] [--threads 2]

Random weights, images of normal noise at 224x224, in batches of `--batch`, which is what tasks use. One process for
each model, two threads. In turn: the trace, the moments of all layers (`calibrate`), the weights of their errors
(`sensitivities`), the options of all sites with the engine's times computed (`collect`, on a `FakeEngine`), and the
error of each layer under each combination of options (`error`). Memory is the most that the process holds, in bytes,
in each step and in all of them, and how much of that is beyond what it held when the model had just been made. The aim
is `MOST_SECONDS` on the wall for all but the trace, and `MOST_MEMORY` for the whole process. Writes
`results/calibration-<engine>-<threads>t-<processor>.json`, model by model. Linux only.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, Spent, in_own_process, result_stem, spent

import graphprune as gp
from graphprune import models
from graphprune.engines.fake import FakeEngine
from graphprune.machine import environment
from graphprune.randomness import seeded
from graphprune.registry import chosen_patterns
from graphprune.repairing.calibration import calibrate
from graphprune.repairing.sensitivity import sensitivities
from graphprune.searching.candidates import Candidates
from graphprune.timing.profile import Profile

MODELS = {
    "vit_base": "timm:vit_base_patch16_224",
    "resnet50": "timm:resnet50",
    "resnet20": "cifar:resnet20",
}
"""Name -> spec; the last is for a quick look."""
MOST_SECONDS = 360
MOST_MEMORY = 4 * 2**30
TRACE = "trace"
GIBIBYTE = 2**30


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", default="vit_base,resnet50", help="some of: " + ", ".join(MODELS))
    made.add_argument("--images", type=int, default=256)
    made.add_argument("--batch", type=int, default=128, help="images in one pass of the calibration")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return made.parse_args()


def examine(spec: str, count: int, batch: int) -> dict[str, Any]:
    """What each step takes for one model."""
    steps: dict[str, Spent] = {}

    def step(name: str, action: Callable[[], Any]) -> Any:
        steps[name], result = spent(action)
        print(f"  {name:14} {steps[name].wall:7.1f} s  {steps[name].peak / GIBIBYTE:5.2f} GiB", flush=True)
        return result

    with seeded(0):
        module = models.create(spec).eval()
        start = spent(lambda: None)[0].peak
        images = torch.randn(count, *models.default_input_size(spec, module)).split(batch)
    graph = step(TRACE, lambda: gp.trace(module, images[0][:2]))
    statistics = step("calibrate", lambda: calibrate(graph, images))
    statistics.weights = step("sensitivities", lambda: sensitivities(graph, statistics, images))
    nothing_kept = Path(os.devnull)
    candidates = Candidates(graph, Profile(FakeEngine(), nothing_kept), chosen_patterns(None), statistics)
    step("collect", candidates.collect)
    error = step("error", candidates.error)
    return {
        "model": spec, "images": count, "batch": batch, "layers": len(graph.layers), "sites": len(candidates.sites),
        "entries": sum(factor.table.size for factor in error.factors), "start": start,
        "steps": {name: asdict(took) for name, took in steps.items()}, **summary(steps, start),
    }  # fmt: skip


def summary(steps: dict[str, Spent], start: int) -> dict[str, Any]:
    """Seconds of all but the trace, the peak of all, and whether both are within the aim."""
    wall = sum(took.wall for name, took in steps.items() if name != TRACE)
    peak = max(took.peak for took in steps.values())
    reached = wall <= MOST_SECONDS and peak <= MOST_MEMORY
    return {"wall": wall, "peak": peak, "beyond the model": peak - start, "reached": reached}


def main() -> None:
    """Measure the models, write the table; the results of other models in the file are kept."""
    options = arguments()
    path = options.out / f"{result_stem('calibration', options.threads, 1).name}.json"
    table: dict[str, Any] = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in options.models.split(","):
        print(name, flush=True)
        found = in_own_process(examine, MODELS[name], options.images, options.batch, threads=options.threads)
        table[name] = found
        print(
            f"  all but the trace {found['wall']:.1f} s, peak {found['peak'] / GIBIBYTE:.2f} GiB, of which "
            f"{found['beyond the model'] / GIBIBYTE:.2f} beyond the model: "
            f"{'reached' if found['reached'] else 'missed'}", flush=True,
        )  # fmt: skip
        path.write_text(json.dumps({"models": table, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
