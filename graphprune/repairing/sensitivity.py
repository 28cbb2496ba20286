"""What the error of a layer does to the network's output: the weights with which errors of layers are added up.

A relative error of 10 % is nothing in one layer and the end of the network in another. So every layer gets a few
typical errors, those that the least-squares solution leaves when half of its channels or all but the middle of its
kernel is cut, and one backward pass of random projections v of the outputs tells to first order how large an error of
the output each of them is: E[(v . J d)^2] = |J d|^2 for v ~ N(0, 1) (Hutchinson 1989). Taking the error itself and
not noise of its size matters: errors are alike at neighbouring pixels, which pooling does not average out. Errors of
cut channels and of cut kernels are weighted apart.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import exp, isfinite, prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from graphprune.coupling.graph import Layer, ModelGraph
from graphprune.coupling.operators import Weighted
from graphprune.cutting.exported import plain_module
from graphprune.repairing.calibration import CHANNELS, KERNEL, Moments, Statistics, calibrate, score_node
from graphprune.repairing.compensation import Loss, score_error

IMAGES = 128
POWER = 0.75
"""The weights are raised to it: layers that come later are solved again and take up a part of what reaches them, so
first order says too much (`benchmarks/sensitivity.py`)."""
DEPTH = 0.5
"""Logarithm of how much more an error counts at the end of the network than at its beginning, since fewer layers come
after it (likewise; from networks that no agent is judged on)."""
LARGEST_PASS = 2**27
"""Elements of all activations and errors of one pass: the batches are smaller where a model is large."""
Name = tuple[str, str]
Call = tuple[fx.Node, tuple[Any, ...], dict[str, Any], Tensor]
"""A node with its arguments and its value."""


@dataclass(frozen=True)
class Probe:
    """A typical error of the layer or branch `name`: its relative size, and the error itself at a call of its node.

    A name is a node and what is cut there.
    """

    name: Name
    error: float
    difference: Callable[[Call], Tensor]


def calibrated(
    graph: ModelGraph, batches: Sequence[Tensor], progress: Callable[[int, int, str], None] | None = None
) -> Statistics:
    """The statistics of a model with the weights of their errors. `batches` are input batches [N, ...].

    `progress` is told how much is done, of how much, and of what.
    """
    told = progress or (lambda *_: None)
    statistics = calibrate(graph, batches, lambda done, total: told(done, total, "moments"))
    statistics.weights = sensitivities(graph, statistics, batches, lambda done, total: told(done, total, "weights"))
    return statistics


def sensitivities(
    graph: ModelGraph,
    statistics: Statistics,
    batches: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> dict[Name, float]:
    """By the node of a layer or of a residual addition, and by what is cut there, how much an error changes the output.

    The mean over the layers is 1. `batches` are input batches [N, ...], of which the first `IMAGES` images are used.
    What the images do not reach (tables computed from parameters alone) is left out; all is where the network cannot
    be differentiated (integers as input, an operator without a gradient).
    """
    images = torch.cat(list(batches[: -(-IMAGES // len(batches[0]))]))[:IMAGES]
    probes = list(_probes(graph, statistics))
    if not probes or not images.is_floating_point():
        return {}
    at: dict[str, list[Probe]] = defaultdict(list)
    for node, probe in probes:
        at[node].append(probe)
    prober = _Prober(plain_module(graph.exported).eval(), at)
    each = sum(prod(node.shape) * (1 + len(at.get(node.name, ()))) for node in graph.nodes)
    count = max(1, LARGEST_PASS // max(each, 1))
    with suppress(RuntimeError, NotImplementedError):  # what torch raises where there is no gradient
        for first in range(0, len(images), count):
            prober.probe(images[first : first + count])
            if progress is not None:
                progress(min(first + count, len(images)), len(images))
        return _weights(prober.caused, [probe for _, probe in probes], graph)
    return {}


def _weights(caused: Mapping[Name, float], probes: Sequence[Probe], graph: ModelGraph) -> dict[Name, float]:
    known: dict[Name, float] = defaultdict(float)
    for probe in probes:
        known[probe.name] += probe.error
    causes = {name: caused[name] / error for name, error in known.items() if name in caused and error > 0}
    return tempered(causes, graph)


def tempered(
    causes: Mapping[Name, float], graph: ModelGraph, power: float = POWER, depth: float = DEPTH
) -> dict[Name, float]:
    """Weights from what errors cause to first order, allowing for the layers that are solved again after them.

    Their mean over the layers is 1; none where that cannot be.
    """
    place = {node.name: number / len(graph.nodes) for number, node in enumerate(graph.nodes)}
    raised = {name: cause**power * exp(depth * place[name[0]]) for name, cause in causes.items()}
    layers = {layer.node for layer in graph.layers}
    of_layers = [value for (node, _), value in raised.items() if node in layers]
    mean = sum(of_layers) / max(len(of_layers), 1)
    return {name: value / mean for name, value in raised.items()} if mean and isfinite(mean) else {}


# --- typical errors ------------------------------------------------------------------------------------------------


def _probes(graph: ModelGraph, statistics: Statistics) -> Iterator[tuple[str, Probe]]:
    """The typical errors, and the node that each is seen at."""
    for layer in graph.layers:
        if layer.node in statistics:
            moments = statistics[layer.node]
            loss = Loss(moments)
            for cut, kept in typical(layer, moments):
                yield layer.node, _weight_probe((layer.node, cut), moments, loss, kept)
        if layer.node in statistics.scores:
            yield score_node(graph, layer), _score_probe((layer.node, CHANNELS), statistics.scores[layer.node])
    for branch in graph.branches:
        share = statistics.branches.get(branch.node, 0.0)
        yield branch.node, Probe((branch.node, CHANNELS), share, _branch(branch.skip))


def typical(layer: Layer, moments: Moments) -> Iterator[tuple[str, Tensor]]:
    """Features that a cut may leave: the larger half of the channels; the middle column and row of the kernel."""
    assert isinstance(layer.operator, Weighted)
    kernel = layer.operator.kernel
    energy = moments.weight.square().sum((0, 1)) * torch.diagonal(moments.second, dim1=1, dim2=2).sum(0)
    features = torch.arange(len(energy)).reshape(-1, *kernel)
    if len(features) > 1:
        strongest = energy.reshape(len(features), -1).sum(1).argsort(descending=True)[: len(features) // 2]
        yield CHANNELS, features[strongest.sort().values].reshape(-1)
    if kernel[1] > 1:
        yield KERNEL, features[:, :, kernel[1] // 2].reshape(-1)
    if kernel[0] > 1:
        yield KERNEL, features[:, kernel[0] // 2].reshape(-1)


def _weight_probe(name: Name, moments: Moments, loss: Loss, kept: Tensor) -> Probe:
    change = -moments.weight.double()
    change[..., kept] += loss.best(kept)
    shift = -(change @ moments.mean[..., None]).reshape(-1) if moments.free_mean else None
    change = change.to(moments.weight.dtype)

    def difference(call: Call) -> Tensor:
        node, (source, weight, *rest), _, _ = call
        bias = None if shift is None else shift.to(source.dtype)
        value: Tensor = node.target(source, change.reshape(weight.shape).to(source.dtype), bias, *rest[1:])  # type: ignore
        return value

    return Probe(name, loss.error(kept), difference)


def _score_probe(name: Name, moments: Tensor) -> Probe:
    """Without the weaker half of the columns of queries and keys."""
    gone = torch.zeros(len(moments), dtype=torch.bool)
    gone[torch.diagonal(moments).argsort()[: len(moments) // 2]] = True

    def difference(call: Call) -> Tensor:
        node, (query, *rest), named, value = call
        cut: Tensor = node.target(query * ~gone, *rest, **named)  # type: ignore[operator]
        return cut - value

    return Probe(name, score_error(moments, gone), difference)


def _branch(skip: str) -> Callable[[Call], Tensor]:
    """What a residual branch adds."""

    def difference(call: Call) -> Tensor:
        node, (_, second, *_), _, value = call  # the first operand may have become the sum, in place
        branch: Tensor = second if node.args[0].name == skip else value - second  # type: ignore[union-attr]
        return branch

    return difference


class _Prober(fx.Interpreter):
    """Runs the exported graph forwards and backwards, and adds up what the typical errors do to the outputs."""

    def __init__(self, module: fx.GraphModule, probes: Mapping[str, Sequence[Probe]]) -> None:
        super().__init__(module)
        self.probes = probes
        self.caused: dict[Name, float] = defaultdict(float)
        self.random = torch.Generator().manual_seed(0)
        self.images = 0

    def probe(self, images: Tensor) -> None:
        """One pass over images [N, ...]."""
        self.images = len(images)
        try:
            with torch.enable_grad():
                source = images.detach().requires_grad_()
                found = self.run(source.clone())  # which may be written to
                outputs = [x for x in tree_leaves(found) if isinstance(x, Tensor) and x.requires_grad]
                drawn = [torch.randn(x.shape, generator=self.random).to(x) / _size(x) for x in outputs]
                torch.autograd.grad(outputs, source, drawn)
        finally:
            self.env = {}  # the hooks hold this object: with the outputs in it, nothing would ever be freed

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        seen = n.name in self.probes and value.requires_grad
        for probe in self.probes[n.name] if seen else ():
            arguments, named = self.fetch_args_kwargs_from_env(n)
            with torch.no_grad():
                difference = probe.difference((n, arguments, named, value))
            value.register_hook(lambda gradient, name=probe.name, d=difference: self._add(name, gradient, d))
        return value

    def _add(self, name: Name, gradient: Tensor, difference: Tensor) -> None:
        products = (gradient * difference).reshape(self.images, -1).sum(1, dtype=torch.float64)
        self.caused[name] += float(products.square().sum())


def _size(output: Tensor) -> Tensor:
    """The root mean square of an output, so that several count alike."""
    return output.detach().square().mean().sqrt().clamp_min(1e-12)
