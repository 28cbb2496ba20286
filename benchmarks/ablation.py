"""What each pattern and the compensation are worth at equal measured latency, and Torch-Pruning beside them.

    python benchmarks/ablation.py --data DIR --weights-dir DIR

CIFAR-10 ResNets without fine-tuning, at shares of the dense model's measured latency (one thread, batch 1). Plans come
from dynamic programming over the tables (`--trials` exponents of the errors, chosen on validation images); each is
judged with the compensation, as finely as a search delivers it, and without it: sliced weights and batch norms
re-estimated on the calibration images. "unweighted" is all patterns with errors that count alike wherever they are.
Torch-Pruning (extra `bench`) gets the same latencies, the same re-estimation, and its best test accuracy counts. The
test set is read once per row. Started again, finished rows are taken from `--work`. Writes
`results/ablation-<engine>-1t-<processor>.json` and `.png`.
"""

import argparse
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Self

import matplotlib
import numpy as np
import torch
from common import RESULTS, judged_by_tables, result_file
from equal_latency import Dense, Finder, Row, Rows, with_new_norms
from torch import nn

from graphprune.agents.dp import EXPONENTS, Solver
from graphprune.counting import count
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import StepError
from graphprune.machine import environment
from graphprune.record import Share
from graphprune.registry import chosen_patterns, patterns
from graphprune.repairing.calibration import Statistics
from graphprune.repairing.repair import FINE, make_reference
from graphprune.repairing.sensitivity import calibrated
from graphprune.searching.candidates import Candidates
from graphprune.searching.evaluation import Workbench
from graphprune.searching.problem import Choices
from graphprune.timing.profile import Profile

matplotlib.use("Agg")

