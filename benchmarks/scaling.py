"""How the time and the memory of every stage of a search grow with the depth of a model.

    python benchmarks/scaling.py [--families cifar_resnet,resnet,vit_depth,vit_width] [--repeats 3]

Families of models with random weights that differ in depth alone, and, for the table only, vision transformers that
differ in width too. One thread, one process for each model, in which a small network goes through everything first:
what is imported on first use is nobody's time. Calibration sees 32 images of 32x32 or 8 of 224x224, of normal noise.
The engine computes its times (`FakeEngine`), so that "profile" is what there is to enumerate, to build and to keep.
Each part of a stage is repeated, unless it takes more than a minute; a stage takes the sum of its parts' medians:

    trace       export and coupling
    profile     all operators that the model's sites exchange, then everything that a search times, on an empty profile
    calibrate   moments of layers, and the weights of their errors
    tables      options of all sites on a full profile, table of errors, table of latency
    problem     what agents are given: decisions, view of the graph, cheapest plan
    route       once for a search: the reference of the repair, how the model is cut, its ONNX template
    candidate   a random plan at half of the latency: cut and repaired, and its ONNX file
    agent step  one decision of `autosculpt`: its share of a policy update and of a greedy decode
    update      the whole policy update, on episodes that decide every site

Seconds of processor time; memory is the most that the process holds in each stage beyond what it held before the model
was made. The exponent of a family is that of a power of the number of layers, least squares on logarithms; the aim is
none above `AIM`. Resumable: a finished model is a line in WORK/scaling.jsonl. Writes, family by family,
`results/scaling-<engine>-1t-<processor>.json` (raw samples and exponents) and `.png`. Linux only.
"""

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import RESULTS, in_own_process, result_file, spent
from equal_latency import Row, Rows
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

import graphprune as gp
from graphprune import models
from graphprune.agents.autosculpt import EPISODES, Search
from graphprune.agents.random_search import random_walk
from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.operators import Operator
from graphprune.cutting.cuts import Cuts
from graphprune.engines.fake import FakeEngine
from graphprune.errors import StepError
from graphprune.machine import environment
from graphprune.randomness import seeded
from graphprune.registry import chosen_patterns
from graphprune.repairing.calibration import Statistics, calibrate
from graphprune.repairing.repair import make_reference
from graphprune.repairing.sensitivity import sensitivities
from graphprune.searching.candidates import Candidates
from graphprune.searching.evaluation import Workbench
from graphprune.searching.problem import Problem
from graphprune.searching.search import Session, latency_cost
from graphprune.timing.cases import operators
from graphprune.timing.profile import Profile

