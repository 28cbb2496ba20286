"""Agents against each other: how good the best plan is after how many evaluated plans.

    python benchmarks/convergence.py --data DIR --weights DIR [--models resnet20] [--agents dp,autosculpt,random]

DATA is torchvision's CIFAR-10 folder or a folder of WebP sheets, WEIGHTS a folder with cifar10_<model>.safetensors. The
target is half of the dense latency. All agents of a model share one study, so the same tables and the same latency
correction, and a plan that two of them find is judged once. What counts is the validation accuracy of the best plan so
far that meets the target (by prediction and, where it was measured, by measurement); the last column is the latency of
the plan that each search returned, measured in a process of its own. No test set is read, nothing is fine-tuned.
`autosculpt:scratch` starts without the pretrained policy; so do its ablations, each without one thing that it sees:
`autosculpt:random-nodes`, `autosculpt:no-patterns`, `autosculpt:no-gnn`, `autosculpt:no-errors`.

Resumable: a finished search is a line in WORK/convergence.jsonl, a killed one goes on from its study. Writes
`results/convergence-<engine>-1t-<processor>.json` (every trial) and `.png`.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from common import result_file, result_stem
from matplotlib.figure import Figure

import graphprune as gp
from graphprune import models
from graphprune.agents import create
from graphprune.agents.autosculpt import AutoSculpt
from graphprune.agents.base import Agent
from graphprune.agents.encoder import Sight
from graphprune.machine import environment
from graphprune.record import Record

LATENCY = 0.5
MARKS = (10, 25, 50, 100, 200)
"""Numbers of trials in the table."""
COLOURS = {"autosculpt": "#0072b2", "dp": "#d55e00", "random": "#777777", "uniform": "#009e73", "magnitude": "#cc79a7"}
VARIANTS: dict[str, dict[str, Any]] = {
    "autosculpt:scratch": {"policy": None},
    "autosculpt:random-nodes": {"policy": None, "sight": Sight(nodes=False)},
    "autosculpt:no-patterns": {"policy": None, "sight": Sight(patterns=False)},
    "autosculpt:no-gnn": {"policy": None, "sight": Sight(graph=False)},
    "autosculpt:no-errors": {"policy": None, "sight": Sight(errors=False)},
}
"""Settings of the main agent, by the name that goes into tables and studies."""
Line = dict[str, Any]
"""One search: model, agent, seed, trials, `accuracy` of each trial (None where it missed the target or failed), ..."""


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="folder with CIFAR-10")
    made.add_argument("--weights", required=True, type=Path, help="folder with cifar10_<model>.safetensors")
    made.add_argument("--models", default="resnet20")
    made.add_argument("--agents", default="dp,autosculpt,random")
    made.add_argument("--trials", type=int, default=200)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--images", type=int, default=1000, help="validation images")
    made.add_argument("--work", type=Path, default=Path("convergence_work"), help="folder for studies and searches")
    return made.parse_args()


def agent_named(name: str) -> Agent:
    """A new agent, or a variant of the main one."""
    if name not in VARIANTS:
        return create(name)
    variant = AutoSculpt(**VARIANTS[name])
    variant.name = name
    return variant


def search(model: str, agent: str, seed: int, options: argparse.Namespace) -> Line:
    """One search, from its study where it was begun before."""
    task = gp.Task.load(f"cifar10:{options.data}", batch_size=128, validation=options.images)
    dense = models.create(f"cifar:{model}", options.weights / f"cifar10_{model}.safetensors")
    start = time.perf_counter()
    found = gp.search(
        dense, task, gp.Target(latency=LATENCY), agent_named(agent), options.trials, seed,
        study=options.work / f"{model}.db",
    )  # fmt: skip
    measured = found.record.measured
    assert measured is not None
    return {
        "model": model, "agent": agent, "seed": seed, "trials": options.trials, "images": options.images,
        "accuracy": [counted(record) for record in found.records],
        "returned": found.record.accuracy, "met": found.met,
        "latency": [measured.value, measured.low, measured.high],
        "plan": json.loads(found.plan.to_json()),
        "seconds": time.perf_counter() - start, "seconds_in_trials": sum(record.seconds for record in found.records),
    }  # fmt: skip


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
    text = [f"{'model':10} {'agent':24}" + "".join(f"{f'after {mark}':>22}" for mark in marks) + "   returned at"]
    for model, agent in dict.fromkeys((line["model"], line["agent"]) for line in lines):
        own = [line for line in lines if (line["model"], line["agent"]) == (model, agent)]
        cells = [_spread([curve(line)[mark - 1] for line in own]) for mark in marks]
        shares = ", ".join(f"{line['latency'][0]:.3f}" for line in own)
        text.append(f"{model:10} {agent:24}" + "".join(f"{cell:>22}" for cell in cells) + f"   {shares}")
    return "\n".join(text)


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.1%} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def plot(lines: Sequence[Line], path: Path) -> None:
    """A panel for each model: the mean over seeds of the best accuracy so far, and the range."""
    names = list(dict.fromkeys(line["model"] for line in lines))
    figure = Figure(figsize=(5.6 * len(names), 4.2), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        lowest = []
        for agent in dict.fromkeys(line["agent"] for line in lines):
            curves = 100 * np.array([curve(x) for x in lines if (x["model"], x["agent"]) == (model, agent)])
            if not len(curves):
                continue
            trials = np.arange(1, curves.shape[1] + 1)
            axes.plot(trials, curves.mean(0), color=COLOURS.get(agent), label=f"{agent} ({len(curves)} seeds)")
            axes.fill_between(trials, curves.min(0), curves.max(0), color=COLOURS.get(agent), alpha=0.18, linewidth=0)
            lowest.append(np.nanmin(curves[:, min(5, curves.shape[1] - 1)]))
        axes.set(title=model, xlabel="evaluated plans", ylabel="validation top-1 of the best plan so far, %")
        axes.set_ylim(bottom=min(lowest) - 1)
        axes.legend(frameon=False, loc="lower right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"without fine-tuning, at {LATENCY:.0%} of the dense latency", fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, write all."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = options.work / "convergence.jsonl"
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    lines = []
    for model, seed, agent in product(options.models.split(","), range(options.seeds), options.agents.split(",")):
        own = {"model": model, "agent": agent, "seed": seed, "trials": options.trials, "images": options.images}
        line = next((line for line in known if own.items() <= line.items()), None)
        if line is None:
            line = search(model, agent, seed, options)
            with kept.open("a") as file:
                file.write(json.dumps(line) + "\n")
        lines.append(line)
        print(f"{model} {agent} seed {seed}: {curve(line)[-1]:.2%}, {line['seconds']:.0f} s", flush=True)
        write(lines)
    print(table(lines))


def write(lines: Sequence[Line]) -> None:
    """The results so far."""
    body = {"latency": LATENCY, "searches": list(lines), "environment": environment()}
    result_file("convergence").write_text(json.dumps(body, indent=1) + "\n")
    stem = result_stem("convergence", 1, 1)
    plot(lines, stem.with_name(f"{stem.name}.png"))


if __name__ == "__main__":
    main()
