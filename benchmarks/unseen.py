"""What the plans that searches returned are worth on images that no search has seen.

    python benchmarks/unseen.py --data DIR --weights DIR [--results FILE]

The best of 200 accuracies on 1,000 images is partly luck, and the more so the more the plans differ. Here the plan that
each search of `convergence.py` returned is cut and repaired anew and judged on 4,000 other images, which are in neither
the validation nor the calibration slice. No test set is read: these images are of the training set, which networks of
`train.py` were trained on, unlike their validation slice, so that only plans of one network compare. FILE is what
`convergence.py` wrote on a machine with this processor, or another one of its files.

Where FILE is of a machine with this processor, all plans of a model and the dense model are also timed together,
interleaved, as they are when the searches disturb each other no more: run it with nothing beside it.

Resumable: a judged plan is a line in WORK/unseen.jsonl. Writes `results/unseen-<...>.json`, named as FILE is, with all
samples, and prints the mean (and the range) over the seeds of each agent, and the latencies.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import zoo
from common import case, raw, result_file, spread
from equal_latency import Rows

import graphprune as gp
from graphprune.cutting.cuts import resolve
from graphprune.cutting.surgery import remember
from graphprune.machine import environment
from graphprune.onnx_files.export import onnx_bytes
from graphprune.plan import Plan
from graphprune.repairing.repair import FINE, make_reference
from graphprune.searching.evaluation import Workbench
from graphprune.tasks.task import Task

UNSEEN = 4000
BATCH = 500
ROUNDS = 100
KEYS = ("model", "agent", "seed", "trials", "images")
Line = dict[str, Any]
"""A search: `KEYS`, the best accuracy that it saw, and `unseen`, that of the plan that it returned; `latency` (share of
the dense one, ends of the interval) and `seconds` where that was timed.
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="folder with CIFAR-10")
    made.add_argument("--weights", required=True, type=Path, help="folder with cifar10_<model>.safetensors")
    made.add_argument("--results", type=Path, default=result_file("convergence"), help="what convergence.py wrote")
    made.add_argument("--work", type=Path, default=Path("unseen_work"), help="folder for what is judged already")
    return made.parse_args()


def unseen(task: Task, data: str) -> Task:
    """A task of CIFAR-10 whose validation images are others, which are in neither of the task's slices."""
    seen = task.images + sum(map(len, task.calibration))
    parts = map(torch.cat, zip(*Task.load(f"cifar10:{data}", validation=seen + UNSEEN).validation, strict=True))
    inputs, targets = (part[seen:].split(BATCH) for part in parts)
    return replace(task, validation=tuple(zip(inputs, targets, strict=True)))


@dataclass(frozen=True)
class Judge:
    """Judges plans for one network: a bench that repairs as searches do in the end, and a task of unseen images."""

    bench: Workbench
    unseen: Task

    @classmethod
    def of(cls, model: str, images: int, options: argparse.Namespace) -> "Judge":
        """For searches on so many validation images."""
        task = Task.load(f"cifar10:{options.data}", batch_size=128, validation=images)
        module = zoo.build(model, zoo.weights_of(model, [options.weights, zoo.TRAINED])).eval()
        graph = remember(module, gp.trace(module, task.example_inputs))
        bench = Workbench(module, graph, make_reference(graph, task.calibration, FINE), task)
        return cls(bench, unseen(task, options.data))

    def accuracy(self, plan: Plan) -> float:
        """The accuracy of a plan."""
        cuts = resolve(self.bench.graph, plan)
        return self.unseen.accuracy(self.bench.settled(cuts).build(cuts))

    def timed(self, plans: Sequence[Plan]) -> list[Line]:
        """The latencies of some plans, measured together."""
        files = [onnx_bytes(self.bench.model, self.bench.task.example_inputs)]
        for plan in plans:
            cuts = resolve(self.bench.graph, plan)
            pruned = self.bench.settled(cuts).cut(cuts).eval()
            files.append(onnx_bytes(pruned, self.bench.task.example_inputs))
        shares = gp.measure(files, rounds=ROUNDS).shares[1:]
        assert None not in shares, "searches return plans that run"
        return [{"latency": [one.value, one.low, one.high], **raw(one)} for one in shares if one is not None]


def table(lines: Sequence[Line]) -> str:
    """A row for each agent on a model and its tables with so many trials."""
    text = [
        f"{'model':16} {'tables':8} {'trials':>6} {'agent':24} {'best seen':>24} {'returned, unseen':>24}   latency"
    ]
    groups = dict.fromkeys((case(line), line["trials"], line["agent"]) for line in lines)
    for (model, tables), trials, agent in groups:
        own = [x for x in lines if (case(x), x["trials"], x["agent"]) == ((model, tables), trials, agent)]
        cells = (spread([line[name] for line in own]) for name in ("best", "unseen"))
        latency = ", ".join(f"{line['latency'][0]:.3f}" for line in own if "latency" in line)
        text.append(
            f"{model:16} {tables:8} {trials:6} {agent:24} "
            + " ".join(f"{cell:>24}" for cell in cells)
            + f"   {latency}"
        )
    return "\n".join(text)


def main() -> None:
    """Judge what is not judged yet, then time all plans."""
    options = arguments()
    kept, rows = Rows(options.work / "unseen.jsonl"), []
    searches: list[Line] = [line for line in json.loads(options.results.read_text())["searches"] if line["met"]]
    for model in dict.fromkeys(line["model"] for line in searches if line["model"] in zoo.NETWORKS):
        rows += judged(model, [line for line in searches if line["model"] == model], kept, options)
    published = [{name: value for name, value in row.items() if name != "plan"} for row in rows]
    body = {"unseen images": UNSEEN, "plans": published, "environment": environment()}
    name = options.results.name.replace("convergence", "unseen")
    result_file("unseen").with_name(name).write_text(json.dumps(body, indent=1) + "\n")
    print(table(rows))


def judged(model: str, searches: Sequence[Line], kept: Rows, options: argparse.Namespace) -> list[Line]:
    """The lines of all searches on a model; those not `kept` yet are judged."""
    here = options.results.name == result_file("convergence").name
    missing = [line for line in searches if not kept.has(**facts(line))]
    if missing or here:
        judge = Judge.of(model, searches[0]["images"], options)
    for line in missing:
        best = max(accuracy for accuracy in line["accuracy"] if accuracy is not None)
        kept.add(facts(line) | {"best": best, "unseen": judge.accuracy(plan_of(line))})
        print(table(kept.rows[-1:]).splitlines()[1], flush=True)
    own = [row for row in kept.rows if row["model"] == model]
    timings = judge.timed([plan_of(row) for row in own]) if here else [{}] * len(own)
    return [row | timing for row, timing in zip(own, timings, strict=True)]


def facts(search: Line) -> Line:
    """What a judged plan is known by."""
    return {key: search[key] for key in (*KEYS, "plan")} | {"tables": case(search)[1]}


def plan_of(line: Line) -> Plan:
    """The plan that a search returned."""
    return Plan.from_json(json.dumps(line["plan"]))


if __name__ == "__main__":
    main()
