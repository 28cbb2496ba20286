"""What each part of the compensation buys, on one fixed plan per model at about half of the dense latency.

    python benchmarks/compensation.py --data DIR --weights-dir DIR

The plan is the dynamic programme's at half of the predicted latency; its measured share is stated. Accuracy is top-1 on
validation images, in `SUBSETS` parts, so that the spread between parts can be seen; the test set is not read. Started
again, finished rows are taken from `--work`. Writes `results/compensation-<engine>-1t-<processor>.json` and `.png`.
"""

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
import torch
from ablation import Tables
from common import RESULTS, result_file
from equal_latency import Dense, Row, Rows
from torch import Tensor, fx, nn

from graphprune.coupling.graph import Layer
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.exported import cut_program, plain_module
from graphprune.machine import environment
from graphprune.repairing.repair import FINE, PULL, QUICK, Effort, Reference, Solver, make_reference
from graphprune.repairing.sensitivity import calibrated
from graphprune.tasks.task import Task

matplotlib.use("Agg")

SUBSETS = 4
VALIDATION = 4000
LIMIT = 0.5


class NormsOnly(Solver):
    """Batch norms are re-estimated, weights stay as they were sliced."""

    def solve(self, node: fx.Node, layer: Layer) -> None:
        """Nothing."""


class Uncentred(Solver):
    """The shift that a batch norm would take up is left for the weights to explain."""

    def free_mean(self, node: fx.Node, bias: Tensor | None) -> bool:
        """Only a bias takes one up."""
        return bias is not None


class OnDenseInputs(Solver):
    """Each layer is solved on what the dense model gives it, less the cut channels."""

    dense: Mapping[str, Tensor]

    def inputs(self, layer: Layer, source: Tensor) -> Tensor:
        """The dense layer's input."""
        kept = torch.from_numpy(layer.inputs.kept(self.cuts.keep))
        return self.dense[layer.node].index_select(1 if source.dim() == 4 else -1, kept)


