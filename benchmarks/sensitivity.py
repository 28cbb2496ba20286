"""What it is worth to weight the errors of layers by what they do to the output, to which power, and by their depth.

    python benchmarks/sensitivity.py --data DIR --weights DIR [--models resnet20,resnet56] [--images 1000]

CIFAR-10 networks without fine-tuning; the depth was chosen on resnet14 and vit_depth3, on which no agent is judged. For
each way to weight, tables are made anew, and dynamic programming takes the plan of least error at some shares of the
predicted latency; costs are those of `FakeEngine`, the same for all. Each plan is repaired as in a search and judged on
validation images; no test set is read. Beside the accuracies stands how well each table orders all of the model's plans
(Kendall's tau between error and the deviation of the outputs). Rows are kept in `--work`. Writes
`results/sensitivity.json` and `.png`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from common import RESULTS, prepared, trained_parser
from equal_latency import Row, Rows
from scipy.stats import kendalltau

from graphprune.agents.dp import Solver
from graphprune.coupling.graph import ModelGraph
from graphprune.engines.fake import FakeEngine
from graphprune.machine import environment
from graphprune.repairing.calibration import Statistics
from graphprune.repairing.sensitivity import POWER, tempered
from graphprune.searching.deviation import Watched
from graphprune.searching.problem import Choices, Problem
from graphprune.searching.search import Session, latency_cost

matplotlib.use("Agg")

WAYS = ((0.0, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (0.75, 0.5), (0.75, 1.0))
"""Powers of what errors cause to first order, with the logarithms of how much more an error counts at the end of the
network; (0, 0) counts the errors of all layers alike."""
Way = tuple[float, float]
Weights = dict[tuple[str, str], float]
SHARES = (0.7, 0.6, 0.5, 0.45, 0.4, 0.35)


def arguments() -> argparse.Namespace:
    """The command line."""
    made = trained_parser(__doc__, "resnet14,vit_depth3,resnet20,resnet56,vit")
    made.add_argument("--images", type=int, default=1000, help="validation images")
    made.add_argument("--work", type=Path, default=Path("sensitivity_work"), help="folder for finished rows")
    return made.parse_args()


def weighted(weights: Weights, way: Way, graph: ModelGraph) -> Weights:
    """The weights as they would be in another way."""
    ones = tempered(dict.fromkeys(weights, 1.0), graph)
    causes = {name: (weight / ones[name]) ** (1 / POWER) for name, weight in weights.items()}
    return tempered(causes, graph, *way)


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
        return Solver(self.problem(share)).solve()

    def judged(self, choices: Choices) -> tuple[float, float]:
        """Accuracy on the validation images after repair, and the deviation of the outputs."""
        cuts, bench = self.candidates.cuts(choices), self.session.bench
        pruned = bench.build(cuts)
        watched = Watched(bench.answers(pruned, bench.file(pruned, cuts)), bench.dense_outputs)
        return self.session.task.judge(watched, 0.0).accuracy, watched.deviation


def work(name: str, options: argparse.Namespace, rows: Rows) -> None:
    """All rows of one model that are not there yet; then how each table orders the plans of all."""
    if rows.has(model=name, share=None):
        return
    session = prepared(name, options, min(SHARES), engine=FakeEngine(), batch_size=100)
    weights = session.candidates.statistics.weights
    made = {way: Tables(session, weighted(weights, way, session.graph)) for way in WAYS}
    found: list[tuple[Tables, Choices, float]] = []
    for (power, depth), tables in made.items():
        for share in SHARES:
            choices = tables.plan(share)
            assert choices is not None, "no plan is so fast"
            own = {"model": name, "power": power, "depth": depth, "share": share, "choices": list(choices)}
            known = [(row["accuracy"], row["deviation"]) for row in rows.rows if own.items() <= row.items()]
            accuracy, deviation = known[0] if known else tables.judged(choices)
            found.append((tables, choices, deviation))
            if not known:
                rows.add({**own, "accuracy": accuracy, "deviation": deviation})
                print(f"{name} {label((power, depth))}: {accuracy:.1%}, {deviation:.3f} at {share}", flush=True)
    taus = {}
    for way, tables in made.items():
        statistics = tables.candidates.statistics
        sums = {id(other): replace(other.candidates, statistics=statistics).error() for other in made.values()}
        errors = [sums[id(drafted)](choices) for drafted, choices, _ in found]
        taus[label(way)] = float(kendalltau(errors, [deviation for *_, deviation in found]).statistic)
    rows.add({"model": name, "share": None, "tau": taus, "dense": session.dense.accuracy})
    print(f"{name} Kendall's tau: {taus}", flush=True)


def label(way: Way) -> str:
    """How a way is named."""
    power, depth = way
    return "all alike" if way == (0, 0) else f"power {power}" + f", depth {depth}" * (depth > 0)


def draw(rows: Sequence[Row], file: Path) -> None:
    """Accuracy over the share of latency, a line for each way."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(5 * len(names), 4), layout="constrained", squeeze=False)
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.9, len(WAYS)))
    for panel, name in zip(panels[0], names, strict=True):
        for way, colour in zip(WAYS, colours, strict=True):
            points = [(row["share"], 100 * row["accuracy"]) for row in rows
                      if row["model"] == name and row["share"] and (row["power"], row["depth"]) == way]  # fmt: skip
            panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, color=colour, label=label(way))
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
