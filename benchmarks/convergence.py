"""Agents against each other: how good the best plan is after how many evaluated plans.

    python benchmarks/convergence.py --data DIR --weights DIR [--models resnet20] [--agents dp,autosculpt,random]

DATA is torchvision's CIFAR-10 folder or a folder of WebP sheets, WEIGHTS a folder with cifar10_<model>.safetensors;
those that `train.py` has written are found by themselves. The target is half of the dense latency. All agents of a
model share one study, so the same tables and the same latency correction, and a plan that two of them find is judged
once; tables and correction are made once for a run. What is predicted differs from hour to hour by some per cent, and
how good plans can be with it, by points: only searches on the same `tables` (a short hash) compare. What counts is the
validation accuracy of the best plan so far that meets the target (by prediction and, where it was measured, by
measurement); the last column is the latency of the plan that each search returned, measured in a process of its own. No
test set is read, nothing is fine-tuned.

`autosculpt:scratch` starts without the pretrained policy; so do its ablations, each without one thing that it sees:
`autosculpt:random-nodes`, `autosculpt:no-patterns`, `autosculpt:no-gnn`, `autosculpt:no-errors`. `amc:transfer`,
`amc:augment` and `amc:assistant` are `amc` with one boost from history, `amc:transfer+augment` with two, `amc:boosted`
with all: they have read the study of an earlier run of `amc` on the other model (`EARLIER`), which is made where it is
missing. A second table says after how many trials their mean reaches what `amc` ends with, and how many times sooner
that is than `amc` itself.

Resumable: a finished search is a line in WORK/convergence.jsonl; a killed one goes on from its study. Several runs may
share WORK: a search that another one is at is left to it. Writes all that is there, every trial, and what was there of
earlier runs, to `results/convergence-<engine>-1t-<processor>.json`, and draws the searches of this run with the given
number of trials: `...-<trials>trials.png`.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import case, claimed, prepared, result_file, spread, trained_parser
from equal_latency import Rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from graphprune.agents import create
from graphprune.agents.amc import Amc
from graphprune.agents.autosculpt import AutoSculpt
from graphprune.agents.base import Agent
from graphprune.agents.encoder import Sight
from graphprune.machine import environment
from graphprune.record import Record
from graphprune.searching.past import PROBLEM, History
from graphprune.searching.search import Session

LATENCY = 0.5
MARKS = (10, 25, 50, 100, 200)
"""Numbers of trials in the table."""
SIGHTS: dict[str, dict[str, Any]] = {
    "autosculpt:scratch": {"policy": None},
    "autosculpt:random-nodes": {"policy": None, "sight": Sight(nodes=False)},
    "autosculpt:no-patterns": {"policy": None, "sight": Sight(patterns=False)},
    "autosculpt:no-gnn": {"policy": None, "sight": Sight(graph=False)},
    "autosculpt:no-errors": {"policy": None, "sight": Sight(errors=False)},
}
"""Settings of the main agent, by the name that goes into tables and studies."""
BOOSTS: dict[str, dict[str, bool]] = {
    "amc:transfer": {"transfer": True},
    "amc:augment": {"augment": True},
    "amc:transfer+augment": {"transfer": True, "augment": True},
    "amc:assistant": {"assistant": True},
    "amc:boosted": {"transfer": True, "augment": True, "assistant": True},
}
"""What `amc` takes from history, likewise."""
EARLIER = {"resnet20": "resnet56", "resnet56": "resnet20", "vit": "resnet20"}
"""Model -> the one whose search is its history."""
EARLIER_SEED = 1000
SCRATCH = "amc"
COLUMNS = 2
"""Panels side by side."""
FAMILIES: dict[str, Callable[[str], bool]] = {
    "all agents": lambda agent: ":" not in agent,
    "what autosculpt sees": lambda agent: agent.startswith("autosculpt"),
    "what amc takes from history": lambda agent: agent.startswith(SCRATCH),
}
"""What panels compare -> which agents are in them."""
Line = dict[str, Any]
"""One search: model, agent, seed, trials, `accuracy` of each trial (None where it missed the target or failed), ..."""


def arguments() -> argparse.Namespace:
    """The command line."""
    made = trained_parser(__doc__, "resnet20")
    made.add_argument("--agents", default="dp,autosculpt,random")
    made.add_argument("--trials", type=int, default=200)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--images", type=int, default=1000, help="validation images")
    made.add_argument("--work", type=Path, default=Path("convergence_work"), help="folder for studies and searches")
    return made.parse_args()


def agent_named(name: str, model: str, options: argparse.Namespace) -> Agent:
    """A new agent, or a variant of one."""
    if name in SIGHTS:
        agent: Agent = AutoSculpt(**SIGHTS[name])
    elif name in BOOSTS:
        boosts = BOOSTS[name]
        reads = boosts.get("transfer") or boosts.get("augment")
        agent = Amc(History(earlier(EARLIER[model], options) if reads else None, **boosts))
    else:
        return create(name)
    agent.name = name
    return agent


def earlier(model: str, options: argparse.Namespace) -> Path:
    """The study of a finished search by `amc` from scratch, made now if it is missing."""
    study: Path = options.work / f"earlier-{model}.db"
    finished = study.with_suffix(".done")
    if not finished.exists():
        prepared(model, options, LATENCY, study).solve(create(SCRATCH), options.trials, EARLIER_SEED)
        finished.touch()
    return study


def search(session: Session, model: str, agent: str, seed: int, options: argparse.Namespace) -> Line:
    """One search, from its study where it was begun before, and what is published of it."""
    made = agent_named(agent, model, options)
    start = time.perf_counter()
    found = session.verify(session.solve(made, options.trials, seed), made.name, seed)
    measured = found.record.measured
    assert measured is not None
    return {
        "model": model, "tables": tables(session), "agent": agent, "seed": seed, "trials": options.trials,
        "images": options.images,
        "accuracy": [counted(record) for record in found.records],
        "returned": found.record.accuracy, "met": found.met,
        "latency": [measured.value, measured.low, measured.high],
        "plan": json.loads(found.plan.to_json()),
        "seconds": time.perf_counter() - start, "seconds_in_trials": sum(record.seconds for record in found.records),
    }  # fmt: skip


def tables(session: Session) -> str:
    """Names the tables on which a search was made."""
    packed = session.study.attachment(PROBLEM)
    assert packed is not None
    return sha256(packed).hexdigest()[:8]


def counted(record: Record) -> float | None:
    """The accuracy of a record that meets the target."""
    return record.accuracy if record.feasible else None


def curve(line: Line) -> list[float]:
    """The best accuracy after each trial, NaN while there is none; after an early end the last value stays."""
    best, values = float("nan"), []
    for accuracy in line["accuracy"]:
        best = best if accuracy is None else float(np.fmax(best, accuracy))
        values.append(best)
    return values + [best] * (line["trials"] - len(values))


def table(lines: Sequence[Line]) -> str:
    """What is printed at the end: mean over seeds (and the range)."""
    trials = lines[0]["trials"]
    marks = [mark for mark in MARKS if mark <= trials]
    head = f"{'model':10} {'tables':8} {'agent':24}"
    text = [head + "".join(f"{f'after {mark}':>22}" for mark in marks) + "   returned at"]
    for (model, shared), agent in dict.fromkeys((case(line), line["agent"]) for line in lines):
        own = [line for line in lines if (case(line), line["agent"]) == ((model, shared), agent)]
        cells = [spread([curve(line)[mark - 1] for line in own]) for mark in marks]
        shares = ", ".join(f"{line['latency'][0]:.3f}" for line in own)
        row = f"{model:10} {shared:8} {agent:24}"
        text.append(row + "".join(f"{cell:>22}" for cell in cells) + f"   {shares}")
    return "\n".join(text)


def sooner(lines: Sequence[Line]) -> str:
    """After how many trials the boosted variants reach, on average over seeds, what `amc` ends with."""
    text = []
    for shared in dict.fromkeys(map(case, lines)):
        means = {
            agent: np.mean([curve(line) for line in lines if (case(line), line["agent"]) == (shared, agent)], axis=0)
            for agent in (SCRATCH, *BOOSTS)
            if any((case(line), line["agent"]) == (shared, agent) for line in lines)
        }
        if SCRATCH not in means:
            continue
        goal = means[SCRATCH][-1]
        own = reached(means[SCRATCH], goal)
        for agent, mean_curve in means.items():
            at = reached(mean_curve, goal)
            found = "never" if at is None else f"after {at:3} trials, {own / at:.2f} times as fast"  # type: ignore[operator]
            text.append(f"{shared[0]:10} {agent:24} {goal:.1%} {found}")
    return "\n".join(text)


def reached(values: Sequence[float], goal: float) -> int | None:
    """The first trial, from 1, at which a curve is no lower than a goal."""
    return next((trial for trial, value in enumerate(values, 1) if value >= goal), None)


def plot(lines: Sequence[Line], path: Path) -> None:
    """A panel for each model, its tables and each of `FAMILIES` that has several agents there, or for single ones where
    none has: the mean over seeds of the best accuracy so far, and the range.
    """
    agents = list(dict.fromkeys(line["agent"] for line in lines))
    panels = []
    for (title, belongs), shared in product(FAMILIES.items(), dict.fromkeys(map(case, lines))):
        own = [line for line in lines if case(line) == shared and belongs(line["agent"])]
        found = {agent: [curve(line) for line in own if line["agent"] == agent] for agent in agents}
        curves = {agent: 100 * np.array(some) for agent, some in found.items() if np.isfinite(some).any()}
        if curves:
            panels.append((f"{shared[0]}, {title} (tables: {shared[1]})", curves))
    panels = [(title, curves) for title, curves in panels if len(curves) > 1] or panels
    rows = max(1, -(-len(panels) // COLUMNS))
    figure = Figure(figsize=(6.4 * COLUMNS, 4.6 * rows), layout="constrained")
    for number, (title, curves) in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, number)
        panel(axes, curves, agents)
        axes.set_title(title, fontsize=11)
    figure.suptitle(f"without fine-tuning, at {LATENCY:.0%} of the dense latency; mean and range of seeds", fontsize=11)
    figure.savefig(path, dpi=90)


def panel(axes: Axes, curves: dict[str, NDArray[np.float64]], agents: Sequence[str]) -> None:
    """The curves [seeds, trials] of some of all agents, the best named first; an agent has one colour everywhere."""
    best = sorted(curves, key=lambda agent: -curves[agent][:, -1].mean())
    for number, agent in enumerate(best):
        found, colour = curves[agent], matplotlib.colormaps["tab20"](agents.index(agent) % 20)
        trials = np.arange(1, found.shape[1] + 1)
        seeds = "" if len(found) == 1 else f", {len(found)} seeds"
        label = f"{agent} {found[:, -1].mean():.1f}{seeds}"
        axes.plot(trials, found.mean(0), color=colour, linewidth=2 if number < 3 else 1.2, label=label)
        axes.fill_between(trials, found.min(0), found.max(0), color=colour, alpha=0.12, linewidth=0)
    top = max(float(found[:, -1].max()) for found in curves.values())
    low = max(top - 20, min(float(np.nanmin(found)) for found in curves.values()) - 1)
    axes.set(xlabel="evaluated plans", ylabel="validation top-1 of the best plan so far, %", ylim=(low, top + 1))
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(MARKS))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Run what is missing, write all."""
    options = arguments()
    file, setting = options.work / "convergence.jsonl", {"trials": options.trials, "images": options.images}
    for model in options.models.split(","):
        search_missing(model, file, setting, options)
    lines = Rows(file).rows
    own = [line for line in lines if setting.items() <= line.items()]
    write([*(line for line in published() if line not in lines), *lines], own)
    print(table(own))
    print(sooner(own))


