"""A small timm ViT, trained on scikit-learn's digits at 32x32, through the whole search.

    python benchmarks/vit_digits.py

Trains the dense model (seeded), searches for 0.6 of its latency, fine-tunes, and measures in a fresh process. The test
set is read once per row. Writes `results/vit_digits-<engine>-1t-<processor>.json`.
"""

import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from common import result_file

import graphprune as gp
from graphprune import models
from graphprune.counting import count
from graphprune.machine import environment
from graphprune.randomness import seeded
from graphprune.training.finetune import train
from graphprune.training.recipe import Recipe

SPEC = "timm:vit_tiny_patch16_224?img_size=32&patch_size=4&embed_dim=96&depth=4&num_heads=3&num_classes=10"
LATENCY = 0.6
TRIALS = 20


def main() -> None:
    """Train, search, fine-tune, export, measure, write."""
    task = gp.Task.load("digits", batch_size=64)
    with seeded(0):
        model = models.create(SPEC)
    start = time.perf_counter()
    dense = train(model, task, Recipe(epochs=20), progress=print).model
    trained = time.perf_counter() - start
    result = gp.search(dense, task, gp.Target(latency=LATENCY), trials=TRIALS, rivals=("uniform",), progress=print)
    searched = time.perf_counter() - start - trained
    tuned = gp.finetune(result, task, epochs=10)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "dense.onnx", Path(folder) / "pruned.onnx"]
        for file, module in zip(files, (dense, tuned.model), strict=True):
            gp.export_onnx(module, file, task.example_inputs)
        measurement = gp.measure(files, rounds=100, fresh=True)
    measurement = replace(measurement, names=("dense", "pruned"))
    body = {
        "model": SPEC,
        "target": LATENCY,
        "met": result.met,
        "test_accuracy": {
            "dense": task.test_accuracy(dense),
            "pruned": task.test_accuracy(result.model),
            "fine-tuned": task.test_accuracy(tuned.model),
        },
        "validation": {
            name: record.accuracy for name, record in (("autosculpt", result.record), *result.rivals.items())
        },
        "sizes": {
            "dense": asdict(count(dense, task.example_inputs)),
            "pruned": asdict(count(tuned.model, task.example_inputs)),
        },
        "own_class": type(tuned.model) is type(dense),
        "choices": [f"{choice.site}: {choice.pattern} {choice.level}" for choice in result.plan.choices],
        "speedup": measurement.speedup,
        "seconds": {"training": trained, "search": searched},
        "measurement": json.loads(measurement.to_json()),
        "environment": environment(),
    }
    path = result_file("vit_digits")
    path.write_text(json.dumps(body, indent=1) + "\n")
    print(
        json.dumps({key: body[key] for key in ("met", "test_accuracy", "validation", "speedup", "seconds")}, indent=1)
    )


if __name__ == "__main__":
    main()
