"""A share of latency in quiet and in other moments: one pruned network against its dense one, again and again.

    python benchmarks/moments.py --weights DIR [--seconds 120]

WEIGHTS is a folder with cifar10_resnet56.safetensors; the pruned network is the shipped file of the headline table. In
turns, a measurement as long as those of a search's trials is taken as it comes, and another one by `Stopwatch`, which
waits for a quiet moment. Whatever else the machine does meanwhile belongs to the question, so it is named (`--beside`).
Each run is added to `results/moments-<engine>-1t-<processor>.json`: raw samples, and when they were taken.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import zoo
from common import RESULTS, raw, result_file

from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.machine import environment
from graphprune.onnx_files.export import onnx_bytes
from graphprune.record import Share
from graphprune.timing.quiet import ALIKE, Stopwatch

MODEL = "resnet56"
PRUNED = RESULTS / "headline" / f"{MODEL}-autosculpt-2x.onnx"
PAUSE = 1.0
"""Seconds between measurements."""


def watched(dense: bytes, pruned: bytes, seconds: float) -> list[dict[str, Any]]:
    """Measurements of both kinds for so many seconds."""
    engine = OnnxRuntimeEngine()
    stopwatch, lines, start = Stopwatch(engine, dense), [], time.perf_counter()
    stopwatch.look()
    while (now := time.perf_counter() - start) < seconds:
        share = Stopwatch(engine, dense).share(pruned)  # it knows of no faster moment, so it waits for none
        stopwatch.fastest = min(stopwatch.fastest, median(share.dense))
        lines.append(line("as it comes", now, share))
        begun = time.perf_counter()
        lines.append(line("stopwatch", begun - start, stopwatch.share(pruned)))
        lines[-1]["took"] = time.perf_counter() - begun
        time.sleep(PAUSE)
    return lines


def line(kind: str, at: float, share: Share) -> dict[str, Any]:
    """What is kept of one measurement."""
    return {"kind": kind, "at": at, "share": share.value, "dense": median(share.dense), **raw(share)}


def told(lines: list[dict[str, Any]]) -> str:
    """Mean, standard deviation and range of the shares of either kind, and of all in quiet and in other moments."""
    fastest = min(line["dense"] for line in lines)
    kinds = {
        "as it comes": [line for line in lines if line["kind"] == "as it comes"],
        "stopwatch": [line for line in lines if line["kind"] == "stopwatch"],
        "in quiet moments": [line for line in lines if line["dense"] <= ALIKE * fastest],
        "in other moments": [line for line in lines if line["dense"] > ALIKE * fastest],
    }
    text = [f"dense model: {fastest * 1e3:.2f} ms at its fastest"]
    for name, own in kinds.items():
        shares = [line["share"] for line in own]
        if len(shares) > 1:
            spread = f"{mean(shares):.3f}, sd {stdev(shares):.3f}, {min(shares):.3f} to {max(shares):.3f}"
            text.append(f"{name:18} {len(shares):4} times  {spread}")
    took = [line["took"] for line in kinds["stopwatch"]]
    text.append(f"a measurement by stopwatch took {median(took):.1f} s in the median, {max(took):.1f} s at most")
    return "\n".join(text)


def main() -> None:
    """Measure, keep, tell."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--weights", type=Path, required=True)
    made.add_argument("--seconds", type=float, default=120.0)
    made.add_argument("--beside", default="nothing", help="what else the machine does")
    options = made.parse_args()
    torch.set_num_threads(1)
    dense = zoo.build(MODEL, zoo.weights_of(MODEL, [options.weights, zoo.TRAINED])).eval()
    lines = watched(onnx_bytes(dense, (torch.randn(2, 3, 32, 32),)), PRUNED.read_bytes(), options.seconds)
    file = result_file("moments")
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    runs.append({"beside": options.beside, "model": MODEL, "lines": lines})
    file.write_text(json.dumps({"runs": runs, "environment": environment()}) + "\n")
    for run in runs:
        print(f"{run['model']}, beside {run['beside']}\n{told(run['lines'])}")


if __name__ == "__main__":
    main()
