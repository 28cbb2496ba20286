"""The model graph as other tools expect it: networkx, PyTorch Geometric, and the arrays that agents see."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import networkx
import numpy as np
import torch
from numpy.typing import NDArray

from graphprune.coupling.graph import Layer, ModelGraph, Node
from graphprune.coupling.operators import Convolution
from graphprune.searching.problem import GraphView

if TYPE_CHECKING:
    from torch_geometric.data import Data

FLOW, COUPLING = 0, 1
"""Edge types: a tensor that one operator makes and another reads; two layers that share an axis to be cut."""

OPERATORS: dict[str, tuple[str, ...]] = {
    "convolution": ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    "product": ("linear", "matmul", "bmm", "einsum"),
    "attention": ("scaled_dot_product_attention",),
    "norm": ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"),
    "activation": ("relu", "gelu", "silu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "sigmoid", "tanh", "elu"),
    "sum": ("add", "sub"),
    "scale": ("mul", "div", "pow", "exp"),
    "softmax": ("softmax", "log_softmax"),
    "pooling": ("mean", "sum", "adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "adaptive_max_pool2d"),
    "joint": ("cat", "stack", "split", "split_with_sizes", "chunk", "unbind", "getitem", "select", "slice", "pad"),
    "shape": ("reshape", "view", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "expand"),
}
"""Kinds of operators, by ATen name (a trailing underscore dropped); every other operator is of the kind "other"."""

KINDS = (*OPERATORS, "other")

FEATURES = (
    *(f"is {kind}" for kind in KINDS),
    "log2 of the first size / 8",
    "log2 of the second size / 8",
    "log2 of the other sizes / 8",
    "FLOPs / mean of a layer",
    "parameters / mean of a layer",
    "kernel height / 3",
    "kernel width / 3",
    "stride / 2",
    "log2 of the groups / 8",
)
"""Columns of `to_pyg(graph).x`. Sizes are those of the output without its batch axis: channels, height and width, or
tokens and features; kernel, stride and groups are 0 where there is no convolution. All are of order 1."""

CURVE = 5
"""Points of a layer's error curve."""

VIEW_FEATURES = (
    *FEATURES,
    "latency / mean of a layer",
    "mean |weight| x sqrt(weights of an output)",
    "standard deviation of the weights x sqrt(weights of an output)",
    *(f"error curve {point}" for point in range(CURVE)),
)
"""Columns of `graph_view(...).features`. A weight scaled by the root of its fan-in is of order 1 in a trained layer."""


def to_networkx(graph: ModelGraph) -> networkx.DiGraph:
    """The graph of operators; an edge is a tensor, with its `shape` at batch 1.

    Node attributes: `op` (ATen name), `module` (path), `shape` (of the output at batch 1), `flops` (multiply-adds x 2),
    `parameters` (elements of the layer's weight) and `groups` (names of the groups that run through it).
    """
    view = networkx.DiGraph()
    for node in graph.nodes:
        layer = graph.layer.get(node.name)
        view.add_node(
            node.name,
            op=node.op,
            module=node.module,
            shape=node.shape,
            flops=layer.operator.flops if layer else 0,
            parameters=layer.operator.parameters if layer else 0,
            groups=_groups(graph, node),
        )
    for source, target in _flow(graph):
        view.add_edge(source.name, target.name, shape=source.shape)
    return view


def to_pyg(graph: ModelGraph) -> "Data":
    """The graph as PyTorch Geometric data, nodes in the order of `graph.nodes`.

    `x` [nodes, F] float32 with the columns `FEATURES`; `edge_index` [2, E]; `edge_type` [E], `FLOW` or `COUPLING`.
    Coupling edges are a star around each group's first layer, so their number is linear in the layers.
    """
    with warnings.catch_warnings():  # importing it warns of its own use of torch.jit
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=Warning)
        from torch_geometric.data import Data

    edges, types = _edges(graph)
    return Data(
        x=torch.from_numpy(_features(graph)), edge_index=torch.from_numpy(edges), edge_type=torch.from_numpy(types)
    )


