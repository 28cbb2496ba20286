"""What cuts of one layer buy on this machine, the losing ones included: masks of 2 in 4 weights buy nothing.

    python benchmarks/operators.py

Every row is timed as the profile times it: many copies against one, in the engine's blocked layout, with a fresh cache.
Writes `results/operators-<engine>-1t-<processor>.json`: seconds of each pass, speed-up over dense, share of FLOPs.
"""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from common import result_file

from graphprune.coupling.operators import Convolution, Linear, Masked, Operator
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.machine import environment
from graphprune.timing.profile import Profile

SHAPES = ((16, 32), (32, 16), (64, 8), (64, 56), (256, 14))
"""Channels and height (= width) of convolutions."""
MATRICES = ((192, 768), (768, 192), (768, 3072), (3072, 768))
"""Inputs and outputs of linear layers, on the 197 tokens of a vision transformer."""
TOKENS = 197


def rows(channels: int, size: int) -> dict[str, tuple[Convolution, Convolution | Masked]]:
    """What is compared: name -> (dense, cut)."""
    dense = Convolution(1, channels, channels, size, size, (3, 3), padding=(1, 1, 1, 1))
    half, pointwise = channels // 2, Convolution(1, channels, channels, size, size, (1, 1))
    return {
        "kernel 3x1 centre": (dense, dense.window((0, 3), (1, 2))),
        "kernel 3x1 left (needs a crop)": (dense, dense.window((0, 3), (0, 1))),
        "kernel 2x2": (dense, dense.window((0, 2), (0, 2))),
        "kernel 1x1 centre": (dense, dense.window((1, 2), (1, 2))),
        "half of the output channels": (dense, replace(dense, outputs=half)),
        "one output channel fewer": (dense, replace(dense, outputs=channels - 1)),
        "one input and output channel fewer": (dense, replace(dense, inputs=channels - 1, outputs=channels - 1)),
        "2:4 mask of a 1x1 convolution": (pointwise, Masked(pointwise)),
    }


def masks(inputs: int, outputs: int) -> dict[str, tuple[Linear, Masked]]:
    """The same of a linear layer."""
    dense = Linear(TOKENS, inputs, outputs)
    return {f"2:4 mask of a linear layer to {outputs}": (dense, Masked(dense))}


def main() -> None:
    """Measure all rows in one run and write them."""
    with tempfile.TemporaryDirectory() as folder:
        profile = Profile(OnnxRuntimeEngine(), Path(folder) / "timings.jsonl")
        cases: dict[tuple[int, int], dict[str, tuple[Operator, Operator]]] = {(c, s): {**rows(c, s)} for c, s in SHAPES}
        for inputs, outputs in MATRICES:
            cases.setdefault((inputs, TOKENS), {}).update(masks(inputs, outputs))
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
