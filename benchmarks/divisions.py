"""In which form a linear layer in groups runs fastest: why `groups` writes a Split, products and a Concat.

    python benchmarks/divisions.py [--threads 1]

Every form computes the same outputs from the same weights, which is checked. A model runs several layers, each on a
ReLU of what the one before read, and adds up what they give, a GELU behind each. All forms of a shape are timed
interleaved, against the dense layers. Writes `results/divisions-<engine>-<threads>t-<processor>.json`.
"""

import argparse
import json
from collections.abc import Callable
from statistics import median

import torch
from common import result_stem
from torch import nn
from torch.nn import functional

import graphprune as gp
from graphprune.cutting.division import GroupedLinear, divided
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.machine import environment
from graphprune.onnx_files.export import onnx_bytes
from graphprune.randomness import seeded

ROWS = (1, 197)
MATRICES = ((192, 768), (384, 1536), (768, 3072), (192, 192), (768, 768), (3072, 768))
"""Inputs and outputs."""
GROUPS = (2, 4)
LAYERS = 6
ROUNDS = 40
Form = Callable[[torch.Tensor, GroupedLinear], torch.Tensor]


def products(source: torch.Tensor, layer: GroupedLinear) -> torch.Tensor:
    """Split, a product for each group, Concat, one bias: what the pattern writes."""
    return layer(source)


def biased(source: torch.Tensor, layer: GroupedLinear) -> torch.Tensor:
    """On two axes, where a product and its bias are one operator (Gemm)."""
    rows = source.reshape(-1, source.shape[-1])
    parts = zip(*(whole.chunk(layer.groups, axis) for whole, axis in _wholes(rows, layer)), strict=True)
    joined = torch.cat([functional.linear(part, weight, bias) for part, weight, bias in parts], -1)
    return joined.reshape(*source.shape[:-1], -1)


def batched(source: torch.Tensor, layer: GroupedLinear) -> torch.Tensor:
    """One product with the groups as its batch, between two transpositions."""
    rows = source.reshape(-1, layer.groups, layer.weight.shape[1]).transpose(0, 1)
    weight = layer.weight.reshape(layer.groups, -1, layer.weight.shape[1]).transpose(1, 2)
    return (rows @ weight).transpose(0, 1).reshape(*source.shape[:-1], -1) + layer.bias


def convolved(source: torch.Tensor, layer: GroupedLinear) -> torch.Tensor:
    """A grouped 1x1 convolution between two transpositions."""
    image = functional.conv1d(source.transpose(1, 2), layer.weight[:, :, None], layer.bias, groups=layer.groups)
    return image.transpose(1, 2)


def _wholes(rows: torch.Tensor, layer: GroupedLinear) -> tuple[tuple[torch.Tensor, int], ...]:
    return (rows, -1), (layer.weight, 0), (layer.bias, 0)


FORMS: dict[str, Form] = {
    "split, products, concat": products,
    "the same with a bias each": biased,
    "one batched product": batched,
    "grouped convolution": convolved,
}


class Stack(nn.Module):
    """Layers side by side, in one form."""

    def __init__(self, layers: nn.ModuleList, form: Callable[[torch.Tensor, nn.Module], torch.Tensor]) -> None:
        super().__init__()
        self.layers, self.form = layers, form

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """[1, rows, inputs] -> [1, rows, outputs]."""
        total = None
        for layer in self.layers:
            source = functional.relu(source)
            result = functional.gelu(self.form(source, layer))
            total = result if total is None else total + result
        return total


def stacks(inputs: int, outputs: int, groups: int) -> dict[str, Stack]:
    """The dense layers, and all forms of the same layers in groups."""
    with seeded(0):
        dense = nn.ModuleList(nn.Linear(inputs, outputs) for _ in range(LAYERS))
    parts = nn.ModuleList(divided(layer, groups) for layer in dense)
    return {"dense": Stack(dense, lambda source, layer: layer(source))} | {
        name: Stack(parts, form) for name, form in FORMS.items()
    }


def row(rows: int, inputs: int, outputs: int, groups: int, engine: OnnxRuntimeEngine) -> dict[str, object]:
    """One shape: seconds of every round, and the speed-ups."""
    source = torch.randn(1, rows, inputs, generator=torch.Generator().manual_seed(0))
    models = {name: stack.eval() for name, stack in stacks(inputs, outputs, groups).items()}
    expected, *others = (model(source) for name, model in models.items() if name != "dense")
    for other in others:
        torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-4)
    timings = gp.measure([onnx_bytes(model, source) for model in models.values()], rounds=ROUNDS, engine=engine).timings
    seconds = {name: list(timing.samples) for name, timing in zip(models, timings, strict=True)}
    gains = {name: median(d / f for d, f in zip(seconds["dense"], own, strict=True)) for name, own in seconds.items()}
    gains.pop("dense")
    shape = f"{rows:4} rows, {inputs:4} to {outputs:4}, {groups} groups"
    print(shape + "".join(f"   {name} {gain:.2f}x" for name, gain in gains.items()), flush=True)
    return {
        "rows": rows, "inputs": inputs, "outputs": outputs, "groups": groups, "speedup": gains, "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Every shape, then the file."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=1)
    options = made.parse_args()
    engine = OnnxRuntimeEngine(options.threads)
    table = [
        row(rows, *matrix, groups, engine) for groups in GROUPS for matrix in MATRICES for rows in ROWS
    ]  # fmt: skip
    path = result_stem("divisions", options.threads, 1)
    body = {"rows": table, "environment": environment()}
    path.with_name(path.name + ".json").write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
