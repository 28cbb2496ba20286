"""What the pretrained policy proposes for a model it has never seen, before anything is tried there.

    python benchmarks/first_plan.py --data DIR --weights DIR [--models resnet20] [--agents uniform,magnitude,autosculpt]

DATA is torchvision's CIFAR-10 folder or a folder of WebP sheets, WEIGHTS a folder with cifar10_<model>.safetensors;
those that `train.py` has written are found by themselves. Every agent gets one trial, all on one study, so on the same
tables, the same latency correction and the same images: at `LATENCY` of the dense latency, on 500 validation images.
`dp` beside them is what the tables alone give. The agents' own latency is predicted in the search and measured in a
process of its own at its end. No test set is read, nothing is fine-tuned. Writes
`results/first_plan-<engine>-1t-<processor>.json`, model by model.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import zoo
from common import result_file
from equal_latency import first_images

import graphprune as gp
from graphprune.machine import environment

LATENCY = 0.5
IMAGES = 500
Line = dict[str, Any]


def arguments() -> argparse.Namespace:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", required=True, help="folder with CIFAR-10")
    made.add_argument("--weights", required=True, type=Path, help="folder with cifar10_<model>.safetensors")
    made.add_argument("--models", default="resnet20")
    made.add_argument("--agents", default="uniform,magnitude,dp,autosculpt")
    made.add_argument("--work", type=Path, default=Path("first_plan_work"), help="folder for studies")
    return made.parse_args()


def first_plan(model: str, agent: str, task: gp.Task, options: argparse.Namespace) -> Line:
    """One search of one trial."""
    dense = zoo.build(model, zoo.weights_of(model, [options.weights, zoo.TRAINED]))
    start = time.perf_counter()
    study = options.work / f"{model}.db"
    found = gp.search(dense, task, gp.Target(latency=LATENCY), agent, trials=1, study=study)
    (record,) = found.records
    measured = found.record.measured
    assert measured is not None
    return {
        "model": model, "agent": agent, "latency": LATENCY, "images": IMAGES, "accuracy": record.accuracy,
        "predicted": record.predicted["latency"], "measured": [measured.value, measured.low, measured.high],
        "samples": {"dense": measured.dense, "candidate": measured.candidate},
        "plan": json.loads(found.plan.to_json()), "dense": found.dense_record.accuracy,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    """All agents on all models; the results of other models in the file are kept."""
    options = arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    whole = gp.Task.load(f"cifar10:{options.data}", batch_size=128)
    task = replace(whole, validation=tuple(first_images(whole.validation, IMAGES)))
    path = result_file("first_plan")
    lines: list[Line] = json.loads(path.read_text())["plans"] if path.exists() else []
    for model in options.models.split(","):
        lines = [line for line in lines if line["model"] != model]
        for agent in options.agents.split(","):
            line = first_plan(model, agent, task, options)
            lines.append(line)
            low, high = line["measured"][1:]
            print(
                f"{model} {agent:10} {line['accuracy']:.1%} at {line['predicted']:.3f} predicted, "
                f"{low:.3f} to {high:.3f} measured, {line['seconds']:.0f} s", flush=True,
            )  # fmt: skip
        path.write_text(json.dumps({"plans": lines, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
