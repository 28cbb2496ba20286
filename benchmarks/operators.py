"""What cuts of one convolution buy on this machine, the losing ones included.

    python benchmarks/operators.py

Every row is timed as the profile times it: many copies against one, in the engine's blocked layout, with a fresh cache.
Writes `results/operators-<engine>-1t-<processor>.json`: seconds of each pass, speed-up over dense, share of FLOPs.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from common import result_file

from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.machine import environment
from graphprune.operators import Convolution
from graphprune.profile import Profile

SHAPES = ((16, 32), (32, 16), (64, 8), (64, 56), (256, 14))
"""Channels and height (= width)."""


def rows(channels: int, size: int) -> dict[str, tuple[Convolution, Convolution]]:
    """What is compared: name -> (dense, cut)."""
    dense = Convolution(1, channels, channels, size, size, (3, 3), padding=(1, 1, 1, 1))
    half = channels // 2
    return {
        "kernel 3x1 centre": (dense, dense.window((0, 3), (1, 2))),
        "kernel 3x1 left (needs a crop)": (dense, dense.window((0, 3), (0, 1))),
        "kernel 2x2": (dense, dense.window((0, 2), (0, 2))),
        "kernel 1x1 centre": (dense, dense.window((1, 2), (1, 2))),
        "half of the output channels": (dense, replace(dense, outputs=half)),
        "one output channel fewer": (dense, replace(dense, outputs=channels - 1)),
        "one input and output channel fewer": (dense, replace(dense, inputs=channels - 1, outputs=channels - 1)),
    }


def main() -> None:
    """Measure all rows in one run and write them."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Profile(OnnxRuntimeEngine(), Path(folder) / "timings.jsonl")
        cases = {(c, s): rows(c, s) for c, s in SHAPES}
        profile.fill([operator for case in cases.values() for pair in case.values() for operator in pair])
        table = [
            {
                "channels": channels,
                "size": size,
                "cut": name,
                "speedup": profile.gain([dense], [cut]),
                "flops_share": cut.flops / dense.flops,
                "dense_seconds": profile.timing(dense).samples,
                "cut_seconds": profile.timing(cut).samples,
            }
            for (channels, size), case in cases.items()
            for name, (dense, cut) in case.items()
        ]
    for entry in table:
        print(f"{entry['channels']:4} {entry['size']:3} {entry['cut']:36} {entry['speedup']:5.2f}x")
    path = result_file("operators")
    path.write_text(json.dumps({"rows": table, "block": profile.block, "environment": environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