FAMILIES = {
    "cifar_resnet": ("cifar:resnet20", "cifar:resnet56", "cifar:resnet110"),
    "resnet": ("timm:resnet50", "timm:resnet101", "timm:resnet152"),
    "vit_depth": tuple(f"timm:vit_tiny_patch16_224?depth={depth}" for depth in (6, 12, 24)),
    "vit_width": tuple(f"timm:vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
}
DEPTHS = {"cifar_resnet": "#0072b2", "resnet": "#d55e00", "vit_depth": "#009e73"}
"""The families that differ in depth alone, and their colours."""
WARM_UP = "zoo:resnet?blocks=1"
STAGES = ("trace", "profile", "calibrate", "tables", "problem", "route", "candidate", "agent step", "update")
AIM = 1.1
LATENCY = 0.5
TRIALS = 200
PATIENCE = 60.0
"""Seconds of a part that is not repeated."""
MEBIBYTE = 2**20


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--families", default=",".join(FAMILIES), help="some of: " + ", ".join(FAMILIES))
    made.add_argument("--most", type=int, help="only so many models of each family, the smallest first")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--work", type=Path, default=Path("scaling_work"), help="folder for finished models")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return made.parse_args()


# --- one model -----------------------------------------------------------------------------------------------------


class Meter:
    """Samples of what the parts of a search take; a part is named `stage: part`."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peak: dict[str, list[int]] = defaultdict(list)

    def once(self, part: str, action: Callable[[], Any]) -> Any:
        """One sample; returns the action's result."""
        took, result = spent(action)
        self.seconds[part].append(took.seconds)
        self.peak[part].append(took.peak)
        return result

    def __call__(self, part: str, action: Callable[[], Any]) -> Any:
        """All samples; returns the last result."""
        result = self.once(part, action)
        for _ in range(self.repeats - 1):
            if self.seconds[part][0] > PATIENCE:
                break
            result = None  # two of them at once would count as memory
            result = self.once(part, action)
        return result


class Noting(Profile):
    """A profile that keeps no file and notes all that it is asked for."""

    def __init__(self) -> None:
        super().__init__(FakeEngine(), Path(os.devnull))
        self.asked: dict[Operator, None] = {}

    def fill(self, operators: Any, progress: Any = None) -> None:
        """Times what is not known yet."""
        wanted = list(operators)
        self.asked |= dict.fromkeys(wanted)
        super().fill(wanted, progress)


def examine(spec: str, repeats: int) -> Row:
    """What each part takes for one model."""
    measure(WARM_UP, Meter(1))
    empty, meter = spent(lambda: None)[0].peak, Meter(repeats)
    facts = measure(spec, meter)
    return {"model": spec, "repeats": repeats, **facts, "empty": empty, "seconds": meter.seconds, "peak": meter.peak}


def measure(spec: str, meter: Meter) -> Row:
    """Send a model through all stages; returns its sizes."""
    with seeded(0):
        module = models.create(spec).eval()
        size = (3, 32, 32) if spec.startswith(("cifar:", "zoo:")) else models.default_input_size(spec, module)
        images = torch.randn(32 if size[-1] == 32 else 8, *size)
    task = gp.Task.from_loaders(None, [(images, torch.zeros(len(images), dtype=torch.long))], calibration=[images])
    graph = meter("trace: all", lambda: gp.trace(module, task.example_inputs))
    statistics = calibrated(meter, graph, images)
    candidates = tabulated(meter, graph, statistics)
    problem = stated(meter, graph, candidates)
    reference = meter("route: reference", lambda: make_reference(graph, [images]))
    widest = candidates.cuts(problem.completions[0])
    bench = meter("route: cut and template", lambda: probed(Workbench(module, graph, reference, task), widest))
    for seed in range(meter.repeats):
        judged(meter, bench, candidates.cuts(random_walk(problem, np.random.default_rng(seed))))
    agent(meter, problem)
    return {
        "layers": len(graph.layers), "nodes": len(graph.nodes), "sites": len(problem.decisions),
        "options": sum(len(decision.options) for decision in problem.decisions),
        "operators": len(candidates.profile.asked), "parameters": graph.parameter_count, "flops": graph.flops,
    }  # fmt: skip


def calibrated(meter: Meter, graph: ModelGraph, images: torch.Tensor) -> Statistics:
    """Calibration on one batch."""
    statistics: Statistics = meter("calibrate: moments", lambda: calibrate(graph, [images]))
    statistics.weights = meter("calibrate: weights", lambda: sensitivities(graph, statistics, [images]))
    return statistics


def tabulated(meter: Meter, graph: ModelGraph, statistics: Statistics) -> Candidates:
    """The profile, and the candidates with their options. The tables follow in `stated`."""
    allowed, known = chosen_patterns(None), Noting()
    meter("profile: enumerate", lambda: operators(graph, allowed, known.block))
    Candidates(graph, known, allowed, statistics).collect()
    meter("profile: times", lambda: Noting().fill(known.asked))

    def collected() -> Candidates:
        candidates = Candidates(graph, known, allowed, statistics)
        candidates.collect()
        return candidates

    return meter("tables: options", collected)


def stated(meter: Meter, graph: ModelGraph, candidates: Candidates) -> Problem:
    """The tables, and the problem that a search makes of them. Raises StepError where nothing meets the target."""
    error = meter("tables: errors", candidates.error)
    costs = {"latency": meter("tables: latency", lambda: latency_cost(candidates))}
    parts: dict[str, Any] = dict.fromkeys(("module", "task", "target", "bench", "study", "dense", "stopwatch"))
    session = Session(
        graph=graph, candidates=candidates, costs=costs, limits={}, error=error,
        progress=lambda *_: None, **parts,
    )  # fmt: skip

    def whole() -> Problem:
        problem = session.problem(TRIALS, {"latency": LATENCY})
        if not problem.feasible(problem.cheapest):
            raise StepError(f"no plan is predicted to take {LATENCY} of the latency")
        return problem

    return meter("problem: all", whole)


def probed(bench: Workbench, widest: Cuts) -> Workbench:
    """A bench that has found how its model is cut, as module and as file. Raises StepError where it has no file."""
    bench.probe(widest)
    if bench.surgeon is None:
        raise StepError("the model's ONNX graph cannot be cut")
    return bench


def judged(meter: Meter, bench: Workbench, cuts: Cuts) -> None:
    """One candidate. Raises StepError where it has no file."""
    pruned = meter.once("candidate: cut and repair", lambda: bench.build(cuts))
    if meter.once("candidate: file", lambda: bench.file(pruned, cuts)) is None:
        raise StepError("a candidate's ONNX file cannot be cut")


def agent(meter: Meter, problem: Problem) -> None:
    """What the main agent does between evaluations."""
    search = Search(problem, np.random.default_rng(0), None)
    undecided = np.full((1, len(problem.decisions)), -1, dtype=np.int64)
    meter("update: all", lambda: search.warm_up(1))
    meter("decode: all", lambda: search.decode(undecided, greedy=True))
    for part, decisions in (("update", EPISODES), ("decode", 1)):
        shares = [seconds / (decisions * len(problem.decisions)) for seconds in meter.seconds[f"{part}: all"]]
        meter.seconds[f"agent step: {part}"] = shares
        meter.peak[f"agent step: {part}"] = meter.peak[f"{part}: all"]


# --- all of them ---------------------------------------------------------------------------------------------------


def seconds(row: Row, name: str) -> float:
    """What a stage, or one part of it, takes."""
    return sum(median(samples) for part, samples in row["seconds"].items() if part == name or _stage(part) == name)


def mebibytes(row: Row, name: str) -> float:
    """The most that a stage, or one part of it, holds, beyond what the process held before the model was made.

    At least 1, since less says nothing.
    """
    peaks = [median(samples) for part, samples in row["peak"].items() if part == name or _stage(part) == name]
    return max(1.0, (max(peaks) - row["empty"]) / MEBIBYTE)


def _stage(part: str) -> str:
    return part.partition(":")[0]


def exponent(rows: Sequence[Row], measured: Callable[[Row, str], float], name: str) -> float | None:
    """The power of the number of layers with which a stage or a part grows; None where there are fewer than two."""
    if len(rows) < 2:
        return None
    layers, values = zip(*((row["layers"], measured(row, name)) for row in rows), strict=True)
    return float(np.polyfit(np.log(layers), np.log(values), 1)[0])


def exponents(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Of a family: of each stage's time and memory, and of the time of each part."""
    return {
        "seconds": {name: exponent(rows, seconds, name) for name in STAGES},
        "memory": {name: exponent(rows, mebibytes, name) for name in STAGES},
        "seconds of parts": {part: exponent(rows, seconds, part) for part in rows[0]["seconds"]},
    }


def table(rows: Sequence[Row], measured: Callable[[Row, str], float], fitted: dict[str, float | None] | None) -> str:
    """The stages of a family's models, and the exponents."""
    lines = [f"{'':36}{'layers':>8}" + "".join(f"{name:>12}" for name in STAGES)]
    for row in rows:
        cells = "".join(f"{measured(row, name):12.4g}" for name in STAGES)
        lines.append(f"{row['model']:36}{row['layers']:8}{cells}")
    if fitted is not None:
        lines.append(f"{'exponent':44}" + "".join(f"{_power(fitted[name]):>12}" for name in STAGES))
    return "\n".join(lines)


def _power(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}{'!' * (value > AIM)}"


def plot(families: dict[str, list[Row]], path: Path) -> None:
    """Seconds above, memory below: a panel for each stage, a line for each family."""
    figure = Figure(figsize=(17, 13), layout="constrained")
    halves = (("processor time, s", seconds), ("memory, MiB", mebibytes))
    for half, (label, measured) in zip(figure.subfigures(2, 1), halves, strict=True):
        half.supylabel(label)
        panels = list(half.subplots(2, 5).flat)
        for axes, stage in zip(panels, STAGES, strict=False):
            panel(axes, stage, families, measured)
        for axes in panels[len(STAGES) :]:
            axes.set_axis_off()
    figure.savefig(path, dpi=110)


def panel(axes: Axes, stage: str, families: dict[str, list[Row]], measured: Callable[[Row, str], float]) -> None:
    """One stage of all families."""
    for family, rows in families.items():
        layers = [row["layers"] for row in rows]
        name = f"{family}: {_power(exponent(rows, measured, stage))}"
        axes.loglog(layers, [measured(row, stage) for row in rows], "o-", color=DEPTHS[family], label=name)
    axes.set(title=stage, xlabel="layers")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.5, 3 * max(high, 4 * low))  # a flat line looks flat, and the legend has room
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.grid(linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def row_of(spec: str, options: argparse.Namespace, kept: Rows) -> Row | None:
    """The row of a model: the one that is kept, or a new one; None where a stage fails."""
    if not kept.has(model=spec, repeats=options.repeats):
        try:
            kept.add(in_own_process(examine, spec, options.repeats))
        except Exception as error:  # the other models are still of use
            print(f"{spec}: {type(error).__name__}: {error}", flush=True)
            return None
    return next(row for row in kept.rows if (row["model"], row["repeats"]) == (spec, options.repeats))


def main() -> None:
    """Measure what is missing, fit, write all."""
    options = arguments()
    families: dict[str, list[Row]] = {}
    kept = Rows(options.work / "scaling.jsonl")
    for family in options.families.split(","):
        rows = [row for spec in FAMILIES[family][: options.most] if (row := row_of(spec, options, kept)) is not None]
        if rows:
            families[family] = rows
            publish(families, result_file("scaling", options.out))
        report(family, rows)


def report(family: str, rows: Sequence[Row]) -> None:
    """Print a family's tables."""
    powers: dict[str, Any] = exponents(rows) if rows and family in DEPTHS else {}
    print(f"{family}: seconds\n{table(rows, seconds, powers.get('seconds'))}")
    print(f"{family}: MiB\n{table(rows, mebibytes, powers.get('memory'))}")
    grown = {part: _power(power) for part, power in powers.get("seconds of parts", {}).items()}
    print(f"exponents of parts: {grown}\n" if grown else "", flush=True)


def publish(families: dict[str, list[Row]], path: Path) -> None:
    """Write the results of the families so far, raw samples and exponents, and the picture."""
    deep = {family: rows for family, rows in families.items() if family in DEPTHS}
    fitted = {family: exponents(rows) for family, rows in deep.items()}
    body = {"aim": AIM, "exponents": fitted, "families": families, "environment": environment()}
    path.write_text(json.dumps(body, indent=1) + "\n")
    if deep:
        plot(deep, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
