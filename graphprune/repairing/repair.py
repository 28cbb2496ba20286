"""Repair of a cut model without training: every layer is solved again on the inputs that it will really see.

One pass over calibration images, through the cut graph: at each layer, in order, the weights that best reproduce the
dense layer's outputs from the *pruned* inputs replace the sliced ones (least squares, pulled towards the sliced
weights), and each batch norm takes its statistics from the images as they pass. Solving on pruned inputs makes later
layers correct what earlier ones lost; solving on dense inputs (Frantar & Alistarh 2022) leaves that error to add up.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from graphprune.coupling.graph import Layer, ModelGraph
from graphprune.coupling.operators import Masked, Mixture, Operator
from graphprune.coupling.tracing import operator_name
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.exported import cut_program, plain_module
from graphprune.repairing.calibration import (
    by_channel,
    by_tap,
    features_of,
    gram,
    largest_activation,
    positions_of,
    vectors,
)
from graphprune.repairing.compensation import cholesky, solve_rows

USUAL_ACTIVATION = 2**17
"""Elements of the largest activation of an image up to which all images are used: of larger ones there are fewer."""
LARGEST_REFERENCE = 2**29
LARGEST_INPUTS = 2**28
"""Elements of the dense outputs that are kept, and of one layer's input vectors: beyond that there are fewer rows."""
PULL = 1e-2
"""Strength of the pull towards the sliced weights, as a share of the mean second moment."""


@dataclass(frozen=True)
class Effort:
    """At most so many images, and over all of them so many input vectors (rows) from which a layer is solved."""

    images: int
    rows: int


QUICK = Effort(256, 2**14)
"""For the candidates of a search."""
FINE = Effort(1024, 2**16)
"""For what is delivered: a point or more (`benchmarks/compensation.py`), four times as slow."""


@dataclass(frozen=True)
class Reference:
    """What the dense model computes on the images that repair uses.

    `positions` are the sampled output positions of each convolution, `outputs` [rows, outputs] the dense outputs there.
    """

    images: Tensor
    positions: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


