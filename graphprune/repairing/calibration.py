"""Calibration: one pass of the dense model over unlabelled images keeps the second moments of every layer's input.

For a layer with weight W [outputs, features] and inputs x (features = in x kh x kw of the unfolded input), the second
moments C = E[x x^T] tell the exact least-squares error of cutting any set of features, and the weights that attain it,
without another pass (Hassibi & Stork 1993, Optimal Brain Surgeon; Frantar & Alistarh 2022, OBC).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.coupling.graph import Layer, ModelGraph
from graphprune.coupling.operators import Convolution, Linear, Operator, Weighted
from graphprune.coupling.tracing import attended, operator_name
from graphprune.cutting.exported import plain_module

ROWS_PER_FEATURE = 32
LEAST_ROWS = 16384
"""Input vectors kept of each layer, spread evenly over images: enough for its moments to settle."""
LARGEST_BATCH = 2**23
"""Elements of the largest activation of a batch."""

CUTS = CHANNELS, KERNEL = "channels", "kernel"
"""What may be cut of a layer's inputs; where a node is no convolution, all that is cut of it counts as channels."""
WIDE = 256
"""Features from which half of a Gram matrix is mirrored; below that smaller products cost more than they save."""


@dataclass(frozen=True)
class Moments:
    """What calibration knows of one layer.

    `second` [groups, features, features] are the moments E[x x^T] of its input vectors, `mean` [groups, features]
    their mean, both float64; `weight` [groups, outputs, features] is the dense weight in its own format. `free_mean`
    says that a constant shift of the output costs nothing (a bias or a batch norm takes it up), so errors are measured
    around the mean.
    """

    second: Tensor
    mean: Tensor
    weight: Tensor
    free_mean: bool

    @property
    def matrix(self) -> Tensor:
        """The moments that errors are measured with, as a new tensor: centred where the mean is free."""
        return torch.baddbmm(self.second, self.mean[:, :, None], self.mean[:, None, :], alpha=-float(self.free_mean))

    @property
    def energy(self) -> float:
        """E[|W x|^2], the layer's output energy: the unit of its relative errors."""
        weight = self.weight.double()
        return float(((weight @ self.matrix) * weight).sum())


