"""How well the profile predicts whole plans, whether any legal plan is slower, and how fast the fastest one is.

    python benchmarks/prediction.py [--models resnet20,vit_tiny] [--plans 60] [--engine openvino] [--threads 1]
        [--batch 1] [--work DIR]

For each model, random legal plans: the target is drawn uniformly between what can be reached (or 0.3) and 0.95 of
dense latency; then each site in turn stays dense with a probability that is drawn for the plan, or takes any option
that leaves the target reachable, all equally likely. Each is cut out of the dense ONNX graph as in a search and timed
against the dense model, interleaved. The correction is fitted to `PROBES` such plans of their own; a search
fits it to plans of little error at its target. Accuracy plays no part here: weights are random, nothing is repaired.

Every plan is a line in DIR/prediction.jsonl as soon as it is measured: started again, the same command goes on from
there. Writes `results/prediction-<engine>-<threads>t-<processor>.json` (raw samples) and `.png`.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import COLOURS, Subject, chosen, judged_by_tables, parser, raw, result_stem, subject, timed
from matplotlib.figure import Figure

from graphprune.agents.random_search import random_walk
from graphprune.engines import create
from graphprune.engines.base import Engine
from graphprune.machine import environment
from graphprune.onnx_files.export import onnx_bytes
from graphprune.registry import chosen_patterns
from graphprune.repairing.calibration import Statistics
from graphprune.searching.candidates import Candidates
from graphprune.searching.evaluation import Workbench
from graphprune.searching.probing import PROBE_SEED, PROBES, corrected, saving_factor
from graphprune.searching.problem import Choices, Problem, Sum
from graphprune.timing.measure import verdict
from graphprune.timing.profile import Profile

LOWEST, HIGHEST = 0.3, 0.95
"""Targets between these shares of dense latency."""
ROUNDS = 20
Line = dict[str, Any]
"""One plan: model, kind (probe, plan, cheapest), number, predicted share, and what was measured, or the error."""


@dataclass
class Bench:
    """One model, profiled, with its problem; nothing is calibrated."""

    subject: Subject
    engine: Engine
    candidates: Candidates
    cost: Sum
    problem: Problem
    bench: Workbench
    dense_onnx: bytes = field(repr=False)

    @classmethod
    def prepare(cls, name: str, engine: Engine) -> "Bench":
        """Trace, profile, and find out once how this model is cut."""
        given = subject(name)
        profile = Profile(engine)
        candidates = Candidates(given.graph, profile, chosen_patterns(None, engine), Statistics({}, {}))
        candidates.collect(lambda done, total: print(f"{name}: {done} of {total} operators timed", flush=True))
        problem = judged_by_tables(candidates, HIGHEST)
        bench = Workbench(given.module, given.graph, reference=None, task=None)
        bench.probe(candidates.cuts(problem.completions[0]))
        return cls(
            given, engine, candidates, problem.costs["latency"], problem, bench, onnx_bytes(given.module, given.example)
        )

    @property
    def key(self) -> str:
        """What measured plans belong to: the model, the engine, and what was on offer."""
        offer = [[d.site, [[o.pattern, o.level] for o in d.options]] for d in self.problem.decisions]
        text = json.dumps([self.subject.name, self.subject.graph.signature, self.engine.identity, offer])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def wanted(self, plans: int, seed: int) -> Iterator[tuple[str, int, Choices]]:
        """Kind, number and choices of all plans; each depends on its own number only."""
        yield "cheapest", 0, self.problem.cheapest
        lowest = min(max(LOWEST, 1.02 * self.cost(self.problem.cheapest)), HIGHEST)
        for number, limit in enumerate(np.linspace(lowest, HIGHEST, PROBES)):
            yield "probe", number, random_walk(self._limited(limit), np.random.default_rng([PROBE_SEED, number]))
        for number in range(plans):
            rng = np.random.default_rng([seed, number])
            problem, stay = self._limited(rng.uniform(lowest, HIGHEST)), rng.uniform()
            yield "plan", number, lazy_walk(problem, rng, stay)

    def _limited(self, limit: float) -> Problem:
        return replace(self.problem, limits={"latency": float(limit)})

    def measure(self, kind: str, number: int, choices: Choices) -> Line:
        """Cut, export and time one plan against the dense model. Failure is a value."""
        line: Line = {
            "key": self.key, "model": self.subject.name, "kind": kind, "number": number,
            "predicted": self.cost(choices),
            "choices": [f"{c.site}: {c.pattern} {c.level}" for c in self.problem.plan(choices).choices],
        }  # fmt: skip
        try:
            cuts = self.candidates.cuts(choices)
            measured = timed(self.bench, cuts, self.dense_onnx, self.subject.example, self.engine, ROUNDS)
        except Exception as error:  # a plan that cannot be built or exported is a result
            return line | {"error": f"{type(error).__name__}: {error}"}
        if measured is None:
            return line | {"error": "the engine cannot run it"}
        return line | {
            "measured": measured.value, "interval": [measured.low, measured.high], "verdict": verdict(measured),
            **raw(measured),
        }  # fmt: skip


def lazy_walk(problem: Problem, rng: np.random.Generator, stay: float) -> Choices:
    """`random_walk`, but each site stays dense with probability `stay` where the target allows it."""
    choices: Choices = ()
    for _ in problem.decisions:
        mask = problem.mask(choices)
        dense = mask[0] and rng.uniform() < stay
        choices = (*choices, 0 if dense else int(rng.choice(np.flatnonzero(mask))))
    return choices


def run(name: str, engine: Engine, options: Any) -> Line:
    """Measure what is missing of one model, and summarise all of it."""
    bench, work = Bench.prepare(name, engine), options.work / "prediction.jsonl"
    known = {(line["kind"], line["number"]): line for line in _read(work) if line["key"] == bench.key}
    wanted = list(bench.wanted(options.plans, options.seed))
    missing = [entry for entry in wanted if entry[:2] not in known]
    start = time.perf_counter()
    for done, (kind, number, choices) in enumerate(missing, 1):
        line = bench.measure(kind, number, choices)
        known[kind, number] = line
        with work.open("a") as file:
            file.write(json.dumps(line) + "\n")
        left = (time.perf_counter() - start) / done * (len(missing) - done)
        found = f"{line['measured']:.3f}" if "measured" in line else line["error"]
        print(
            f"{name} {kind} {number}: predicted {line['predicted']:.3f}, measured {found}; {left:.0f} s left",
            flush=True,
        )
    return summary(name, [known[entry[:2]] for entry in wanted])


def _read(work: Path) -> list[Line]:
    return [json.loads(line) for line in work.read_text().splitlines()] if work.exists() else []


def summary(name: str, lines: Sequence[Line]) -> Line:
    """The figures of one model, and the lines they come from."""
    good = [line for line in lines if "measured" in line]
    factor = saving_factor([(line["predicted"], line["measured"]) for line in good if line["kind"] == "probe"])
    plans = [line for line in good if line["kind"] == "plan"]
    correction = corrected(Sum(0.0, ()), factor).constant  # of a plan that is predicted to take no time at all
    for line in plans:
        line["corrected"] = correction + factor * line["predicted"]
    fastest = [line["measured"] for line in good if line["kind"] == "cheapest"]
    return {
        "model": name,
        "plans": len(plans),
        "failed": len(lines) - len(good),
        "factor": factor,
        "error": spread([line["predicted"] / line["measured"] - 1 for line in plans]),
        "error_corrected": spread([line["corrected"] / line["measured"] - 1 for line in plans]),
        "slower": sum(line["interval"][0] > 1 for line in plans),
        "fastest_speedup": 1 / fastest[0] if fastest else None,
        "lines": list(lines),
    }


def spread(errors: Sequence[float]) -> dict[str, float | None]:
    """Median and 95th percentile of the absolute values."""
    sizes = np.abs(errors)
    if not len(sizes):
        return {"median": None, "p95": None}
    return {"median": float(np.median(sizes)), "p95": float(np.percentile(sizes, 95))}


def table(found: Sequence[Line]) -> str:
    """What is printed at the end."""
    text = [
        "                                |predicted / measured - 1|     corrected            lower end   fastest",
        "model            plans failed     median   95 % below     median   95 % below   above 1     plan",
    ]
    for one in found:
        errors = [value for name in ("error", "error_corrected") for value in one[name].values()]
        figures = "".join(f"{_percent(value):>12}" for value in errors)
        fastest = "-" if one["fastest_speedup"] is None else f"{one['fastest_speedup']:.2f}x"
        text.append(f"{one['model']:16} {one['plans']:5} {one['failed']:6}{figures}{one['slower']:10}{fastest:>10}")
    return "\n".join(text)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def plot(found: Sequence[Line], path: Path, title: str) -> None:
    """Predicted against measured shares: a panel for each model, with the band of 10 %."""
    figure = Figure(figsize=(4.2 * len(found), 4.9), layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, one in zip(panels, found, strict=True):
        plans = [line for line in one["lines"] if line["kind"] == "plan" and "measured" in line]
        measured = [line["measured"] for line in plans]
        raw, mended = ([line[name] for line in plans] for name in ("predicted", "corrected"))
        top = max([1.0, *measured, *raw, *mended]) * 1.03
        line = np.array([0, top])
        axes.fill_between(line, 0.9 * line, 1.1 * line, color="#dddddd", linewidth=0, label="within 10 %")
        axes.plot(line, line, color="#555555", linewidth=1)
        axes.scatter(measured, raw, s=16, facecolors="none", edgecolors="#999999", label="sum of layers")
        axes.scatter(measured, mended, s=18, color=COLOURS[one["model"]], label=f"corrected (x {one['factor']:.2f})")
        middle = one["error_corrected"]["median"]
        axes.set_title(one["model"] + ("" if middle is None else f": median error {100 * middle:.1f} %"), fontsize=10)
        axes.set(xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="measured share of dense latency")
        axes.legend(loc="upper left", frameon=False, fontsize=8)
    panels[0].set_ylabel("predicted share")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, summarise, write."""
    made = parser(__doc__)
    made.add_argument("--plans", type=int, default=60, help="random plans for each model")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--work", type=Path, default=Path("prediction_work"), help="folder for what is measured so far")
    options = made.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    engine = create(options.engine, threads=options.threads, batch=options.batch)
    found = [run(name, engine, options) for name in chosen(options.models)]
    print(table(found))
    body = {
        "engine": engine.identity,
        "seed": options.seed,
        "rounds": ROUNDS,
        "models": found,
        "environment": environment(),
    }
    stem = result_stem("prediction", options.threads, options.batch, options.engine)
    stem.with_name(stem.name + ".json").write_text(json.dumps(body) + "\n")
    plot(found, stem.with_name(stem.name + ".png"), engine.identity)


if __name__ == "__main__":
    main()
