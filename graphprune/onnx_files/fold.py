"""Padding before a convolution, folded into it. ONNX allows no negative pads in a convolution, so crops become a Slice.

A kernel window away from the centre reads its input through `F.pad` with unequal, partly negative amounts, which
exporters write as Pad. ONNX Runtime copies the tensor for a Pad, and leaves its blocked convolution layout for it.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass

LAST = np.iinfo(np.int64).max
ARITHMETIC = frozenset({"Cast", "Concat", "ConstantOfShape", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators with which torch's older exporter reorders the amounts of a Pad."""


def fold_pads(model: ir.Model) -> int:
    """Rewrite each Conv(Pad(x)), in place: pads become the convolution's own, crops a Slice of x. Returns how many.

    Only constant zero padding of the spatial axes is folded; what is computed stays the same.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "Conv" or node.domain or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
            continue
        pad = node.inputs[0].producer() if node.inputs[0] is not None else None
        rank = len(node.inputs[1].shape or ()) - 2 if node.inputs[1] is not None else 0
        amounts = _amounts(pad, rank) if pad is not None and rank > 0 else None
        if pad is None or amounts is None:
            continue
        own = np.array(node.attributes.get_ints("pads", [0] * 2 * rank))
        node.attributes["pads"] = ir.AttrInt64s("pads", [int(amount) for amount in own + np.maximum(amounts, 0)])
        node.replace_input_with(0, crop(model.graph, node, pad.inputs[0], np.maximum(-amounts, 0)))
        count += 1
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _amounts(pad: ir.Node, rank: int) -> NDArray[Any] | None:
    """Spatial pads, those at the beginning of each axis and then those at the end; None if it cannot be folded."""
    if pad.op_type != "Pad" or pad.domain or pad.attributes.get_string("mode", "constant") != "constant":
        return None
    inputs = [*pad.inputs, None, None][:4]
    constants = [None if value is None else _constant(value) for value in inputs[1:]]
    if any(value is not None and constant is None for value, constant in zip(inputs[1:], constants, strict=True)):
        return None
    amounts, fill, axes = constants
    if amounts is None or (fill is not None and fill.any()):
        return None
    full = np.zeros((2, rank + 2), dtype=np.int64)
    full[:, slice(None) if axes is None else axes] = amounts.reshape(2, -1)
    return None if full[:, :2].any() else full[:, 2:].reshape(-1)


def _constant(value: ir.Value) -> NDArray[Any] | None:
    """What the value always is: a constant, or arithmetic on constants; None where it depends on an input."""
    if (tensor := ir.convenience.get_const_tensor(value)) is not None:
        return np.asarray(tensor.numpy())
    node = value.producer()
    if node is None or node.domain or node.op_type not in ARITHMETIC:
        return None
    feeds = {source.name: _constant(source) for source in node.inputs if source is not None}
    if any(constant is None for constant in feeds.values()):
        return None
    evaluator = ReferenceEvaluator(
        ir.to_proto(node), opsets=dict(value.graph.opset_imports if value.graph else {"": 18})
    )
    return np.asarray(evaluator.run(None, feeds)[0])


def crop(graph: ir.Graph, before: ir.Node, value: ir.Value, amounts: NDArray[Any]) -> ir.Value:
    """The value without `amounts` rows at the beginnings and ends of its spatial axes."""
    starts, ends = amounts.reshape(2, -1)
    axes = np.flatnonzero(starts + ends)
    if not axes.size:
        return value
    bounds = {"starts": starts[axes], "ends": np.where(ends[axes], -ends[axes], LAST), "axes": axes + 2}
    inputs = [
        value,
        *(initializer(graph, f"{value.name}_crop_{key}", data.astype(np.int64)) for key, data in bounds.items()),
    ]
    node = ir.node("Slice", inputs)
    if value.dtype is not None:  # the TorchScript exporter types no values inside the graph
        node.outputs[0].dtype = value.dtype
    graph.insert_before(before, node)
    return node.outputs[0]


def initializer(graph: ir.Graph, name: str, data: NDArray[Any]) -> ir.Value:
    """A new constant of the graph, by a name that nothing has yet."""
    while name in graph.initializers:
        name += "_"
    value = ir.Value(name=name, const_value=ir.Tensor(data, name=name))
    graph.register_initializer(value)
    return value
