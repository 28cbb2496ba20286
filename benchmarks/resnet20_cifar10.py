"""CIFAR-10 ResNet-20 at half its latency: search, fine-tune, measure, and read the test set once per row.

    python benchmarks/resnet20_cifar10.py --data DIR --weights cifar10_resnet20.safetensors

DIR is torchvision's CIFAR-10 folder or a folder of WebP sheets. Everything is resumable: started again, the search is
served from its study and the fine-tuning goes on from its checkpoint. Writes `results/resnet20_cifar10/`: result.json
(both rows, raw latency samples, seed, versions), plan.json, pruned.onnx, trials.csv.
"""

import argparse
import csv
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import graphprune as gp
from graphprune import models
from graphprune.counting import count
from graphprune.machine import environment
from graphprune.result import Result
from graphprune.tasks.task import Task
from graphprune.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "resnet20_cifar10"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with CIFAR-10")
    parser.add_argument("--weights", required=True, type=Path, help="trained cifar:resnet20, safetensors")
    parser.add_argument("--latency", type=float, default=0.49, help="target share of the dense latency")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads that fine-tuning takes")
    parser.add_argument("--work", type=Path, default=Path("resnet20_work"), help="folder for study and checkpoint")
    return parser.parse_args()


def progress(stage: str, done: int, total: int, note: str) -> None:
    """One line per step."""
    print(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total} {note}", flush=True)


def write_trials(result: Result) -> None:
    """Every trial of the search, in order."""
    with (RESULTS / "trials.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "validation", "predicted latency", "measured latency", "flops", "params", "error"])
        for number, record in enumerate(result.records):
            measured = record.measured.value if record.measured else ""
            sizes = [record.flops, record.params]
            writer.writerow([number, record.accuracy, record.predicted.get("latency"), measured, *sizes, record.error])


def row(name: str, result: Result, model: torch.nn.Module, task: Task) -> dict[str, object]:
    """One published row: test accuracy and sizes, counted on the module itself."""
    counts = count(model, task.example_inputs)
    accuracy = task.test_accuracy(model)
    print(f"{name}: test top-1 {accuracy:.2%}, {counts.flops / 1e6:.1f} MFLOPs, {counts.params / 1e3:.0f} k parameters")
    return {"name": name, "test_accuracy": accuracy, "flops": counts.flops, "params": counts.params}


def main() -> None:
    """Search, then publish what it found."""
    options = arguments()
    RESULTS.mkdir(parents=True, exist_ok=True)
    options.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    task = Task.load(f"cifar10:{options.data}", batch_size=128, seed=options.seed)
    dense = models.create("cifar:resnet20", options.weights)
    result = gp.search(
        dense, task, gp.Target(latency=options.latency), trials=options.trials, seed=options.seed,
        study=options.work / "study.db", progress=progress,
    )  # fmt: skip
    result = replace(result, spec="cifar:resnet20")
    searched = time.perf_counter() - start
    write_trials(result)
    (RESULTS / "plan.json").write_text(result.plan.to_json())
    print(f"search: {result.record.accuracy:.2%} validation at {result.record.measured.value:.3f}, {searched:.0f} s")
    publish(result, task, options, searched)


def publish(result: Result, task: Task, options: argparse.Namespace, searched: float) -> None:
    """Judge what the search found, fine-tune it, judge it again, and write the results."""
    start, dense = time.perf_counter() - searched, result.dense
    rows = [row("dense", result, dense, task), row("pruned, before fine-tuning", result, result.model, task)]

    torch.set_num_threads(options.threads)
    tuned = gp.finetune(
        result, task, recipe=Recipe(epochs=options.epochs, seed=options.seed),
        checkpoint=options.work / "finetune.safetensors",
        progress=lambda epoch, loss, accuracy: progress("tune", epoch, options.epochs, f"{loss:.3f} {accuracy:.2%}"),
    )  # fmt: skip
    rows.append(row("pruned, fine-tuned", tuned, tuned.model, task))
    gp.save(tuned, options.work / "saved")
    gp.export_onnx(dense, options.work / "dense.onnx", task.example_inputs)
    gp.export_onnx(tuned.model, RESULTS / "pruned.onnx", task.example_inputs)
    measurement = gp.measure([options.work / "dense.onnx", RESULTS / "pruned.onnx"], rounds=200, fresh=True)
    measurement = replace(measurement, names=("dense", "pruned"))
    print(measurement)
    body = {
        "rows": rows,
        "target": asdict(result.target),
        "speedup": measurement.speedup,
        "latency_share_before_tuning": asdict(result.record.measured),
        "validation_before": result.record.accuracy,
        "validation_after": tuned.record.accuracy,
        "trials": len(result.records),
        "seed": options.seed,
        "history": tuned.history,
        "notes": tuned.notes,
        "seconds": {"search": searched, "total": time.perf_counter() - start},
        "measurement": json.loads(measurement.to_json()),
        "environment": environment(),
    }
    (RESULTS / "result.json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
