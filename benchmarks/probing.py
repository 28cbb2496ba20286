"""Which plans should be measured before a search, so that its target is the one that its plans really have.

    python benchmarks/probing.py --data DIR --weights DIR [--models resnet20,resnet56,vit] [--plans 12]

DATA is torchvision's CIFAR-10 folder or a folder of WebP sheets, WEIGHTS a folder with cifar10_<model>.safetensors;
those that `train.py` has written are found by themselves. What layers save is corrected by one factor, which is fitted
to a few measured plans: "random" ones, drawn uniformly under the action wall, and "likely" ones (`probing.py`: what a
search measures). With either factor the dynamic programme makes plans for half of the dense latency, for random weights
of the layers' errors, as a search would find them, and these are measured too, against the dense model, interleaved.
Nothing is judged or repaired. Run it with nothing beside it.

The table gives, for each model and kind, the mean predicted share of the measured plans (without correction), the
factor, and what share the searched plans have that are predicted to have half: mean, standard deviation, most. Writes
`results/probing-<engine>-1t-<processor>.json` with all samples; the results of other models in the file are kept.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean, stdev
from typing import Any

import numpy as np
from common import prepared, raw, result_file, timed, trained_parser
from signals import drawn

from graphprune.agents.random_search import random_walk
from graphprune.machine import environment
from graphprune.searching.probing import PROBE_SEED, PROBES, corrected, likely_plans, saving_factor
from graphprune.searching.problem import Choices, Problem
from graphprune.searching.search import Session, latency_cost

LATENCY = 0.5
ROUNDS = 20
Line = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    made = trained_parser(__doc__, "resnet20,resnet56,vit")
    made.add_argument("--plans", type=int, default=12, help="searched plans for each factor")
    made.add_argument("--images", type=int, default=250, help="validation images, which nothing is judged on")
    return made.parse_args()


def random_plans(problem: Problem, rng: np.random.Generator) -> list[Choices]:
    """As many as a search measures, drawn uniformly under the wall."""
    return [random_walk(problem, rng) for _ in range(PROBES)]


KINDS: dict[str, Callable[[Problem, np.random.Generator], list[Choices]]] = {
    "random": random_plans,
    "likely": likely_plans,
}


def measure(session: Session, plan: Choices, predicted: float) -> Line:
    """A plan's measured share of the dense latency, beside what is predicted."""
    cuts, example = session.candidates.cuts(plan), session.task.example_inputs
    found = timed(session.bench, cuts, session.stopwatch.dense, example, session.stopwatch.engine, ROUNDS)
    assert found is not None, "every plan that is offered runs"
    return {"choices": list(plan), "predicted": predicted, "measured": found.value, **raw(found)}


def run(session: Session, plans: int) -> Iterator[tuple[str, Line]]:
    """For each kind the measured probes, the factor they give, and the plans that are searched with it."""
    cost = latency_cost(session.candidates)
    problem = replace(session.problem(1, {"latency": LATENCY}), costs={"latency": cost})
    for kind, made in KINDS.items():
        chosen = made(problem, np.random.default_rng(PROBE_SEED))
        probes = [measure(session, plan, cost(plan)) for plan in chosen]
        factor = saving_factor([(line["predicted"], line["measured"]) for line in probes])
        scaled = corrected(cost, factor)
        searched = drawn(replace(problem, costs={"latency": scaled}), plans)
        yield kind, {
            "probes": probes, "factor": factor, "searched": [measure(session, plan, scaled(plan)) for plan in searched]
        }  # fmt: skip


def row(model: str, kind: str, found: Line) -> str:
    """One line of the table."""
    shares = [line["measured"] * LATENCY / line["predicted"] for line in found["searched"]]
    probed = mean(line["predicted"] for line in found["probes"])
    return (
        f"{model:12} {kind:8} {probed:8.3f} {found['factor']:8.3f} {mean(shares):9.3f} {stdev(shares):8.3f} "
        f"{max(shares):8.3f}"
    )


def main() -> None:
    """All models; the results of other models in the file are kept."""
    options = arguments()
    path = result_file("probing")
    models: dict[str, dict[str, Line]] = json.loads(path.read_text())["models"] if path.exists() else {}
    print(f"{'':12} {'':8} {'probed at':>8} {'factor':>7} {'searched':>9} {'deviation':>8} {'most':>7}")
    for model in options.models.split(","):
        models[model] = {}
        for kind, found in run(prepared(model, options, LATENCY), options.plans):
            models[model][kind] = found
            print(row(model, kind, found), flush=True)
        path.write_text(json.dumps({"latency": LATENCY, "models": models, "environment": environment()}) + "\n")


if __name__ == "__main__":
    main()
