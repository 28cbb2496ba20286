"""What it is worth to weight the errors of layers by what they do to the output, and to which power.

    python benchmarks/sensitivity.py --data DIR --weights DIR [--models resnet20,resnet56] [--images 1000]

CIFAR-10 ResNets without fine-tuning. For each way to weight, tables are made anew and dynamic programming takes the
plan of least error at each of `SHARES` of the predicted latency; costs are those of `FakeEngine`, the same for all.
Each plan is repaired as in a search and judged on validation images; no test set is read. Beside the accuracies stands
how well each table orders all of the model's plans (Kendall's tau between error and accuracy). Rows are kept in
`--work`. Writes `results/sensitivity.json` and `.png`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from common import RESULTS, prepared
from equal_latency import Row, Rows
from scipy.stats import kendalltau

from graphprune.agents.dp import Solver
from graphprune.calibration import Statistics
from graphprune.engines.fake import FakeEngine
from graphprune.machine import environment
from graphprune.problem import Choices, Problem
from graphprune.search import Session, latency_cost
from graphprune.sensitivity import POWER

matplotlib.use("Agg")

POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""0 counts the errors of all layers alike."""
Weights = dict[tuple[str, str], float]
SHARES = (0.7, 0.6, 0.5, 0.45, 0.4, 0.35)


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="folder with CIFAR-10")
    made.add_argument("--weights", required=True, type=Path, help="folder with cifar10_<model>.safetensors")
    made.add_argument("--models", default="resnet20,resnet56")
    made.add_argument("--images", type=int, default=1000, help="validation images")
    made.add_argument("--work", type=Path, default=Path("sensitivity_work"), help="folder for finished rows")
    return made.parse_args()


def to_the_power(weights: Weights, power: float, layers: set[str]) -> Weights:
    """The weights as they would be with another `POWER`; their mean over the layers is 1."""
    raised = {name: weight ** (power / POWER) for name, weight in weights.items()}
    mean = np.mean([value for (node, _), value in raised.items() if node in layers])
    return {name: float(weight / mean) for name, weight in raised.items()}


class Tables:
    """The tables of one way to weight."""

    def __init__(self, session: Session, weights: Weights) -> None:
        self.session = session
        known = session.candidates.statistics
        statistics = Statistics(known, known.branches, known.scores)
        statistics.weights = weights
        self.candidates = replace(session.candidates, statistics=statistics, drafts={})
        self.candidates.collect()
        costs = {"latency": latency_cost(self.candidates)}
        self.tables = replace(session, candidates=self.candidates, costs=costs, error=self.candidates.error())

    def problem(self, share: float) -> Problem:
        """The problem at a share of the predicted latency."""
        return self.tables.problem(1, {"latency": share})

    def plan(self, share: float) -> Choices | None:
        """The plan of least error."""
        solver = Solver(self.problem(share))
        return solver.solve(1.0, 1.0, np.ones(len(solver.components)))

    def accuracy(self, choices: Choices) -> float:
        """On the validation images, after repair."""
        cuts, bench = self.candidates.cuts(choices), self.session.bench
        pruned = bench.build(cuts)
        return self.session.task.judge(bench.answers(pruned, bench.file(pruned, cuts)), 0.0).accuracy


def work(name: str, options: argparse.Namespace, rows: Rows) -> None:
    """All rows of one model that are not there yet; then how each table orders the plans of all."""
    if rows.has(model=name, share=None):
        return
    session = prepared(name, options, min(SHARES), engine=FakeEngine(), batch_size=100)
    statistics = session.candidates.statistics
    weights = statistics.weights
    layers = {layer.node for layer in session.graph.layers}
    made = {power: Tables(session, to_the_power(weights, power, layers)) for power in POWERS}
    found: list[tuple[Tables, Choices, float]] = []
    for power, tables in made.items():
        for share in SHARES:
            choices = tables.plan(share)
            assert choices is not None, "no plan is so fast"
            own = {"model": name, "power": power, "share": share, "choices": list(choices)}
            known = [row["accuracy"] for row in rows.rows if own.items() <= row.items()]
            accuracy = known[0] if known else tables.accuracy(choices)
            found.append((tables, choices, accuracy))
            if not known:
                rows.add({**own, "accuracy": accuracy})
                print(f"{name} to the power of {power}: {accuracy:.1%} at {share}", flush=True)
    accuracies = [accuracy for *_, accuracy in found]
    taus = {}
    for power, tables in made.items():
        statistics = tables.candidates.statistics
        sums = {id(other): replace(other.candidates, statistics=statistics).error() for other in made.values()}
        errors = [sums[id(drafted)](choices) for drafted, choices, _ in found]
        taus[str(power)] = float(-kendalltau(errors, accuracies).statistic)
    rows.add({"model": name, "share": None, "tau": taus, "dense": session.dense.accuracy})
    print(f"{name} Kendall's tau: {taus}", flush=True)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Accuracy over the share of latency, a line for each power."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False)
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, len(POWERS)))
    for panel, name in zip(panels[0], names, strict=True):
        for power, colour in zip(POWERS, colours, strict=True):
            points = [(row["share"], 100 * row["accuracy"]) for row in rows
                      if row["model"] == name and row["share"] and row["power"] == power]  # fmt: skip
            label = f"power {power}" if power else "all alike"
            panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, color=colour, label=label)
        panel.set(title=f"{name}, no fine-tuning", xlabel="predicted latency, share of dense")
        panel.set_ylabel("validation top-1, %")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def main() -> None:
    """Every row, then the file and the picture."""
    options = arguments()
    torch.set_num_threads(1)
    rows = Rows(options.work / "sensitivity.jsonl")
    for name in options.models.split(","):
        work(name, options, rows)
    file = RESULTS / "sensitivity.json"
    file.write_text(json.dumps({"rows": rows.rows, "environment": environment()}, indent=1) + "\n")
    draw(rows.rows, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