class Statistics(dict[str, Moments]):
    """Moments of each layer with a weight, by the name of its node.

    `branches` holds, by the node of its addition, E|branch|^2 / E|sum|^2 of each residual branch. `scores` holds, by
    the node of an attention product, the sum over images and heads of E[s s^T] [width, width] over pairs of tokens,
    where s_j = q_j k_j is what column j of queries and keys adds to a score, keys around their mean (softmax takes up
    what all tokens share; masks are not looked at). `weights` says by the same nodes, and by what is cut there (one of
    `CUTS`), how much an error matters to the network's output (`graphprune.repairing.sensitivity`).
    """

    def __init__(
        self, moments: Mapping[str, Moments], branches: Mapping[str, float], scores: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(moments)
        self.branches = dict(branches)
        self.scores = dict(scores or {})
        self.weights: dict[tuple[str, str], float] = {}

    def weight(self, node: str, cut: str = CHANNELS) -> float:
        """How much an error at a node counts; 1 where nothing is known, which is the mean of all layers."""
        known = [self.weights[node, kind] for kind in (cut, *CUTS) if (node, kind) in self.weights]
        return known[0] if known else 1.0


def largest_activation(graph: ModelGraph) -> int:
    """Elements of the largest tensor that one image makes."""
    return max((prod(node.shape) for node in graph.nodes), default=1)


def calibrate(
    graph: ModelGraph,
    batches: Sequence[Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Collect the moments of all layers and attention scores, and the energies of all residual branches.

    `batches` are input batches [N, ...] of a model with one input. Memory: features^2 numbers per layer, and
    activations of `LARGEST_BATCH` elements, for which batches are divided.
    """
    module = plain_module(graph.exported).eval()
    layers = {layer.node: layer for layer in graph.layers if layer.weight}
    images = sum(len(batch) for batch in batches)
    rows = {name: max(LEAST_ROWS, ROWS_PER_FEATURE * features_of(layer)) for name, layer in layers.items()}
    per_image = {name: -(-wanted // images) for name, wanted in rows.items()}
    products = {score_node(graph, layer): layer.node for layer in graph.layers if _has_free_width(graph, layer)}
    skips = {branch.node: branch.skip for branch in graph.branches}
    collector = _Collector(module, layers, per_image, skips, products)
    most = max(1, LARGEST_BATCH // largest_activation(graph))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            for part in torch.split(batch, most):
                collector.run(part)
            if progress is not None:
                progress(number + 1, len(batches))
    weights = graph.exported.state_dict
    moments = {name: collector.moments(layer, weights[layer.weight]) for name, layer in layers.items()}
    shares = {name: float(branch / whole.clamp_min(1e-30)) for name, (branch, whole) in collector.energies.items()}
    return Statistics(moments, shares, collector.scores)


def score_node(graph: ModelGraph, layer: Layer) -> str:
    """The node that multiplies queries and keys: that of the attention layer, or the first of its two products."""
    node = graph.calls[layer.node].node
    product = None if operator_name(node) == "scaled_dot_product_attention" else attended(node)
    return product.name if product is not None else layer.node


def _has_free_width(graph: ModelGraph, layer: Layer) -> bool:
    """Whether columns of queries and keys may be cut: not where they are tokens or pixels."""
    return layer.widths is not None and any(not graph.atom_frozen[atom] for atom in layer.widths[0].atoms())


def features_of(layer: Layer) -> int:
    """How many features an input vector of a layer has, in each of its groups."""
    operator = layer.operator
    if isinstance(operator, Convolution):
        return operator.inputs // operator.groups * operator.kernel[0] * operator.kernel[1]
    return layer.inputs.size


@dataclass
class _Sums:
    """Of input vectors x around `shift` [groups, 1, features]: the sums of (x - shift)^T (x - shift) and of x - shift.

    They exist before anything is computed: between what comes and goes they would hold the memory of all of it.
    """

    second: Tensor
    first: Tensor
    shift: Tensor
    count: int = 0

    @classmethod
    def empty(cls, layer: Layer) -> "_Sums":
        assert isinstance(layer.operator, Weighted)
        groups, features = layer.operator.groups, features_of(layer)
        second, first = (torch.zeros(groups, rows, features, dtype=torch.float64) for rows in (features, 1))
        return cls(second, first, torch.zeros_like(first))


class _Collector(fx.Interpreter):
    """Runs the exported graph and adds up the moments of what enters each layer."""

    def __init__(
        self,
        module: fx.GraphModule,
        layers: Mapping[str, Layer],
        per_image: Mapping[str, int],
        skips: Mapping[str, str],
        products: Mapping[str, str],
    ) -> None:
        super().__init__(module)
        self.products = products
        self.scores: dict[str, Tensor] = {}
        self.skips = skips
        self.energies: dict[str, tuple[Tensor, Tensor]] = {}
        self.layers = layers
        self.per_image = per_image
        self.sums = {name: _Sums.empty(layer) for name, layer in layers.items()}
        self.random = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        if n.name in self.layers:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            layer = self.layers[n.name]
            positions = positions_of(layer, self.per_image[n.name], self.random)
            self._add(n.name, vectors(arguments[0], layer.operator, positions))
        if n.name in self.products:
            (query, key, *_), _ = self.fetch_args_kwargs_from_env(n)
            self._add_scores(self.products[n.name], query, key if self.products[n.name] == n.name else key.mT)
        if n.name in self.skips:
            self._add_energies(n)
        return super().run_node(n)

    def _add_energies(self, node: fx.Node) -> None:
        """The squares of what a branch adds, and of the sum."""
        arguments, _ = self.fetch_args_kwargs_from_env(node)
        branch = arguments[1 if node.args[0].name == self.skips[node.name] else 0]  # type: ignore[union-attr]
        energies = [torch.linalg.vector_norm(x, dtype=torch.float64) ** 2 for x in (branch, sum(arguments[:2]))]
        before = self.energies.get(node.name, (0, 0))
        self.energies[node.name] = (energies[0] + before[0], energies[1] + before[1])

    def _add_scores(self, name: str, query: Tensor, key: Tensor) -> None:
        """Query and key [..., heads, tokens, width]; keys may have fewer heads (grouped queries)."""
        key = key - key.mean(-2, keepdim=True)
        of_queries, of_keys = (x.double().mT @ x.double() / x.shape[-2] for x in (query, key))
        if query.dim() == key.dim() > 2 and 1 < key.shape[-3] < query.shape[-3]:
            of_keys = of_keys.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        products = (of_queries * of_keys).reshape(-1, query.shape[-1], query.shape[-1])
        self.scores[name] = self.scores.get(name, 0) + products.sum(0)

    def _add(self, name: str, vectors: Tensor) -> None:
        """Add input vectors, of which this takes possession: they are moved to where sums lose nothing to rounding."""
        sums = self.sums[name]
        if not sums.count:
            sums.shift.copy_(vectors.mean(1, keepdim=True))
        vectors -= sums.shift.to(vectors.dtype)
        sums.second.add_(gram(vectors))
        sums.first.add_(vectors.sum(1, keepdim=True, dtype=torch.float64))
        sums.count += vectors.shape[1]

    def moments(self, layer: Layer, weight: Tensor) -> Moments:
        """The moments of a layer, whose sums are let go."""
        sums = self.sums.pop(layer.node)
        second, mean, shift = sums.second.div_(sums.count), sums.first / sums.count, sums.shift
        second.baddbmm_(mean.mT, shift).baddbmm_(shift.mT, mean + shift)
        second = by_channel(by_channel(second, layer.operator).mT, layer.operator).mT.contiguous()
        mean = by_channel((mean + shift)[:, 0], layer.operator)
        shaped = weight.detach().reshape(*mean.shape[:1], -1, mean.shape[1])
        return Moments(second, mean, shaped, self._free_mean(layer))

    def _free_mean(self, layer: Layer) -> bool:
        node = next(node for node in self.module.graph.nodes if node.name == layer.node)  # type: ignore[union-attr]
        biased = len(node.args) > 2 and node.args[2] is not None
        users = [operator_name(user) for user in node.users if user.op == "call_function"]
        return biased or users == ["batch_norm"]


def positions_of(layer: Layer, most: int, random: torch.Generator) -> Tensor:
    """Up to `most` random output positions of a layer, the same in every image: pixels, or rows of a linear layer."""
    operator = layer.operator
    count = prod(operator.output_size) if isinstance(operator, Convolution) else operator.rows  # type: ignore[union-attr]
    return torch.randperm(count, generator=random)[:most]


def vectors(source: Tensor, operator: Operator, positions: Tensor) -> Tensor:
    """The input vectors [groups, images * positions, features] of a layer at some output positions of each image.

    `source` is [N, inputs, H, W] for a convolution, whose features are ordered by tap, then by channel (a weight's are
    the other way round: `by_tap` and `by_channel` translate), so that whole pixels are copied; else [N, ..., inputs].
    """
    if isinstance(operator, Linear):
        source = source if source.dim() > 1 else source[None]  # a table from parameters alone may have no batch axis
        flat = source.reshape(len(source), -1, source.shape[-1])[:, positions]
        return flat.reshape(-1, operator.groups, source.shape[-1] // operator.groups).transpose(0, 1)
    assert isinstance(operator, Convolution)
    top, left, bottom, right = (max(end, 0) for end in operator.padding)
    images, channels, height, width = source.shape
    pixels = source.new_zeros(images, top + height + bottom, left + width + right, channels)
    pixels[:, top : top + height, left : left + width] = source.permute(0, 2, 3, 1)
    columns = operator.output_size[1]
    y = (positions // columns) * operator.stride[0] + max(-operator.padding[0], 0)
    x = (positions % columns) * operator.stride[1] + max(-operator.padding[1], 0)
    taps_y = torch.arange(operator.kernel[0]) * operator.dilation[0]
    taps_x = torch.arange(operator.kernel[1]) * operator.dilation[1]
    spots = (y[:, None, None] + taps_y[:, None]) * pixels.shape[2] + x[:, None, None] + taps_x
    chosen = pixels.flatten(1, 2).index_select(1, spots.reshape(-1))
    grouped = chosen.reshape(len(source) * len(positions), spots[0].numel(), operator.groups, -1)
    return grouped.permute(2, 0, 1, 3).reshape(operator.groups, len(grouped), -1)


def gram(vectors: Tensor) -> Tensor:
    """X^T X of vectors [groups, rows, features]; of wide ones, what mirrors another block is not computed."""
    features = vectors.shape[-1]
    if features < WIDE:
        return torch.bmm(vectors.mT, vectors)
    left, right = vectors[..., : features // 2], vectors[..., features // 2 :]
    across = torch.bmm(left.mT, right)
    return torch.cat([torch.cat([gram(left), across], 2), torch.cat([across.mT, gram(right)], 2)], 1)


def by_tap(weight: Tensor, operator: Operator) -> Tensor:
    """A weight's last axis (channel, then tap) in the order of `vectors`."""
    return _reordered(weight, operator, (-1, _taps(operator)))


def by_channel(weight: Tensor, operator: Operator) -> Tensor:
    """The inverse of `by_tap`."""
    return _reordered(weight, operator, (_taps(operator), -1))


def _reordered(tensor: Tensor, operator: Operator, shape: tuple[int, int]) -> Tensor:
    if not isinstance(operator, Convolution):
        return tensor
    return tensor.reshape(*tensor.shape[:-1], *shape).mT.flatten(-2)


def _taps(operator: Operator) -> int:
    return prod(operator.kernel) if isinstance(operator, Convolution) else 1
