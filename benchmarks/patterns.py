"""What every level of every pattern gains at every site of four models, the refused ones included.

    python benchmarks/patterns.py [--models resnet20,vit_tiny] [--engine openvino] [--threads 1] [--batch 1]

Times come from the profile of this machine, so that the second run is quick. Efficiency is the speed-up of a site's
layers x the share of their FLOPs that is kept: 1 where time falls as FLOPs do. Levels that are refused stay in the
table with the reason. Writes `results/patterns-<engine>-<threads>t-<processor>.json` and `.png`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import COLOURS, chosen, parser, result_stem, subject
from matplotlib.figure import Figure

from graphprune.engines import create
from graphprune.machine import environment
from graphprune.registry import patterns
from graphprune.reporting.grid import Cell, cells
from graphprune.timing.profile import Profile

GOAL = 0.85
"""The median efficiency that offered levels should reach."""
Cells = dict[str, list[Cell]]


def measure(names: Sequence[str], profile: Profile) -> Cells:
    """The cells of each model."""
    found = {}
    for name in names:
        graph = subject(name).graph
        found[name] = cells(
            {"": graph}, profile, list(patterns().values()),
            lambda done, total, name=name: print(f"{name}: {done} of {total} operators timed", flush=True),
        )  # fmt: skip
    return found


def distribution(found: Sequence[Cell]) -> dict[str, Any]:
    """How many levels are offered, and how their efficiency spreads; a cell counts once for each of its sites."""
    offered = [cell for cell in found if not cell.reason]
    efficiency = [cell.efficiency for cell in offered for _ in range(cell.sites) if np.isfinite(cell.efficiency)]
    reasons = dict.fromkeys(cell.reason for cell in found if cell.reason)
    quantiles = np.percentile(efficiency, (10, 50, 90)).tolist() if efficiency else [None] * 3
    return {
        "offered": sum(cell.sites for cell in offered),
        "refused": {reason: sum(cell.sites for cell in found if cell.reason == reason) for reason in reasons},
        "without_layers": sum(cell.sites for cell in offered if np.isinf(cell.speedup)),
        "p10": quantiles[0],
        "median": quantiles[1],
        "p90": quantiles[2],
    }


def summary(found: Cells) -> dict[str, dict[str, Any]]:
    """The distribution of each pattern over all models, and of all patterns together."""
    everything = [cell for own in found.values() for cell in own]
    names = dict.fromkeys(cell.pattern for cell in everything)
    return {name: distribution([c for c in everything if c.pattern == name]) for name in names} | {
        "all": distribution(everything)
    }


def table(figures: dict[str, dict[str, Any]]) -> str:
    """What is printed at the end."""
    text = [f"{'pattern':12} offered  refused  efficiency: median (10th to 90th percentile)"]
    for name, one in figures.items():
        spread = "-"
        if one["median"] is not None:
            spread = f"{one['median']:.2f} ({one['p10']:.2f} to {one['p90']:.2f})"
        text.append(f"{name:12} {one['offered']:7} {sum(one['refused'].values()):8}  {spread:>18}")
        text += [f"{'':12} {count} refused: {reason}" for reason, count in one["refused"].items() if name != "all"]
    return "\n".join(text)


def plot(found: Cells, figures: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """A row for each pattern: every level at every shape as a point, refused ones as crosses."""
    names = [name for name in figures if name != "all"]
    figure = Figure(figsize=(8.5, 1.4 + 0.75 * len(names)), layout="constrained")
    axes = figure.subplots()
    random = np.random.default_rng(0)
    for model, own in found.items():
        for offered, marker in ((True, "o"), (False, "x")):
            shown = [c for c in own if bool(c.reason) is not offered and np.isfinite(c.efficiency)]
            rows = [names.index(c.pattern) + random.uniform(-0.28, 0.28) for c in shown]
            axes.scatter(
                [c.efficiency for c in shown], rows, s=14, marker=marker, color=COLOURS[model], alpha=0.55,
                linewidths=0.9 if marker == "x" else 0, label=model if offered else None,
            )  # fmt: skip
    for row, name in enumerate(names):
        if figures[name]["median"] is not None:
            axes.plot([figures[name]["median"]] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2)
    axes.scatter([], [], marker="x", color="#555555", s=14, label="refused")
    axes.plot([], [], color="black", linewidth=2, label="median of the offered")
    axes.axvline(1, color="#777777", linewidth=0.8)
    axes.axvline(GOAL, color="#777777", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(f"efficiency: speed-up x share of FLOPs kept (dotted: {GOAL})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
    axes.set_title(title, fontsize=9, loc="left")
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, summarise, write."""
    options = parser(__doc__).parse_args()
    profile = Profile(create(options.engine, threads=options.threads, batch=options.batch))
    found = measure(chosen(options.models), profile)
    figures = summary(found)
    print(table(figures))
    body = {
        "engine": profile.engine.identity, "block": profile.block, "noise": profile.noise,
        "patterns": figures, "models": {name: [cell.to_dict() for cell in own] for name, own in found.items()},
        "environment": environment(),
    }  # fmt: skip
    stem = result_stem("patterns", options.threads, options.batch, options.engine)
    stem.with_name(stem.name + ".json").write_text(json.dumps(body, indent=1) + "\n")
    plot(found, figures, stem.with_name(stem.name + ".png"), profile.engine.identity)


if __name__ == "__main__":
    main()
