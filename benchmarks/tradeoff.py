"""A whole trade-off curve: one run of `sparrl` against one run for each budget of the other agents.

    python benchmarks/tradeoff.py --data DIR --weights DIR [--models resnet20] [--seeds 3]

`sparrl` searches once, for all budgets together, with as many plans as the others may try at all of them (`TOGETHER`,
an equal share for each budget); the last plan for each is what its trained agent proposes when it is asked for one. The
others search anew for each budget, with the same share of those plans. What counts is the area under the curve: the
mean, over the budgets, of the validation accuracy of the best plan tried so far that is predicted to meet the budget,
whichever search tried it. Nothing is fine-tuned, no test set is read.

Resumable: a finished curve is a line in WORK/tradeoff.jsonl. Writes `results/tradeoff-<engine>-1t-<processor>.json`
(every plan's latency and accuracy) and `.png`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, product, zip_longest
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
from common import prepared, result_file, spread, trained_parser
from equal_latency import Row, Rows
from matplotlib.figure import Figure

from graphprune.agents import create
from graphprune.agents.sparrl import SparRL
from graphprune.machine import environment
from graphprune.record import Record
from graphprune.searching.problem import Problem
from graphprune.searching.search import MARGIN, Session

BUDGETS = (0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the dense latency, evenly spaced, the tightest last."""
TOGETHER = 200
EACH = TOGETHER // len(BUDGETS)
ONE_RUN = "sparrl, one run"
ASKED = "sparrl, one run, its curve alone"
"""What the trained agent proposes, the plans that its search tried left out."""
SEPARATE = ("dp", "dp+local", "autosculpt", "sparrl", "bocr", "tpe", "random", "uniform")


def arguments() -> argparse.Namespace:
    """The command line."""
    made = trained_parser(__doc__, "resnet20")
    made.add_argument("--agents", default=",".join(SEPARATE), help="those that search for each budget anew")
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--images", type=int, default=1000, help="validation images")
    made.add_argument("--work", type=Path, default=Path("tradeoff_work"), help="folder for studies and curves")
    return made.parse_args()


def one_run(session: Session, seed: int) -> dict[str, list[Record]]:
    """What one search tried for all budgets, in turns, and what its agent proposes for each afterwards."""
    agent, rng = SparRL(), np.random.default_rng(seed)
    problems = [one.pose("sparrl:together", EACH - 1, seed) for one in for_each_budget(session)]
    agent.run_together(problems, rng)
    proposed = agent.curve(problems[-1], [problem.limits for problem in problems], rng)
    asked = [one.pose("sparrl:curve", 1, seed) for one in for_each_budget(session)]
    for problem, plan in zip(asked, proposed, strict=True):
        problem.evaluate(plan)
    return {ONE_RUN: [*in_turns(problems), *in_turns(asked)], ASKED: in_turns(asked)}


def separate_runs(session: Session, name: str, seed: int) -> list[Record]:
    """What the searches for all budgets tried, in turns."""
    return in_turns([one.solve(create(name), EACH, seed) for one in for_each_budget(session)])


def for_each_budget(session: Session) -> list[Session]:
    """The same session at each budget."""
    return [replace(session, limits={"latency": budget}) for budget in BUDGETS]


def in_turns(problems: Sequence[Problem]) -> list[Record]:
    """The records of some problems, the first of each, the second of each, ..."""
    records = zip_longest(*(problem.records for problem in problems))
    return [record for record in chain(*records) if record is not None]


def line(model: str, name: str, seed: int, images: int, records: Sequence[Record]) -> Row:
    """What is published of a curve; a plan that was given up as hopeless has no accuracy."""
    tried = [(record.predicted["latency"], None if record.images else record.accuracy) for record in records]
    return {"model": model, "agent": name, "seed": seed, "images": images, "tried": tried}


def areas(row: Row) -> list[float]:
    """The mean over budgets of the best accuracy after each plan; a budget that nothing meets yet counts as 0."""
    best, found = dict.fromkeys(BUDGETS, 0.0), []
    for latency, accuracy in row["tried"]:
        for budget in BUDGETS:
            if latency <= budget * MARGIN * (1 + 1e-9) and accuracy is not None:
                best[budget] = max(best[budget], accuracy)
        found.append(mean(best.values()))
    return found


def table(rows: Sequence[Row]) -> str:
    """The area at the end, and what it takes to get there."""
    text = [f"{'model':10} {'agent':34} {'plans':>6} {'area':>22}   plans of '{ONE_RUN}' to the same area"]
    for model, name in dict.fromkeys((row["model"], row["agent"]) for row in rows):
        own = [areas(row) for row in rows if (row["model"], row["agent"]) == (model, name)]
        ends = [one[-1] for one in own]
        ours = np.mean([areas(row) for row in rows if (row["model"], row["agent"]) == (model, ONE_RUN)], axis=0)
        reached = np.flatnonzero(ours >= mean(ends))
        text.append(
            f"{model:10} {name:34} {max(map(len, own)):6} {spread(ends, 2):>22}   "
            + (str(reached[0] + 1) if len(reached) else "never")
        )
    return "\n".join(text)


def plot(rows: Sequence[Row], path: Path) -> None:
    """The area after each plan, the mean over seeds: a panel for each model."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(7 * len(names), 4.4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for number, name in enumerate(dict.fromkeys(row["agent"] for row in rows)):
            own = [areas(row) for row in rows if (row["model"], row["agent"]) == (model, name)]
            longest = max(map(len, own), default=0)
            if longest:
                curves = 100 * np.array([one + [one[-1]] * (longest - len(one)) for one in own])
                colour, thick = matplotlib.colormaps["tab10"](number), 2.4 if name == ONE_RUN else 1.3
                label = f"{name}: {curves[:, -1].mean():.1f}"
                axes.plot(range(1, longest + 1), curves.mean(0), color=colour, linewidth=thick, label=label)
        axes.set(title=model, xlabel="evaluated plans, all budgets together", ylim=(40, None))
        axes.set_ylabel("best top-1, mean over budgets, %")
        axes.legend(frameon=False, fontsize=8, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is missing, write all."""
    options = arguments()
    kept = Rows(options.work / "tradeoff.jsonl")
    for model in options.models.split(","):
        session = None
        for seed, name in product(range(options.seeds), (ONE_RUN, *options.agents.split(","))):
            if kept.has(model=model, agent=name, seed=seed, images=options.images):
                continue
            session = session or prepared(model, options, BUDGETS[-1], options.work / f"{model}.db")
            found = one_run(session, seed) if name == ONE_RUN else {name: separate_runs(session, name, seed)}
            for label, records in reversed(found.items()):  # the one that says "done" is kept last
                kept.add(line(model, label, seed, options.images, records))
                print(f"{model} {label} seed {seed}: {areas(kept.rows[-1])[-1]:.2%}", flush=True)
    body = {"budgets": BUDGETS, "together": TOGETHER, "curves": kept.rows, "environment": environment()}
    file = result_file("tradeoff")
    file.write_text(json.dumps(body, indent=1) + "\n")
    plot(kept.rows, file.with_suffix(".png"))
    print(table(kept.rows))


if __name__ == "__main__":
    main()