SETS: dict[str, tuple[str, ...] | None] = {
    "filter": ("filter",), "kernel": ("kernel",), "kernel-mix": ("kernel-mix",), "all": None, "unweighted": None,
}  # fmt: skip
"""Rows -> the patterns that are allowed; None is every registered one."""
RIVAL = "torch-pruning"
POINTS = (0.75, 0.6, 0.5, 0.4)
LIMITS = tuple(np.linspace(0.2, 1.0, 9))
"""Predicted latency shares that are tried for every set before bisecting."""
KEPT = tuple(np.linspace(0.1, 0.95, 8))
"""Shares of channels that Torch-Pruning keeps, likewise."""
CHOOSING = 8
"""Batches of validation images that choose between plans."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--weights-dir", required=True, type=Path, help="folder with cifar10_<model>.safetensors")
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--methods", nargs="+", default=[*SETS, RIVAL], choices=[*SETS, RIVAL])
    parser.add_argument("--points", nargs="+", type=float, default=POINTS, help="shares of the dense latency")
    parser.add_argument("--trials", type=int, default=2, help=f"plans to choose from per row, at most {len(EXPONENTS)}")
    parser.add_argument("--test-images", type=int, help="read only so many test images (to try the script)")
    parser.add_argument("--work", type=Path, default=Path("ablation_work"), help="folder for finished rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


# --- ours -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tables:
    """The tables of one pattern set, and the workshop that cuts and repairs."""

    dense: Dense
    candidates: Candidates
    bench: Workbench
    solver: Solver

    @classmethod
    def build(cls, dense: Dense, names: tuple[str, ...] | None, statistics: Statistics) -> Self | None:
        """Profile what is new, and table it; None where these patterns can do nothing."""
        profile = Profile(OnnxRuntimeEngine())
        candidates = Candidates(dense.graph, profile, chosen_patterns(names), statistics)
        candidates.collect()
        if not candidates.sites:
            return None
        problem = judged_by_tables(candidates, 1.0)
        reference = make_reference(dense.graph, dense.task.calibration, FINE)
        bench = Workbench(dense.module, dense.graph, reference, dense.task)
        bench.probe(candidates.cuts(problem.completions[0]))
        if not bench.route.own_class:
            raise StepError("batch norms can be re-estimated in the module's own class only")
        return cls(dense, candidates, bench, Solver(problem))

    def at(self, limit: float, exponent: float = 1.0) -> Choices | None:
        """The plan of least error within a predicted latency; None if there is none."""
        return self.solver.solve(limit, exponent)

    def finder(self, exponent: float) -> Finder[Choices]:
        """Looks for plans by their predicted latency."""
        return Finder(
            lambda limit: self.at(limit, exponent),
            lambda choices, rounds, fresh: self.dense.share(self.cut(choices), rounds, fresh),
            lambda choices: choices,
            LIMITS,
        )

    def cut(self, choices: Choices) -> nn.Module:
        """The cut model with sliced weights."""
        return self.bench.cut(self.candidates.cuts(choices)).eval()

    def models(self, choices: Choices) -> dict[bool, nn.Module]:
        """The model without and with compensation."""
        images = self.dense.task.calibration
        repaired = self.bench.build(self.candidates.cuts(choices))
        return {False: with_new_norms(self.cut(choices), images), True: repaired}

    def describe(self, choices: Choices) -> list[str]:
        """What the plan does, one line for each site."""
        plan = self.solver.problem.plan(choices)
        return [f"{choice.site}: {choice.pattern} {choice.level}" for choice in plan.choices]


@dataclass(frozen=True)
class Found:
    """A model within the target, its measured share, and its accuracy on the images that choose."""

    model: nn.Module
    share: Share
    accuracy: float
    notes: list[str]


def pattern_rows(dense: Dense, method: str, options: argparse.Namespace, statistics: Statistics) -> Iterator[Row]:
    """The rows of one pattern set: at each point without and with compensation."""
    alike = Statistics(statistics, statistics.branches, statistics.scores)
    tables = Tables.build(dense, SETS[method], alike if method == "unweighted" else statistics)
    if tables is None:
        places = [(point, compensated) for point in options.points for compensated in (False, True)]
        yield from (missing(dense, method, compensated, point, "nothing to cut") for point, compensated in places)
        return
    finders = [tables.finder(exponent) for exponent in EXPONENTS[: options.trials]]
    for point in options.points:
        best = _best_plans(tables, finders, point)
        for compensated in (False, True):
            if compensated not in best:
                reached = min(finder.fastest for finder in finders)
                yield missing(dense, method, compensated, point, f"out of reach: the fastest plan is at {reached:.3f}")
                continue
            yield row(dense, method, compensated, point, best[compensated])


def _best_plans(tables: Tables, finders: Sequence[Finder[Choices]], point: float) -> dict[bool, Found]:
    """Of the plans at a point, the best without and the best with compensation, on validation images."""
    found = [plan for finder in finders if (plan := finder.find(point)) is not None]
    best: dict[bool, Found] = {}
    for choices, share in dict(found).items():
        for compensated, model in tables.models(choices).items():
            accuracy = chosen_accuracy(tables.dense, model)
            if compensated not in best or accuracy > best[compensated].accuracy:
                best[compensated] = Found(model, share, accuracy, tables.describe(choices))
    return best


def chosen_accuracy(dense: Dense, model: nn.Module) -> float:
    """The accuracy on the validation images that choose."""
    return replace(dense.task, validation=dense.task.validation[:CHOOSING]).accuracy(model)


# --- Torch-Pruning ----------------------------------------------------------------------------------------------------


def rival_rows(dense: Dense, options: argparse.Namespace) -> Iterator[Row]:
    """Every setting of Torch-Pruning at every point, batch norms re-estimated."""
    from torch_pruning_adapter import TorchPruning, settings

    rival = TorchPruning.of(dense.module, dense.task)
    for setting in settings():
        finder: Finder[nn.Module] = Finder(
            lambda kept, setting=setting: rival.prune(setting, 1 - kept),  # type: ignore[misc]
            dense.share,
            lambda model: tuple(parameter.shape for parameter in model.parameters()),
            KEPT,
        )
        for point in options.points:
            found = finder.find(point)
            if found is None:
                reason = f"out of reach: the fastest model is at {finder.fastest:.3f}"
                yield missing(dense, setting.name, False, point, reason)
                continue
            model = with_new_norms(found[0], dense.task.calibration)
            widths = [str(layer.out_channels) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
            notes = [f"channels {' '.join(widths)}"]
            yield row(dense, setting.name, False, point, Found(model, found[1], chosen_accuracy(dense, model), notes))


# --- rows -------------------------------------------------------------------------------------------------------------


def row(dense: Dense, method: str, compensated: bool, point: float, found: Found) -> Row:
    """A published row; reads the test set."""
    counts = count(found.model, dense.task.example_inputs)
    return {
        **missing(dense, method, compensated, point, ""),
        "test_accuracy": dense.task.test_accuracy(found.model),
        "validation_accuracy": found.accuracy,
        "measured": asdict(found.share),
        "flops": counts.flops,
        "params": counts.params,
        "plan": found.notes,
    }


def missing(dense: Dense, method: str, compensated: bool, point: float, reason: str) -> Row:
    """A row for which there is no model, and why."""
    return {
        "model": dense.name, "method": method, "compensated": compensated, "point": point, "error": reason or None,
    }  # fmt: skip


def work(name: str, options: argparse.Namespace, rows: Rows) -> None:
    """All rows of one model that are not there yet."""
    dense = Dense.load(name, options.weights_dir, options.data, options.test_images)
    if not rows.has(model=name, method="dense"):
        share = dense.share(dense.module, 100, True)
        found = Found(dense.module, share, chosen_accuracy(dense, dense.module), [])
        rows.add(row(dense, "dense", False, 1.0, found))
    statistics: Statistics | None = None
    for method in options.methods:
        if unknown := set(SETS.get(method) or ()) - set(patterns()):
            print(f"{name} {method}: skipped, {', '.join(unknown)} is not registered", flush=True)
            continue
        if all(_done(rows, name, method, point) for point in options.points):
            continue
        if method == RIVAL:
            new = rival_rows(dense, options)
        else:
            statistics = statistics or calibrated(dense.graph, dense.task.calibration)
            new = pattern_rows(dense, method, options, statistics)
        for fresh in new:
            if not rows.has(**{key: fresh[key] for key in ("model", "method", "compensated", "point")}):
                rows.add(fresh)
                print(line(fresh), flush=True)


def _done(rows: Rows, name: str, method: str, point: float) -> bool:
    """Whether a method's rows at a point are all there; the rival's last setting tells for all of them."""
    if method == RIVAL:
        from torch_pruning_adapter import settings

        return all(rows.has(model=name, method=setting.name, point=point) for setting in settings())
    return all(rows.has(model=name, method=method, compensated=c, point=point) for c in (False, True))


def best_rival(rows: Sequence[Row]) -> list[Row]:
    """Torch-Pruning's best row at each model and point, by test accuracy."""
    best: dict[tuple[str, float], Row] = {}
    for entry in rows:
        place = entry["model"], entry["point"]
        if entry["method"].startswith(RIVAL) and not entry["error"]:
            best[place] = max(best.get(place, entry), entry, key=lambda candidate: candidate["test_accuracy"])
    return [{**entry, "method": f"{RIVAL}, best of {entry['method'][len(RIVAL) + 1 :]}"} for entry in best.values()]


