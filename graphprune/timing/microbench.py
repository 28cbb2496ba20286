"""Small ONNX models that time one operator in the surroundings it has in a real network.

A lone operator would mostly time what surrounds it: the call, the conversion between the plain and the engine's blocked
channel layout, the copy of the result. So an operator is timed by the difference of two models which agree in
everything but its number of copies:

    x0 -> Relu -> x1 -> Relu -> x2 ... ;    y = op1(x1) + op2(x2) + ... + opN(xN)     against     y = opN(xN)

Each copy has its own input, just produced by another node in the layout the engine chose, and its own weights, so a
crop pays for leaving the blocked layout, and weights that exceed a cache are fetched again, as in a real network.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from graphprune.coupling.operators import Attention, Convolution, Linear, Masked, Mixture, Operator
from graphprune.errors import InputError

METHOD = 1
"""To be raised whenever a change here changes what is measured: kept timings of another method are not used."""

OPSET = 18
IR_VERSION = 9

MOST_COPIES = 8
LEAST_COPIES = 2
FLOPS_BUDGET = 4e8
"""Copies are chosen so that all of them together stay within about this (multiply-adds x 2), some milliseconds."""
WEIGHTS_BUDGET = 1 << 24
"""... and within this number of weights, where one copy does not exceed it already."""

IMAGE_CHANNELS = 4
"""Inputs with at most so many channels are the network's own, in plain layout; others come from a convolution."""

PATTERN = np.random.default_rng(0).standard_normal(4099).astype(np.float32)
"""Weights repeat these values: what they are does not matter, and drawing millions takes longer than timing them."""

PAIRS = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]], np.float32)
"""Which of 4 inputs a mask keeps, in turns."""


@dataclass(frozen=True)
class Microbench:
    """Two models, serialised, whose times differ by `copies` executions of the operator."""

    model: bytes
    baseline: bytes
    copies: int


def microbench(operator: Operator, batch: int = 1) -> Microbench:
    """The models that time the operator: (time of `model` - time of `baseline`) / `copies` is one execution.

    `batch` is the number of examples, of each of which the operator is told the work.

    Raises InputError for an activation that is not known here.
    """
    dense = _dense(operator)
    if isinstance(dense, Linear) and dense.activation not in _ACTIVATION:
        raise InputError(f"unknown activation {dense.activation!r}; known: {', '.join(filter(None, _ACTIVATION))}")
    copies = _copies(operator, batch)
    return Microbench(_build(operator, batch, copies + 1, copies + 1), _build(operator, batch, copies + 1, 1), copies)


def _dense(operator: Operator) -> Operator:
    return operator.dense if isinstance(operator, Masked) else operator


def _copies(operator: Operator, batch: int) -> int:
    fit = min(FLOPS_BUDGET / max(1, batch * operator.flops), WEIGHTS_BUDGET / max(1, operator.parameters))
    return int(min(MOST_COPIES, max(LEAST_COPIES, fit))) - 1


@dataclass
class _Graph:
    """An ONNX graph being written; every method returns the name of the tensor it made.

    Shapes are told at batch 1; the first axis of each input holds `batch` times as much.
    """

    batch: int
    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)

    def input(self, first: int, *others: int) -> str:
        name = f"input{len(self.inputs)}"
        shape = (self.batch * first, *others)
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def constant(self, value: NDArray[np.generic]) -> str:
        name = f"constant{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, *shape: int, thinned: int | None = None) -> str:
        """A weight; along the axis `thinned`, 2 of each 4 are zero."""
        value = np.resize(PATTERN, shape)
        if thinned is not None:
            rows = np.moveaxis(value, thinned, -1)
            rows *= np.resize(PAIRS, rows.shape)
        return self.constant(value)

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, dtype=np.float32))

    def add(self, operation: str, *inputs: str, **attributes: Any) -> str:
        name = f"tensor{len(self.nodes)}"
        self.nodes.append(helper.make_node(operation, list(inputs), [name], **attributes))
        return name

    def split(self, source: str, parts: int) -> list[str]:
        """Equal parts along the last axis."""
        names = [f"tensor{len(self.nodes)}_{part}" for part in range(parts)]
        self.nodes.append(helper.make_node("Split", [source], names, axis=-1, num_outputs=parts))
        return names

    def serialise(self, output: str) -> bytes:
        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "microbench", self.inputs, [result], self.weights)
        opset = [helper.make_opsetid("", OPSET)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION)
        return bytes(model.SerializeToString())


def _build(operator: Operator, batch: int, sources: int, copies: int) -> bytes:
    """`sources` inputs, one after the other, the last `copies` of them read by the operator; the results are added."""
    graph = _Graph(batch)
    current = _SOURCE[type(operator)](graph, operator)
    results = []
    for number in range(sources):
        current = tuple(graph.add("Relu", name) for name in current)
        if number >= sources - copies:
            results.append(_EMIT[type(operator)](graph, operator, *current))
    total = results[0]
    # A convolution takes the addition in; the others do not, so that their baseline adds as often as their model.
    addends = results[1:] if isinstance(_dense(operator), Convolution) else (results * sources)[1:sources]
    for result in addends:
        total = graph.add("Add", result, total)
    return graph.serialise(total)