@torch.no_grad()
def make_reference(graph: ModelGraph, batches: Sequence[Tensor], effort: Effort = QUICK) -> Reference:
    """Run the dense model on the first calibration images, at most `effort` of them. `batches` are inputs [N, ...]."""
    usual = effort.images * USUAL_ACTIVATION // largest_activation(graph)
    count = max(8, min(effort.images, usual))
    chosen = torch.cat([batch[:count] for batch in batches[: -(-count // len(batches[0]))]])[:count]
    random = torch.Generator().manual_seed(0)
    layers = [layer for layer in graph.layers if layer.weight]
    kept, widest = sum(layer.outputs.size for layer in layers), max(map(features_of, layers), default=1)
    rows = min(effort.rows, LARGEST_REFERENCE // max(1, kept), LARGEST_INPUTS // widest)
    per_image = max(1, rows // len(chosen))
    positions = {layer.node: positions_of(layer, per_image, random) for layer in layers}
    recorder = _Recorder(plain_module(graph.exported).eval(), positions)
    recorder.run(chosen)
    return Reference(chosen, positions, recorder.outputs)


class _Recorder(fx.Interpreter):
    """Keeps the outputs of layers at the sampled positions."""

    def __init__(self, module: fx.GraphModule, positions: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self.positions = positions
        self.outputs: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.positions:
            self.outputs[n.name] = sampled(value, operator_name(n) == "linear", self.positions[n.name])
        return value


def sampled(value: Tensor, channels_last: bool, positions: Tensor) -> Tensor:
    """Outputs [rows, channels] at the sampled positions of each image."""
    value = value if value.dim() > 1 else value[None]
    flat = value.reshape(len(value), -1, value.shape[-1]) if channels_last else value.flatten(2).transpose(1, 2)
    return flat[:, positions].reshape(-1, flat.shape[-1])


@torch.no_grad()
def repair(pruned: nn.Module, model: nn.Module, graph: ModelGraph, cuts: Cuts, reference: Reference) -> None:
    """Solve the layers of `pruned`, which is `model` with `cuts` made, in place; batch norms are re-estimated.

    A layer is left alone while nothing before it was cut, so that an empty cut changes nothing.
    """
    if cuts == Cuts():
        return
    program = cut_program(graph, cuts, model)
    Solver(program, graph, cuts, reference).run(reference.images)
    solved = program.state_dict()
    state = pruned.state_dict()
    for name, value in solved.items():
        if name in state and state[name].shape == value.shape:
            state[name].copy_(value)


class Solver(fx.Interpreter):
    """Runs the cut graph; solves each layer before it is run, and lets batch norms see the images."""

    def __init__(
        self, module: nn.Module, graph: ModelGraph, cuts: Cuts, reference: Reference, pull: float = PULL
    ) -> None:
        super().__init__(module)  # type: ignore[arg-type]
        self.layers = {layer.node: layer for layer in graph.layers if layer.weight}
        self.cuts = cuts
        self.reference = reference
        self.pull = pull
        self.touched = False
        self.behind = _behind(graph, cuts)
        attributes = [node for node in self.module.graph.nodes if node.op == "get_attr"]  # type: ignore[union-attr]
        self.uses: Counter[int] = Counter()
        for node in attributes:
            self.uses[id(self.fetch_attr(str(node.target)))] += len(node.users)

    def run_node(self, n: fx.Node) -> Any:
        layer = self.layers.get(n.name)
        self.touched = self.touched or n.name in self.behind
        if layer is not None:
            self.touched = self.touched or self.cuts.operator(layer) != layer.operator
            if self.touched:
                self.solve(n, layer)
        if self.touched and operator_name(n) == "batch_norm":
            return self._normalise(n)
        return super().run_node(n)

    def solve(self, node: fx.Node, layer: Layer) -> None:
        """Put the best weights of a layer, on the inputs that have reached it, in the place of the sliced ones."""
        arguments, _ = self.fetch_args_kwargs_from_env(node)
        source = self.inputs(layer, arguments[0])
        kept = torch.from_numpy(layer.outputs.kept(self.cuts.kept))
        wanted, first = self.reference.outputs[layer.node].index_select(1, kept), 0
        for operator, weight, bias in self._parts(node, layer, arguments):
            if any(self.uses[id(shared)] > 1 for shared in (weight, bias) if shared is not None):
                continue  # tied: what is best for this layer is not for the others that use it
            inputs = vectors(source, operator, self.reference.positions[layer.node])
            groups, targets = len(inputs), wanted[:, first : first + len(weight)]
            first += len(weight)
            targets = targets.reshape(len(targets), groups, -1).transpose(0, 1)
            start = by_tap(weight.reshape(groups, -1, inputs.shape[-1]), operator)
            mask = self.cuts.masks.get(layer.node)
            mask = mask if mask is None else mask[layer.outputs.kept(self.cuts.kept)]
            best, shift = least_squares(inputs, targets, start, self.free_mean(node, bias), self.pull, mask)
            weight.copy_(by_channel(best, operator).reshape(weight.shape))
            if bias is not None:
                bias.copy_(shift.reshape(-1))

    def _parts(
        self, node: fx.Node, layer: Layer, arguments: Sequence[Any]
    ) -> Iterator[tuple[Operator, Tensor, Tensor | None]]:
        """The operators that make a layer's outputs, one after the other, with their weights and biases."""
        operator = self.cuts.operator(layer)
        if isinstance(operator, Masked):
            masked = self.fetch_attr(str(node.target))
            yield operator.dense, masked.weight, masked.bias
            return
        if not isinstance(operator, Mixture):
            yield operator, arguments[1], arguments[2] if len(arguments) > 2 else None
            return
        mixed = self.fetch_attr(str(node.target))
        for part, convolution in zip(operator.parts, mixed.parts, strict=True):
            yield part, convolution.weight, convolution.bias

    def inputs(self, layer: Layer, source: Tensor) -> Tensor:
        """What the layer is solved on, for the activation that has reached it."""
        return source

    def free_mean(self, node: fx.Node, bias: Tensor | None) -> bool:
        """Whether something takes up a constant shift of the layer's output."""
        return bias is not None or [operator_name(user) for user in node.users] == ["batch_norm"]

    def _normalise(self, node: fx.Node) -> Tensor:
        """Batch norm over the images at hand, whose statistics it keeps from now on."""
        arguments, _ = self.fetch_args_kwargs_from_env(node)
        source, weight, bias, mean, variance, _, _, epsilon = arguments[:8]
        return functional.batch_norm(source, mean, variance, weight, bias, training=True, momentum=1.0, eps=epsilon)


def _behind(graph: ModelGraph, cuts: Cuts) -> set[str]:
    """The nodes after the first sum that has lost a branch: what they read is not what it was."""
    names = [node.name for node in graph.exported.graph.nodes]
    first = min((names.index(branch.node) for branch in cuts.dropped), default=len(names))
    return set(names[first + 1 :])


def least_squares(
    inputs: Tensor, targets: Tensor, start: Tensor, centred: bool, pull: float = PULL,
    mask: NDArray[np.bool_] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The weights [groups, outputs, features] that map inputs [groups, rows, features] to targets, and the shift.

    Minimises |targets - W inputs - shift|^2 + strength |W - start|^2 per group, where the strength is `pull` times the
    inputs' mean second moment; the shift [groups, outputs] is 0 unless `centred`. Weights off the `mask`
    [outputs, features] of the only group are 0.
    """
    mean_in, mean_out = inputs.mean(1, keepdim=True).double(), targets.mean(1, keepdim=True).double()
    if not centred:
        mean_in, mean_out = torch.zeros_like(mean_in), torch.zeros_like(mean_out)
    rows, turned = inputs.shape[1], inputs.mT
    moments = gram(inputs).double() - rows * mean_in.mT @ mean_in
    cross = torch.bmm(turned, targets).double() - rows * mean_in.mT @ mean_out
    diagonal = torch.diagonal(moments, dim1=1, dim2=2)
    strength = (pull * diagonal.mean(1) + 1e-9)[:, None, None]
    moments = moments + strength * torch.eye(moments.shape[-1], dtype=moments.dtype)
    wanted = cross + strength * start.double().mT
    if mask is None:
        best = torch.cholesky_solve(wanted, cholesky(moments)).mT
    else:
        best = solve_rows(moments[0], wanted[0].T.contiguous(), mask)[None]
    shift = mean_out[:, 0] - torch.einsum("gof,gf->go", best, mean_in[:, 0])
    return best.to(start.dtype), shift.to(start.dtype)
