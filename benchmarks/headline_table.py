"""Publishes what was tuned: exports, measures, reads the test set once for each entry, and draws."""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import ceil
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import onnx
import torch
import zoo
from common import result_file
from equal_latency import first_images
from headline_rows import Candidate, Row, rows
from int8 import quantise
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from graphprune.counting import count
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import StepError
from graphprune.files import atomic
from graphprune.machine import environment
from graphprune.onnx_files.export import export_onnx
from graphprune.record import Share
from graphprune.tasks.task import Task, top1
from graphprune.timing.measure import measure

ROUNDS, SESSIONS = 100, 3
"""Samples of each network in a process, and processes: the one with the median ratio counts."""
QUANTISED = ("dense", "dp", "autosculpt")
SHIPPED_SPEEDUP, SHIPPED_BYTES = 2.0, 5 * 2**20
"""The ONNX file of our rows at this speed-up is kept, if it is no larger."""
SLACK = 0.05
"""What a machine's speed-up may differ by when `check` measures it again."""
SHOWN = 15
"""Points of accuracy below the best network that a picture shows."""
Entry = dict[str, Any]
"""A network that was judged: model, method, speedup, block, seed, test, validation, share, flops, params, ..."""


@dataclass
class Results:
    """The results file of one network; written anew with each entry."""

    file: Path
    entries: list[Entry]

    @classmethod
    def of(cls, model: str, folder: Path) -> "Results":
        """The entries there are."""
        file = result_file(f"headline-{model}", folder)
        return cls(file, json.loads(file.read_text())["entries"] if file.exists() else [])

    def has(self, **facts: Any) -> bool:
        """Whether there is an entry with these values."""
        return any(facts.items() <= {key: entry[key] for key in facts}.items() for entry in self.entries)

    def add(self, entry: Entry) -> None:
        """Keep an entry."""
        self.entries.append(entry)
        self.write(entry)

    def write(self, entry: Entry) -> None:
        """Write all entries, and print the one that is new."""
        body = {"entries": self.entries, "environment": environment()}
        atomic.write_text(self.file, json.dumps(body, indent=1) + "\n")
        print(line([entry]), flush=True)