def _convolution_source(graph: _Graph, operator: Convolution) -> tuple[str, ...]:
    image = graph.input(operator.batch, min(operator.inputs, IMAGE_CHANNELS), operator.height, operator.width)
    if operator.inputs <= IMAGE_CHANNELS:
        return (image,)
    return (graph.add("Conv", image, graph.weight(operator.inputs, IMAGE_CHANNELS, 1, 1)),)


def _convolution(graph: _Graph, operator: Convolution, source: str, masked: bool = False) -> str:
    shape = operator.outputs, operator.inputs // operator.groups, *operator.kernel
    weight = graph.weight(*shape, thinned=1 if masked else None)
    return graph.add(
        "Conv",
        _crop(graph, operator.padding, source),
        weight,
        graph.weight(operator.outputs),
        kernel_shape=operator.kernel,
        strides=operator.stride,
        dilations=operator.dilation,
        pads=[max(0, side) for side in operator.padding],
        group=operator.groups,
    )


def _mixture_source(graph: _Graph, operator: Mixture) -> tuple[str, ...]:
    return _convolution_source(graph, operator.parts[0])


def _mixture(graph: _Graph, operator: Mixture, source: str) -> str:
    return graph.add("Concat", *(_convolution(graph, part, source) for part in operator.parts), axis=1)


def _crop(graph: _Graph, padding: tuple[int, int, int, int], source: str) -> str:
    """Cut off as much as the padding is negative on each side."""
    if min(padding) >= 0:
        return source
    top, left, bottom, right = (max(0, -side) for side in padding)
    end = np.iinfo(np.int64).max
    stops = [-side if side else end for side in (bottom, right)]
    return graph.add("Slice", source, graph.integers(top, left), graph.integers(*stops), graph.integers(2, 3))


def _linear_source(graph: _Graph, operator: Linear) -> tuple[str, ...]:
    return (graph.input(1, operator.rows, operator.inputs),)


def _linear(graph: _Graph, operator: Linear, source: str, masked: bool = False) -> str:
    shape, thinned = (operator.inputs // operator.groups, operator.outputs // operator.groups), 0 if masked else None
    parts = graph.split(source, operator.groups) if operator.groups > 1 else [source]
    products = [graph.add("MatMul", part, graph.weight(*shape, thinned=thinned)) for part in parts]
    product = graph.add("Concat", *products, axis=-1) if operator.groups > 1 else products[0]
    return _ACTIVATION[operator.activation](graph, graph.add("Add", product, graph.weight(operator.outputs)))


def _masked_source(graph: _Graph, operator: Masked) -> tuple[str, ...]:
    return _SOURCE[type(operator.dense)](graph, operator.dense)


def _masked(graph: _Graph, operator: Masked, source: str) -> str:
    return _EMIT[type(operator.dense)](graph, operator.dense, source, masked=True)


def _relu(graph: _Graph, source: str) -> str:
    return graph.add("Relu", source)


def _gelu(graph: _Graph, source: str) -> str:
    """x / 2 * (1 + erf(x / sqrt 2)), spelt as exporters spell it; the engine recognises and fuses it."""
    error = graph.add("Erf", graph.add("Div", source, graph.scalar(2**0.5)))
    return graph.add("Mul", graph.add("Mul", source, graph.add("Add", error, graph.scalar(1.0))), graph.scalar(0.5))


def _attention_source(graph: _Graph, operator: Attention) -> tuple[str, ...]:
    queries = graph.input(operator.batch, operator.queries, operator.heads * operator.width)
    keys = graph.input(operator.batch, operator.keys, operator.heads * operator.width)
    values = graph.input(operator.batch, operator.keys, operator.heads * operator.value_width)
    return queries, keys, values


def _attention(graph: _Graph, operator: Attention, queries: str, keys: str, values: str) -> str:
    batch = graph.batch * operator.batch

    def split(source: str, length: int, width: int, order: tuple[int, ...]) -> str:
        shape = graph.integers(batch, length, operator.heads, width)
        return graph.add("Transpose", graph.add("Reshape", source, shape), perm=order)

    # Both factors are scaled by the root of the scale, as exporters do for the sake of half precision.
    scale = graph.scalar(operator.width**-0.25)
    query = graph.add("Mul", split(queries, operator.queries, operator.width, (0, 2, 1, 3)), scale)
    key = graph.add("Mul", split(keys, operator.keys, operator.width, (0, 2, 3, 1)), scale)
    weights = graph.add("Softmax", graph.add("MatMul", query, key), axis=-1)
    mixed = graph.add("MatMul", weights, split(values, operator.keys, operator.value_width, (0, 2, 1, 3)))
    shape = graph.integers(batch, operator.queries, operator.heads * operator.value_width)
    return graph.add("Reshape", graph.add("Transpose", mixed, perm=(0, 2, 1, 3)), shape)


_ACTIVATION: dict[str, Callable[[_Graph, str], str]] = {"": lambda _, source: source, "relu": _relu, "gelu": _gelu}
_SOURCE: dict[type, Callable[..., tuple[str, ...]]] = {
    Convolution: _convolution_source,
    Mixture: _mixture_source,
    Linear: _linear_source,
    Masked: _masked_source,
    Attention: _attention_source,
}
_EMIT: dict[type, Callable[..., str]] = {
    Convolution: _convolution,
    Mixture: _mixture,
    Linear: _linear,
    Masked: _masked,
    Attention: _attention,
}