def search_missing(model: str, file: Path, setting: Line, options: argparse.Namespace) -> None:
    """The searches of a model that are not in the file yet, and that no other run is at."""
    session = None
    for seed, agent in product(range(options.seeds), options.agents.split(",")):
        with claimed(options.work / "locks" / f"{model} {agent} {seed} {options.trials}") as ours:
            if not ours or Rows(file).has(model=model, agent=agent, seed=seed, **setting):
                continue
            session = session or prepared(model, options, LATENCY, options.work / f"{model}.db")
            line = search(session, model, agent, seed, options)
            Rows(file).add(line)
            print(f"{model} {agent} seed {seed}: {curve(line)[-1]:.2%}, {line['seconds']:.0f} s", flush=True)


def published() -> list[Line]:
    """The searches that an earlier run on such a machine has published."""
    file = result_file("convergence")
    return list(json.loads(file.read_text())["searches"]) if file.exists() else []


def write(lines: Sequence[Line], drawn: Sequence[Line]) -> None:
    """The results so far, and a picture of those that are `drawn`, which all have one number of trials."""
    body = {"latency": LATENCY, "searches": list(lines), "environment": environment()}
    file = result_file("convergence")
    file.write_text(json.dumps(body) + "\n")
    plot(drawn, file.with_name(f"{file.stem}-{drawn[0]['trials']}trials.png"))


if __name__ == "__main__":
    main()