@dataclass(frozen=True)
class Judge:
    """Judges ONNX files against the dense one, in ONNX Runtime."""

    task: Task
    dense: Path
    test_images: int | None = None

    def share(self, file: Path) -> Share:
        """One thread, batch 1, in fresh processes, interleaved with the dense network."""
        shares: list[Share] = []
        for _ in range(SESSIONS):
            measured = measure([self.dense, file], rounds=ROUNDS, fresh=True)
            if (share := measured.shares[-1]) is None:
                raise StepError(measured.timings[-1].error or "the network could not be measured")
            shares.append(share)
        return sorted(shares, key=lambda share: share.value)[SESSIONS // 2]

    def test(self, file: Path) -> float:
        """Top-1 on the test set."""
        assert self.task.test is not None
        run, name = OnnxRuntimeEngine().loaded(file), input_name(file)
        batches = list(first_images(self.task.test(), self.test_images or 10**9))
        outputs = [torch.from_numpy(run({name: inputs.numpy()})[0]) for inputs, _ in batches]
        return top1(torch.cat(outputs), torch.cat([targets for _, targets in batches if targets is not None]))


def input_name(file: Path) -> str:
    """The name of an ONNX file's only input."""
    return str(onnx.load(file, load_external_data=False).graph.input[0].name)


def settings_of(
    row: Row, options: argparse.Namespace
) -> Iterator[tuple[Candidate | None, str, int | None, Path | None]]:
    """(candidate, block, seed, weights) of each entry of a row: what a user gets without tuning, and what was tuned.

    Among several candidates the one that validates best before tuning is what a user without it would take.
    """
    yield (row.usable or [None])[0], "untuned", None, None
    for block in row.blocks:
        for seed in range(options.seeds):
            if row.tuned(block, seed).with_suffix(".json").exists():
                yield row.chosen, block, seed, row.tuned(block, seed)


class Publisher:
    """Publishes the rows of one network."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.options, self.results = options, Results.of(name, options.out)
        self.task = Task.load(f"cifar10:{options.data}", validation=options.validation)
        dense = options.work / name / "dense.onnx"
        if not dense.exists():
            whole = Candidate.read(options.work / name / "dense" / "only").network()
            export_onnx(whole, dense, self.task.example_inputs)
        self.judge = Judge(self.task, dense, options.test_images)

    def row(self, row: Row) -> None:
        """Every entry of a row that is not there yet."""
        entries = list(settings_of(row, self.options))
        quantised = "distilled" if len(entries) > 1 else "untuned"
        for candidate, block, seed, weights in entries:
            if candidate is not None:
                facts = {key: candidate.facts[key] for key in ("model", "method", "speedup", "variant")}
                both = "int8" in self.options.methods and facts["method"] in QUANTISED and block == quantised
                self.entry(row, candidate, facts | {"block": block, "seed": seed}, weights, both)

    def entry(self, row: Row, candidate: Candidate, facts: Entry, weights: Path | None, both: bool) -> None:
        """A network, and its int8 version if `both` are wanted."""
        small = facts | {"method": f"int8 of {facts['method']}"}
        left = [one for one in (facts, small) if not self.results.has(**one) and (one is facts or both)]
        if not left:
            return
        file = row.folder / f"{facts['block']}-{facts['seed']}.onnx"
        model = candidate.network(weights)
        export_onnx(model, file, self.task.example_inputs)
        more = {"plan": candidate.plan, **asdict(count(model, self.task.example_inputs)), **_tuning(weights)}
        if facts in left:
            self.results.add(facts | self.judged(file) | more)
            self.ship(facts, file)
        if small in left:
            quantised = file.with_suffix(".int8.onnx")
            quantise(file, self.task.calibration, input_name(file), quantised)
            self.results.add(small | self.judged(quantised) | more)

    def judged(self, file: Path) -> Entry:
        """What is known of an entry before it is measured."""
        own = str(file.relative_to(self.options.work))
        return {"file": own, "test": self.judge.test(file), "share": None, "bytes": file.stat().st_size}

    def measure(self) -> None:
        """Measure what is not measured yet."""
        for entry in self.results.entries:
            if entry["share"] is None:
                entry["share"] = asdict(self.judge.share(self.options.work / entry["file"]))
                self.results.write(entry)

    def ship(self, facts: Entry, file: Path) -> None:
        """Keep the file of our first seed at the speed-up that `check` looks at."""
        ours = facts["method"] in QUANTISED and facts["speedup"] == SHIPPED_SPEEDUP
        first = (facts["block"], facts["seed"]) == ("distilled", 0)
        if ours and first and file.stat().st_size <= SHIPPED_BYTES:
            target = shipped(self.options.out, facts)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def shipped(folder: Path, entry: Entry) -> Path:
    """Where the ONNX file of an entry is kept."""
    return folder / "headline" / f"{entry['model']}-{entry['method']}-{entry['speedup']:g}x.onnx"


def _tuning(weights: Path | None) -> Entry:
    if weights is None:
        return {"validation": None, "tuning": None}
    told = json.loads(weights.with_suffix(".json").read_text())
    return {"validation": told.pop("validation"), "tuning": told}


def table(options: argparse.Namespace) -> None:
    """Publish what is there, print the table, draw the picture."""
    entries: list[Entry] = []
    for name in options.models:
        found = rows(options.work, [name], options.methods, options.speedups)
        publisher = Publisher(name, options) if found else None
        for row in found if publisher else ():
            publisher.row(row)  # type: ignore[union-attr]
        if publisher and not options.unmeasured:
            publisher.measure()
        entries += Results.of(name, options.out).entries
    print(markdown(entries))
    if entries and not options.unmeasured:
        draw(entries, result_file("headline", options.out).with_suffix(".png"))


def picture(options: argparse.Namespace) -> None:
    """Draw what results files of several machines hold, each network from one of them."""
    entries = [entry for file in options.results for entry in json.loads(file.read_text())["entries"]]
    draw(entries, options.out / "headline.png")


def check(options: argparse.Namespace) -> None:
    """Measure the shipped files again and read their accuracy again; the script fails where a file does not hold."""
    task, broken = Task.load(f"cifar10:{options.data}"), 0
    for name in options.models:
        for entry in Results.of(name, options.out).entries:
            file = shipped(options.out, entry) if entry["speedup"] and entry["seed"] == 0 else Path()
            if not file.is_file() or entry["block"] != "distilled":
                continue
            dense = options.work / name / "dense.onnx"
            export_onnx(zoo.build(name, zoo.weights_of(name, options.weights)), dense, task.example_inputs)
            judge = Judge(task, dense)
            test, speedups = judge.test(file), (1 / entry["share"]["value"], 1 / judge.share(file).value)
            holds = test == entry["test"] and speedups[1] > speedups[0] * (1 - SLACK)
            broken += not holds
            words = "holds" if holds else "DOES NOT HOLD"
            print(f"{file.name}: {test:.2%} ({entry['test']:.2%}), "
                  f"{speedups[1]:.2f}x ({speedups[0]:.2f}x) {words}", flush=True)  # fmt: skip
    if broken:
        raise SystemExit(1)


# --- what people see --------------------------------------------------------------------------------------------------

METHODS = {
    "dense": "#333333", "sibling": "#777777", "torch-pruning": "#d55e00", "dp-uncompensated": "#56b4e9",
    "dp": "#0072b2", "autosculpt": "#009e73",
    "int8 of dense": "#999999", "int8 of dp": "#cc79a7", "int8 of autosculpt": "#e69f00",
}  # fmt: skip
"""Method -> its colour, in the order of the table."""
BLOCKS = ("untuned", "distilled", "labels")
Key = tuple[str, int, float, str]


def grouped(entries: Sequence[Entry]) -> dict[Key, list[Entry]]:
    """The entries of each line: those that differ in their seed alone; in the order of the table."""
    groups: dict[Key, list[Entry]] = {}
    for entry in entries:
        method = f"{entry['method']} {entry['variant']}" if entry["method"] == "sibling" else entry["method"]
        key = (entry["model"], BLOCKS.index(entry["block"]), entry["speedup"] or 0.0, method)
        groups.setdefault(key, []).append(entry)
    order = list(METHODS)
    return dict(sorted(groups.items(), key=lambda item: (*item[0][:3], order.index(item[1][0]["method"]))))


def line(entries: Sequence[Entry]) -> str:
    """A line of the table: what differs in its seed alone."""
    first = entries[0]
    target = f"{first['speedup']:g}x" if first["speedup"] else "own"
    scores = [entry["test"] for entry in entries]
    spread = f" ({100 * min(scores):.2f} to {100 * max(scores):.2f}, {len(scores)} seeds)" if len(scores) > 1 else ""
    shares = sorted((share for entry in entries if (share := entry["share"])), key=lambda share: share["value"])
    share = shares[len(shares) // 2] if shares else None
    speed = f"{1 / share['value']:.2f}x ({1 / share['high']:.2f} to {1 / share['low']:.2f})" if share else "unmeasured"
    name = f"{first['method']}, {first['variant']}" if first["variant"] else first["method"]
    sizes = f"{first['flops'] / 1e6:.1f} M | {first['params'] / 1e3:.0f} k"
    return (
        f"| {first['model']} | {target} | {name} | {first['block']} | {mean(scores):.2%}{spread} | {speed} | {sizes} |"
    )


def markdown(entries: Sequence[Entry]) -> str:
    """The table."""
    head = "| model | target | method | tuned | test top-1 | measured speed-up | FLOPs | parameters |"
    return "\n".join([head, "|" + "---|" * 8, *map(line, grouped(entries).values())])


@dataclass(frozen=True)
class Point:
    """A line of the table in a picture: median speed-up, mean test accuracy in %, and whether it was tuned."""

    speedup: float
    accuracy: float
    tuned: bool


def points(entries: Sequence[Entry], method: str) -> list[Point]:
    """A method's lines that were measured, slowest first; of those for one speed-up the distilled one if there is."""
    own = [entry for entry in entries if entry["method"] == method and entry["block"] != "labels" and entry["share"]]
    best: dict[tuple[float, str], Point] = {}
    for same in grouped(own).values():  # the untuned come first
        first = same[0]
        best[first["speedup"] or 0.0, first["variant"] if method == "sibling" else ""] = Point(
            median(1 / entry["share"]["value"] for entry in same), 100 * mean(entry["test"] for entry in same),
            first["block"] == "distilled",
        )  # fmt: skip
    return sorted(best.values(), key=lambda point: point.speedup)


def draw(entries: Sequence[Entry], file: Path) -> None:
    """Accuracy over measured speed-up: a panel for each network, a line for each method; tuned by distillation."""
    names = list(dict.fromkeys(entry["model"] for entry in entries))
    columns = min(3, len(names) + 1)
    rows_of_panels = ceil((len(names) + 1) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.8 * rows_of_panels), layout="constrained")
    panels = list(figure.subplots(rows_of_panels, columns, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        panel(axes, [entry for entry in entries if entry["model"] == name])
        axes.set_title(name, fontsize=11)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    handles = [Line2D([], [], color=colour, label=method, **LOOKS[True]) for method, colour in METHODS.items()]
    handles.append(Line2D([], [], color="#333333", label="open: not fine-tuned", **LOOKS[False]))
    panels[len(names)].legend(handles=handles, loc="center left", frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)


LOOK: dict[str, Any] = {"marker": "o", "markersize": 6, "linestyle": ":", "linewidth": 1}
LOOKS = {True: LOOK, False: LOOK | {"markerfacecolor": "white"}}
"""How points that are fine-tuned, and those that are not, are drawn."""


def panel(axes: Axes, entries: Sequence[Entry]) -> None:
    """One network; what is more than `SHOWN` points below the best is named at the lower edge."""
    every = {method: points(entries, method) for method in METHODS}
    shown = [point.accuracy for own in every.values() for point in own]
    low = max(min(shown), max(shown) - SHOWN)
    for (method, own), tuned in product(every.items(), LOOKS):
        alike = [point for point in own if (point.tuned or method in ("dense", "sibling")) == tuned]
        inside = [(point.speedup, point.accuracy) for point in alike if point.accuracy >= low]
        axes.plot(*np.reshape(inside, (-1, 2)).T, color=METHODS[method], **LOOKS[tuned])
        for point in alike:
            if point.accuracy < low:
                axes.plot(point.speedup, low, marker="v", color=METHODS[method])
                axes.annotate(
                    f"{point.accuracy:.0f} %", (point.speedup, low), (6, -3), textcoords="offset points", fontsize=8
                )
    axes.set(xlabel="measured speed-up", ylabel="test top-1, %", ylim=(low - 0.5, max(shown) + 0.5))
    axes.set_xlim(left=0.8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