class Inputs(fx.Interpreter):
    """Keeps what enters each layer."""

    def __init__(self, module: fx.GraphModule, layers: Sequence[Layer]) -> None:
        super().__init__(module)
        self.names = {layer.node for layer in layers}
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Keep the first argument of a layer."""
        if n.name in self.names:
            self.seen[n.name] = self.fetch_args_kwargs_from_env(n)[0][0]
        return super().run_node(n)


@dataclass(frozen=True)
class Variant:
    """A way to compensate: None for `solver` leaves the sliced weights."""

    solver: type[Solver] | None = Solver
    effort: Effort = QUICK
    pull: float = PULL
    passes: int = 1


VARIANTS: dict[str, Variant] = {
    "sliced weights": Variant(None),
    "batch norms re-estimated": Variant(NormsOnly),
    "least squares on dense inputs": Variant(OnDenseInputs),
    "least squares on pruned inputs (default)": Variant(),
    "default, mean not free": Variant(Uncentred),
    "default, 64 images": Variant(effort=Effort(64, QUICK.rows)),
    "default, 1024 images": Variant(effort=Effort(1024, QUICK.rows)),
    "1024 images, 4 times the rows (what is delivered)": Variant(effort=FINE),
    "default, pull 1e-4": Variant(pull=1e-4),
    "default, pull 1e-3": Variant(pull=1e-3),
    "default, pull 1e-1": Variant(pull=1e-1),
    "default, two passes": Variant(passes=2),
    "delivered, pull 1e-3": Variant(effort=FINE, pull=1e-3),
}


@torch.no_grad()
def compensate(dense: Dense, cuts: Cuts, variant: Variant, reference: Reference) -> nn.Module:
    """The cut program with the weights that a variant gives it."""
    program = cut_program(dense.graph, cuts, dense.module)
    if variant.solver is None:
        return program
    for _ in range(variant.passes):
        solver = variant.solver(program, dense.graph, cuts, reference, variant.pull)
        if isinstance(solver, OnDenseInputs):
            recorder = Inputs(plain_module(dense.graph.exported).eval(), dense.graph.layers)
            recorder.run(reference.images)
            solver.dense = recorder.seen
        solver.run(reference.images)
    return program


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--weights-dir", required=True, type=Path, help="folder with cifar10_<model>.safetensors")
    parser.add_argument("--models", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--limit", type=float, default=LIMIT, help="predicted share of the dense latency")
    parser.add_argument("--validation", type=int, default=VALIDATION, help="validation images")
    parser.add_argument("--work", type=Path, default=Path("compensation_work"), help="folder for finished rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args()


def accuracies(task: Task, model: nn.Module) -> list[float]:
    """Top-1 on each part of the validation images."""
    batches = task.validation
    parts = [batches[part::SUBSETS] for part in range(SUBSETS)]
    return [replace(task, validation=part).accuracy(model) for part in parts if part]


def work(name: str, options: argparse.Namespace, rows: Rows) -> None:
    """All rows of one model that are not there yet."""
    names = ["dense", *VARIANTS]
    if all(rows.has(model=name, variant=variant) for variant in names):
        return
    dense = Dense.load(name, options.weights_dir, options.data)
    dense = replace(dense, task=Task.load(f"cifar10:{options.data}", validation=options.validation))
    tables = Tables.build(dense, None, calibrated(dense.graph, dense.task.calibration))
    assert tables is not None, "nothing can be cut"
    choices = tables.at(options.limit)
    assert choices is not None, "no plan is so fast"
    cuts, share = tables.candidates.cuts(choices), dense.share(tables.cut(choices), 100, True).value
    references: dict[Effort, Reference] = {}

    def judge(variant: str, build: Callable[[], nn.Module]) -> None:
        if not rows.has(model=name, variant=variant):
            plan = tables.describe(choices)
            rows.add({"model": name, "variant": variant, "measured": share, "plan": plan,
                      "accuracies": accuracies(dense.task, build())})  # fmt: skip
            print(line(rows.rows[-1]), flush=True)

    judge("dense", lambda: dense.module)
    for title, variant in VARIANTS.items():
        if variant.effort not in references:
            references[variant.effort] = make_reference(dense.graph, dense.task.calibration, variant.effort)
        reference = references[variant.effort]
        judge(title, lambda v=variant, r=reference: compensate(dense, cuts, v, r))  # type: ignore[misc]


def spread(row: Row) -> float:
    """The standard error of the mean over the parts."""
    parts = row["accuracies"]
    return stdev(parts) / len(parts) ** 0.5 if len(parts) > 1 else 0.0


def line(row: Row) -> str:
    """A row as text."""
    value = f"{mean(row['accuracies']):7.2%} +- {spread(row):.2%}"
    return f"{row['model']:9} {row['variant']:42} {value}  measured {row['measured']:.3f}"


def draw(rows: Sequence[Row], file: Path) -> None:
    """Accuracy of each variant as a bar, one panel per model; the dense model as a line."""
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(
        1, len(names), figsize=(2.6 + 4.2 * len(names), 4.2), layout="constrained", squeeze=False, sharey=True
    )
    for panel, name in zip(panels[0], names, strict=True):
        own = {row["variant"]: row for row in rows if row["model"] == name}
        dense = own.pop("dense")
        labels, values = list(own)[::-1], [100 * mean(row["accuracies"]) for row in own.values()][::-1]
        colours = ["#2a7f3f" if "(default)" in label else "#8fa8c8" for label in labels]
        bars = panel.barh(labels, values, xerr=[100 * spread(own[label]) for label in labels], color=colours)
        panel.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        panel.axvline(100 * mean(dense["accuracies"]), color="#555555", linestyle=":", linewidth=1)
        panel.set(
            title=f"{name} at {dense['measured']:.2f} of its latency", xlabel="validation top-1, %", xlim=(0, 104)
        )
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=140)
    pyplot.close(figure)


def main() -> None:
    """Every row, then the file and the picture."""
    options = arguments()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    rows = Rows(options.work / "compensation.jsonl")
    for name in options.models:
        work(name, options, rows)
    print("\n".join(map(line, rows.rows)))
    options.out.mkdir(parents=True, exist_ok=True)
    file = result_file("compensation", options.out)
    file.write_text(json.dumps({"rows": rows.rows, "environment": environment()}, indent=1) + "\n")
    draw(rows.rows, file.with_suffix(".png"))
    print(file.name)


if __name__ == "__main__":
    main()
