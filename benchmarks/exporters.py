"""torch's two ONNX exporters, behind the same rewriting: seconds of an export, and how fast their files run.

    python benchmarks/exporters.py [--models SPEC,...] [--rounds N]

Random weights, native input size, one thread, batch 1; both files of a model are timed in turn. Writes
`results/exporters-<engine>-1t-<processor>.json`: seconds, raw latency samples, and the newer exporter's time as a share
of the older one's with a 95 % interval.
"""

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

import onnx_ir as ir
import torch
from common import MODELS, result_file

import graphprune as gp
from graphprune import models
from graphprune.machine import environment
from graphprune.onnx_files.exporters import by_dynamo, by_torchscript, convert, prepare

SPECS = [*MODELS.values(), "timm:swin_tiny_patch4_window7_224", "timm:convnext_atto", "timm:efficientnet_b0"]


def row(spec: str, rounds: int) -> dict[str, Any]:
    """One model by both exporters."""
    model = models.create(spec).eval()
    request = prepare(model, torch.randn(2, *models.default_input_size(spec, model)), True, None)
    files, seconds = [], []
    for route in (by_torchscript, by_dynamo):
        start = time.perf_counter()
        files.append(ir.to_proto(convert(request, (route,))).SerializeToString())
        seconds.append(time.perf_counter() - start)
    measured = gp.measure(files, threads=1, rounds=rounds)
    share = measured.shares[-1]
    if share is None:
        raise SystemExit(f"{spec}: {measured.timings[-1].error}")
    return {
        "model": spec,
        "seconds": dict(zip(("older", "newer"), seconds, strict=True)),
        "newer / older": asdict(share),
    }


def main() -> None:
    """Export and time all models, write the table."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", default=",".join(SPECS))
    made.add_argument("--rounds", type=int, default=60)
    options = made.parse_args()
    torch.set_num_threads(1)
    row(SPECS[0], 2)  # what is imported on first use is no exporter's time
    table = []
    for spec in options.models.split(","):
        table.append(row(spec, options.rounds))
        seconds, share = table[-1]["seconds"], table[-1]["newer / older"]
        print(
            f"{spec:40} older {seconds['older']:6.2f} s, newer {seconds['newer']:6.2f} s; "
            f"newer / older latency {share['value']:.3f} ({share['low']:.3f} to {share['high']:.3f})",
            flush=True,
        )
        result_file("exporters").write_text(json.dumps({"rows": table, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
