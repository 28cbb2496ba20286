"""How long a candidate's ONNX file takes: cut out of the dense graph, against `apply` and an export, in one run.

    python benchmarks/onnx_surgery.py [--models resnet20,vit_tiny] [--plans 5] [--rounds 60]

For models with random weights, one thread, and for each of some random plans (any level of any pattern at half of
the sites), all in turn: surgery on the dense ONNX graph with the weights of the cut module; `apply` and then
`torch.onnx.export`; `apply` and then the older exporter. Seconds of processor time. The files of surgery and of the
older exporter are then timed against each other in ONNX Runtime, which should run them alike. The dense graph's own
export, once for each model, is stated apart. Writes `results/onnx_surgery-<engine>-1t-<processor>.json`.
"""

import argparse
import contextlib
import io
import json
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from common import result_file
from torch import nn

import graphprune as gp
from graphprune import models
from graphprune.coupling.graph import ModelGraph
from graphprune.cutting.cuts import checked, join, resolve
from graphprune.errors import InputError
from graphprune.machine import environment
from graphprune.onnx_files.export import onnx_bytes
from graphprune.onnx_files.surgery import OnnxSurgeon
from graphprune.plan import Choice, Plan
from graphprune.randomness import seeded
from graphprune.registry import patterns

MODELS = {
    "resnet20": "cifar:resnet20",
    "resnet50": "timm:resnet50",
    "mobilenetv2_100": "timm:mobilenetv2_100",
    "vit_tiny": "timm:vit_tiny_patch16_224",
    "vit_base": "timm:vit_base_patch16_224",
}
BLOCK = 16
GOAL = 20
"""How many times faster surgery should be."""
SURGERY, EXPORT, OLDER = "surgery", "apply and torch.onnx.export", "apply and the older exporter"


def random_plan(graph: ModelGraph, rng: np.random.Generator) -> Plan:
    """Any level of any pattern at half of the sites, as far as the choices go together."""
    choices: list[Choice] = []
    for site in graph.all_sites:
        options = [(p, level) for p in patterns().values() if site.kind in p.kinds for level in p.levels(site, BLOCK)]
        if not options or rng.random() < 0.5:
            continue
        pattern, level = options[rng.integers(len(options))]
        choice = Choice(site.name, pattern.name, level.name, pattern.sample(site, level))
        with contextlib.suppress(InputError):
            plans = [Plan(graph.signature, (one,), graph.inputs) for one in (*choices, choice)]
            checked(graph, join(*(resolve(graph, plan) for plan in plans)))
            choices.append(choice)
    return Plan(graph.signature, tuple(choices), graph.inputs)


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of an action in seconds, and what it returns."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def exported(model: nn.Module, example: torch.Tensor) -> None:
    """torch's own export as a user calls it, to memory."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=shapes, verbose=False)


def one_plan(
    model: nn.Module, graph: ModelGraph, surgeon: OnnxSurgeon, plan: Plan, example: torch.Tensor
) -> tuple[dict[str, float], bytes, bytes]:
    """Seconds of each way, and the files of surgery and of the older exporter."""
    cuts = resolve(graph, plan)
    applying, pruned = seconds(lambda: gp.apply(model, plan, graph))
    surgery, ours = seconds(lambda: surgeon.cut(cuts, pruned.state_dict()))
    export, _ = seconds(lambda: exported(pruned, example))
    older, theirs = seconds(lambda: onnx_bytes(pruned, example))
    return (
        {SURGERY: surgery, EXPORT: applying + export, OLDER: applying + older, "of which apply": applying},
        ours,
        theirs,
    )


def examine(spec: str, plans: int, rounds: int) -> dict[str, Any]:
    """The facts of one model."""
    with seeded(0):
        model = models.create(spec).eval()
        example = torch.randn(2, *models.default_input_size(spec, model))
    graph = gp.trace(model, example)
    dense, surgeon = seconds(lambda: OnnxSurgeon(graph))
    rng = np.random.default_rng(0)
    rows = []
    one_plan(model, graph, surgeon, random_plan(graph, rng), example)  # what is imported on first use is nobody's time
    for _ in range(plans):
        plan = random_plan(graph, rng)
        found, ours, theirs = one_plan(model, graph, surgeon, plan, example)
        share = gp.measure([theirs, ours], rounds=rounds).shares[-1]
        ratio = {"value": share.value, "low": share.low, "high": share.high} if share is not None else None
        rows.append({"choices": len(plan.choices), "seconds": found, "latency_of_surgery_to_export": ratio})
        print(f"  {found}  latency {ratio}", flush=True)
    ratios = {name: median(row["seconds"][name] / row["seconds"][SURGERY] for row in rows) for name in (EXPORT, OLDER)}
    return {"dense_graph_seconds": dense, "plans": rows, "times_faster_than": ratios}


def main() -> None:
    """Measure the models, write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", default=",".join(MODELS), help="some of: " + ", ".join(MODELS))
    made.add_argument("--plans", type=int, default=5)
    made.add_argument("--rounds", type=int, default=60)
    options = made.parse_args()
    torch.set_num_threads(1)
    path = result_file("onnx_surgery")
    table: dict[str, Any] = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in options.models.split(","):
        print(name)
        table[name] = examine(MODELS[name], options.plans, options.rounds)
        facts = table[name]["times_faster_than"]
        print(f"  {facts}: {'reached' if facts[EXPORT] >= GOAL else 'missed'} {GOAL}x", flush=True)
        path.write_text(json.dumps({"models": table, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