def line(entry: Row) -> str:
    """A row as text."""
    name = entry["method"] + (" + compensation" if entry["compensated"] else "")
    head = f"{entry['model']:9} {entry['point']:<5} {name:64}"
    if entry["error"]:
        return f"{head} {entry['error']}"
    return f"{head} {entry['test_accuracy']:7.2%}  measured {entry['measured']['value']:.3f}"


def table(rows: Sequence[Row]) -> str:
    """The rows that are compared, point by point."""
    shown = [entry for entry in rows if not entry["method"].startswith(RIVAL)] + best_rival(rows)
    return "\n".join(map(line, sorted(shown, key=lambda entry: (entry["model"], -entry["point"]))))


# --- picture ----------------------------------------------------------------------------------------------------------

COLOURS = {
    "filter": "#4c72b0",
    "kernel": "#dd8452",
    "kernel-mix": "#8172b3",
    "all": "#2a7f3f",
    "unweighted": "#937860",
    RIVAL: "#c44e52",
}


def draw(rows: Sequence[Row], file: Path) -> None:
    """Accuracy over measured latency: one panel per model, one line per method, dashed without compensation."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(entry["model"] for entry in rows))
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(5.0 * len(names) + 2.6, 4.4), layout="constrained", squeeze=False
    )
    best = [{**entry, "method": RIVAL} for entry in best_rival(rows)]
    for panel, name in zip(panels[0], names, strict=True):
        for method, colour in COLOURS.items():
            for compensated in (True, False):
                points = [
                    (entry["measured"]["value"], 100 * entry["test_accuracy"])
                    for entry in [*rows, *best]
                    if (entry["model"], entry["method"], entry["compensated"]) == (name, method, compensated)
                    and not entry["error"]
                ]
                label = f"{method}, batch norms only" if not compensated else method
                if points:
                    panel.plot(
                        *zip(*sorted(points), strict=True), marker="o", markersize=4.5, color=colour,
                        linestyle="-" if compensated else (0, (4, 2)), label=label,
                        markerfacecolor=colour if compensated else "white",
                    )  # fmt: skip
        dense = next(entry for entry in rows if entry["model"] == name and entry["method"] == "dense")
        panel.axhline(100 * dense["test_accuracy"], color="#555555", linewidth=1, linestyle=":", label="dense")
        panel.set(title=f"{name}, no fine-tuning", xlabel="measured latency, share of dense", ylim=(0, 100))
        panel.set_ylabel("test top-1, %")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    handles: dict[str, object] = {}
    for panel in panels[0]:
        found, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, fontsize=9)
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def write(rows: Sequence[Row], folder: Path) -> Path:
    """The results file and its picture."""
    folder.mkdir(parents=True, exist_ok=True)
    file = result_file("ablation", folder)
    rival = any(row.get("method") == RIVAL for row in rows)
    facts = environment() | ({"torch-pruning": version("torch-pruning")} if rival else {})
    file.write_text(json.dumps({"rows": list(rows), "environment": facts}, indent=1) + "\n")
    draw(rows, file.with_suffix(".png"))
    return file


def main() -> None:
    """Every row, then the table, the file and the picture."""
    options = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    rows = Rows(options.work / "ablation.jsonl")
    for name in options.models:
        work(name, options, rows)
    print(table(rows.rows))
    print(write(rows.rows, options.out).name)


if __name__ == "__main__":
    main()
