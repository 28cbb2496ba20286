"""Norms and activations behind concatenated convolutions: moved where the engine fuses them, left alone elsewhere."""

import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.onnx_files.exporters import by_torchscript, prepare
from graphprune.onnx_files.spread import spread
from tests.graphprune.oracle import scramble

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Sides(nn.Module):
    """Three convolutions, concatenated, and what follows."""

    def __init__(self, after: Callable[[torch.Tensor], torch.Tensor], axis: int = 1, bias: bool = True) -> None:
        super().__init__()
        kernels = ((3, 1), (1, 3), (1, 1)) if axis == 1 else ((1, 1), (1, 1), (1, 1))
        self.sides = nn.ModuleList(
            nn.Conv2d(
                3, 4 if axis > 1 else 2 + n, kernel, padding=(kernel[0] // 2, kernel[1] // 2), bias=bias or n == 1
            )
            for n, kernel in enumerate(kernels)
        )
        self.after = after
        self.axis = axis

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(torch.cat([side(x) for side in self.sides], self.axis))


class ReadTwice(nn.Module):
    """A relu, and a second reader of what it reads."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * torch.tanh(x).mean((2, 3), keepdim=True)


def spread_out(model: nn.Module) -> tuple[int, Counter[str]]:
    """Export, spread, check that ONNX Runtime computes the same; returns how many moved, and the operators left."""
    with warnings.catch_warnings(action="ignore"):
        made = by_torchscript(prepare(scramble(model, dtype=torch.float32), X, True, None))
    moved = spread(made)
    (found,) = OnnxRuntimeEngine().run(ir.to_proto(made).SerializeToString(), {made.graph.inputs[0].name: X.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, model(X).numpy(), rtol=0, atol=1e-5)
    return moved, Counter(node.op_type for node in made.graph)


@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_goes_into_the_weights(bias: bool) -> None:
    moved, left = spread_out(Sides(nn.BatchNorm2d(9), bias=bias))
    assert moved == 1
    assert left["Conv"] == 3
    assert left["BatchNormalization"] == 0


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.2), nn.Sigmoid()])
def test_norm_and_activation_go_into_the_branches(activation: nn.Module) -> None:
    moved, left = spread_out(Sides(nn.Sequential(nn.BatchNorm2d(9), activation, nn.Conv2d(9, 2, 1))))
    assert moved == 2
    assert left["BatchNormalization"] == 0
    assert max(count for name, count in left.items() if name not in ("Conv", "Constant")) == 3


def test_what_is_read_elsewhere_too_stays() -> None:
    assert spread_out(Sides(ReadTwice()))[0] == 0


def test_other_axes_and_other_makers_stay() -> None:
    assert spread_out(Sides(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), axis=2))[0] == 0
    assert spread_out(Sides(nn.Softplus()))[0] == 0
    pooled = Sides(nn.ReLU())
    pooled.sides[1] = nn.Sequential(pooled.sides[1], nn.MaxPool2d(3, 1, 1))
    assert spread_out(pooled)[0] == 0
