"""What the pretrained policy proposes for a model it has never seen, before anything is tried there.

    python benchmarks/first_plan.py --data DIR --weights DIR [--models resnet20] [--agents uniform,magnitude,autosculpt]

DATA is torchvision's CIFAR-10 folder or a folder of WebP sheets, WEIGHTS a folder with cifar10_<model>.safetensors;
those that `train.py` has written are found by themselves. Every agent gets one trial at each of `LATENCIES`, shares of
the dense latency; all of a model share the tables, the latency correction and the images. `dp` beside them is what the
tables alone give. One plan says little: plans that the tables hold for equal differ by points, so the mean over the
latencies is printed too. Latency is predicted, and measured on the spot. No test set is read, nothing is fine-tuned.
Writes `results/first_plan-<engine>-1t-<processor>.json`, model by model.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from common import prepared, raw, result_file, trained_parser

from graphprune.agents import create
from graphprune.machine import environment
from graphprune.searching.search import Session

LATENCIES = (0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4)
Line = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    made = trained_parser(__doc__, "resnet20")
    made.add_argument("--agents", default="uniform,magnitude,dp,autosculpt")
    made.add_argument("--images", type=int, default=2000, help="validation images")
    made.add_argument("--work", type=Path, default=Path("first_plan_work"), help="folder for studies")
    return made.parse_args()


def first_plan(session: Session, agent: str, latency: float) -> Line:
    """A search of one trial."""
    start = time.perf_counter()
    (record,) = replace(session, limits={"latency": latency}).solve(create(agent), trials=1, seed=0).records
    measured = record.measured
    assert measured is not None
    return {
        "agent": agent, "latency": latency, "accuracy": record.accuracy, "predicted": record.predicted["latency"],
        "measured": [measured.value, measured.low, measured.high],
        **raw(measured), "plan": json.loads(record.plan.to_json()), "dense": session.dense.accuracy,
        "taken": time.perf_counter() - start,
    }  # fmt: skip


def table(lines: Sequence[Line]) -> str:
    """A row for each agent on a model: a column for each latency, and the mean."""
    text = [f"{'model':12} {'agent':12}" + "".join(f"{latency:>9}" for latency in LATENCIES) + "     mean"]
    for model, agent in dict.fromkeys((line["model"], line["agent"]) for line in lines):
        found = [line["accuracy"] for line in lines if (line["model"], line["agent"]) == (model, agent)]
        text.append(f"{model:12} {agent:12}" + "".join(f"{value:9.1%}" for value in [*found, mean(found)]))
    return "\n".join(text)


def main() -> None:
    """All agents on all models; the results of other models in the file are kept."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    path = result_file("first_plan")
    lines: list[Line] = json.loads(path.read_text())["plans"] if path.exists() else []
    for model in options.models.split(","):
        lines = [line for line in lines if line["model"] != model]
        session = prepared(model, options, min(LATENCIES), options.work / f"{model}.db")
        for agent, latency in product(options.agents.split(","), LATENCIES):
            line = {"model": model, "images": options.images, **first_plan(session, agent, latency)}
            lines.append(line)
            low, high = line["measured"][1:]
            print(
                f"{model} {agent:10} {line['accuracy']:.1%} at {line['predicted']:.3f} predicted, "
                f"{low:.3f} to {high:.3f} measured, {line['taken']:.0f} s", flush=True,
            )  # fmt: skip
        path.write_text(json.dumps({"plans": lines, "environment": environment()}) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