def graph_view(graph: ModelGraph, latency: Mapping[str, float], curves: Mapping[str, Sequence[float]]) -> GraphView:
    """What agents see of the graph: features [nodes, F] with the columns `VIEW_FEATURES`, nodes as in `graph.nodes`.

    By the name of a layer's node: `latency` in seconds, `curves` with `CURVE` weighted errors, each rising as more is
    cut. What is missing counts as 0.
    """
    base = _features(graph)
    extra = np.zeros((len(graph.nodes), len(VIEW_FEATURES) - len(FEATURES)), dtype=np.float32)
    seconds = {node: value for node, value in latency.items() if math.isfinite(value)}
    for row, node in enumerate(graph.nodes):
        layer = graph.layer.get(node.name)
        if layer is not None:
            extra[row, 0] = _relative(seconds.get(node.name, 0.0), seconds.values())
            extra[row, 1:3] = _weight_statistics(graph, layer)
            extra[row, 3:] = curves.get(node.name, (0.0,) * CURVE)
    edges, types = _edges(graph)
    return GraphView(np.concatenate([base, extra], axis=1), edges, types)


def _groups(graph: ModelGraph, node: Node) -> tuple[str, ...]:
    layer = graph.layer.get(node.name)
    atoms = set().union(*(form.atoms() for form in node.axes), layer.inputs.atoms() if layer else set())
    return tuple(group.name for group in graph.all_groups if group.atom in atoms)


def _flow(graph: ModelGraph) -> Iterable[tuple[Node, Node]]:
    known = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        yield from ((known[source], node) for source in node.inputs if source in known)


def _edges(graph: ModelGraph) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    position = {node.name: number for number, node in enumerate(graph.nodes)}
    flow = [(position[source.name], position[target.name]) for source, target in _flow(graph)]
    stars: dict[tuple[int, int], None] = {}
    coupled = _coupled(graph)
    for group in graph.all_groups:
        hub, *others = dict.fromkeys(position[node] for node in coupled.get(group.atom, [])) or [-1]
        stars |= {(hub, other): None for other in others}
    pairs = np.array([*flow, *stars], dtype=np.int64).reshape(-1, 2)
    types = np.repeat(np.array([FLOW, COUPLING], dtype=np.int64), [len(flow), len(stars)])
    return np.ascontiguousarray(pairs.T), types


def _coupled(graph: ModelGraph) -> Mapping[int, list[str]]:
    """The layers that each atom runs through, its producers first."""
    found: dict[int, list[str]] = {}
    made = [(layer.node, layer.outputs) for layer in graph.layers]
    read = [(layer.node, layer.inputs) for layer in graph.layers]
    for node, form in made + read:
        for atom in form.atoms():
            found.setdefault(atom, []).append(node)
    return found


def _features(graph: ModelGraph) -> NDArray[np.float32]:
    flops = [layer.operator.flops for layer in graph.layers]
    parameters = [layer.operator.parameters for layer in graph.layers]
    rows = []
    for node in graph.nodes:
        layer = graph.layer.get(node.name)
        cost = (layer.operator.flops, layer.operator.parameters) if layer else (0, 0)
        kind = _kinds().get(node.op.rstrip("_"), "other")
        rows.append(
            [
                *(float(kind == known) for known in KINDS),
                *_sizes(node.shape),
                _relative(cost[0], flops),
                _relative(cost[1], parameters),
                *_geometry(layer),
            ]
        )
    return np.array(rows, dtype=np.float32).reshape(len(graph.nodes), len(FEATURES))


@cache
def _kinds() -> dict[str, str]:
    return {name: kind for kind, names in OPERATORS.items() for name in names}


def _sizes(shape: tuple[int, ...]) -> list[float]:
    first, second, *rest = (*shape[1:], 1, 1)
    return [math.log2(max(1, size)) / 8 for size in (first, second, math.prod(rest))]


def _relative(value: float, values: Iterable[float]) -> float:
    """A value in units of the mean."""
    known = list(values)
    total = sum(known)
    return value * len(known) / total if total else 0.0


def _geometry(layer: Layer | None) -> list[float]:
    if layer is None or not isinstance(layer.operator, Convolution):
        return [0.0] * 4
    height, width = layer.operator.kernel
    return [height / 3, width / 3, max(layer.operator.stride) / 2, math.log2(layer.operator.groups) / 8]


def _weight_statistics(graph: ModelGraph, layer: Layer) -> tuple[float, float]:
    weight: Any = graph.exported.state_dict.get(layer.weight)
    if weight is None or not weight.numel():
        return 0.0, 0.0
    values = weight.detach().float()
    scale = math.sqrt(values.numel() / values.shape[0])
    return float(values.abs().mean()) * scale, float(values.std(correction=0)) * scale
