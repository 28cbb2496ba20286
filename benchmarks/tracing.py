"""How long graphs and cuts take, beside Torch-Pruning (extra `bench`), in one run.

    python benchmarks/tracing.py [--rounds 7]

For five models with random weights, one thread, all of it in turn in every round: our coupling and group table from a
finished `torch.export`, against Torch-Pruning's dependency graph and its enumeration of groups; our whole `trace`; and
a 50 % plan, applied (checked against the exported graph) and as `cut_along` cuts it in a search, against
Torch-Pruning's step. Seconds of processor time. Writes `results/tracing-<engine>-1t-<processor>.json`.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch_pruning
from common import result_file
from torch import nn
from torch_pruning_adapter import halving_pruner

import graphprune as gp
from graphprune import models
from graphprune.coupling import tracing
from graphprune.cutting.surgery import cut_along, operate, resolve
from graphprune.machine import environment

MODELS = ("resnet50", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "densenet121", "convnext_atto")


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of an action in seconds, and what it returns."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def coupled(program: torch.export.ExportedProgram, model: nn.Module) -> int:
    """Axes are coupled and groups are listed: how many."""
    return len(tracing.coupled(program, model).all_groups)


def enumerated(model: nn.Module, example: torch.Tensor) -> int:
    """The same of Torch-Pruning."""
    graph = torch_pruning.DependencyGraph().build_dependency(model, example)
    return len(list(graph.get_all_groups()))


def one_round(model: nn.Module, example: torch.Tensor) -> dict[str, float]:
    """Seconds of each step, ours and theirs one after the other."""
    found: dict[str, float] = {}
    inputs = (torch.cat([example, example])[:2],)
    program = tracing.export(tracing.fresh_copy(model), inputs, {})
    found["ours: coupling and groups"], _ = seconds(lambda: coupled(program, model))
    found["theirs: graph and groups"], _ = seconds(lambda: enumerated(copy.deepcopy(model), example))
    found["ours: whole trace"], graph = seconds(lambda: gp.trace(model, example))
    plan = gp.uniform_plan(graph, 0.5, align=8)
    found["ours: apply, checked"], operation = seconds(lambda: operate(model, graph, plan))
    cuts = resolve(graph, plan)
    found["ours: cut"], _ = seconds(lambda: cut_along(model, graph, cuts, operation.route))
    try:
        pruner = halving_pruner(copy.deepcopy(model), example, 0.5, 8)
        found["theirs: step"], _ = seconds(pruner.step)
    except Exception as error:  # whatever it raises, it has no time
        print(f"  Torch-Pruning's step: {type(error).__name__}: {error}")
    return found


def main() -> None:
    """Measure all models, write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--models", default=",".join(MODELS))
    options = made.parse_args()
    torch.set_num_threads(1)
    table: dict[str, dict[str, list[float]]] = {}
    for name in options.models.split(","):
        spec = f"timm:{name}"
        model = models.create(spec).eval()
        example = torch.randn(1, *models.default_input_size(spec, model))
        one_round(model, example)  # what is imported and compiled on first use is nobody's time
        rounds = [one_round(model, example) for _ in range(options.rounds)]
        table[name] = {step: [found[step] for found in rounds] for step in rounds[0]}
        print(name)
        for step, samples in table[name].items():
            print(f"  {step:28} {median(samples):7.3f} s ({min(samples):.3f} to {max(samples):.3f})", flush=True)
        body = {"seconds": table, "environment": environment()}
        result_file("tracing").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
