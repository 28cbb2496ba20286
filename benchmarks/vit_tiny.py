"""vit_tiny_patch16_224 with half its heads and half its hidden units: what ONNX Runtime makes of it.

    python benchmarks/vit_tiny.py

Random weights, native size. Writes `results/vit_tiny-<engine>-<threads>t-<processor>.json`: sizes, how far ONNX Runtime
and torch are apart, and raw latency samples of both models, interleaved, in a process of their own.
"""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from common import result_file

import graphprune as gp
from graphprune import models
from graphprune.counting import count
from graphprune.cutting.surgery import operate
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.machine import environment

SPEC = "timm:vit_tiny_patch16_224"


def main() -> None:
    """Cut, export, compare, measure, write."""
    torch.manual_seed(0)
    model = models.create(SPEC).eval()
    example = torch.randn(2, 3, 224, 224)
    graph = gp.trace(model, example)
    plan = gp.uniform_plan(graph, keep=0.5)
    outcome = operate(model, graph, plan)
    engine = OnnxRuntimeEngine()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "dense.onnx", Path(folder) / "pruned.onnx"]
        for file, module in zip(files, (model, outcome.model), strict=True):
            gp.export_onnx(module, file, example)
        with torch.no_grad():
            expected = outcome.model.eval()(example).numpy()
        (got,) = engine.run(files[1], {"x": example.numpy()})
        measurement = gp.measure(files, rounds=60, fresh=True)
    measurement = replace(measurement, names=("dense", "pruned"))
    print(measurement)
    body = {
        "model": SPEC,
        "plan": json.loads(plan.to_json())["choices"],
        "own_class": outcome.own_class,
        "sizes": {"dense": asdict(count(model, example)), "pruned": asdict(count(outcome.model, example))},
        "relative_difference_to_torch": float(np.abs(got - expected).max() / np.abs(expected).max()),
        "speedup": measurement.speedup,
        "measurement": json.loads(measurement.to_json()),
        "environment": environment(),
    }
    path = result_file("vit_tiny")
    path.write_text(json.dumps(body, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
