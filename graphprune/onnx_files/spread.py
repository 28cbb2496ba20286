"""Per-channel operators behind a concatenation of convolutions, moved into its branches.

A mixed convolution (`graphprune.cutting.window.MixedConv2d`) is several convolutions and a Concat. An engine fuses a
batch norm or an activation into the convolution right before it, not through a Concat; so they are moved to where it
looks.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphprune.onnx_files.fold import initializer

ACTIVATIONS = frozenset({"Relu", "LeakyRelu", "Clip", "Sigmoid", "Tanh", "HardSigmoid"})
"""What ONNX Runtime fuses into a convolution."""


def spread(model: ir.Model) -> int:
    """Move batch norms and activations from behind each Concat of convolutions, in place. Returns how many were."""
    count = 0
    for node in list(model.graph):
        branches = _branches(node)
        if not branches:
            continue
        if node.op_type == "BatchNormalization" and fold_norm(model.graph, node, branches):
            count += 1
        elif node.op_type in ACTIVATIONS:
            _move_activation(model.graph, node, branches)
            count += 1
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _branches(node: ir.Node) -> list[ir.Node]:
    """The convolutions whose concatenated outputs the node alone reads; none where that is not so."""
    source = node.inputs[0] if node.inputs else None
    concat = source.producer() if source is not None else None
    if concat is None or concat.op_type != "Concat" or concat.attributes.get_int("axis", 0) != 1:
        return []
    if len(list(source.uses())) != 1 or source.is_graph_output():  # type: ignore[union-attr]
        return []
    makers = [value.producer() for value in concat.inputs if value is not None and len(list(value.uses())) == 1]
    found = [maker for maker in makers if maker is not None and maker.op_type == "Conv"]
    return found if len(found) == len(concat.inputs) else []


def fold_norm(graph: ir.Graph, node: ir.Node, convolutions: list[ir.Node]) -> bool:
    """Scale each convolution's weights and biases as the norm would; the Concat takes the norm's place."""
    gain, shift, mean, variance = (_constant(value) for value in node.inputs[1:5])
    weights = [_constant(conv.inputs[1]) for conv in convolutions]
    biases = [_constant(conv.inputs[2]) if len(conv.inputs) > 2 else None for conv in convolutions]
    unknown = any(len(c.inputs) > 2 and bias is None for c, bias in zip(convolutions, biases, strict=True))
    if gain is None or shift is None or mean is None or variance is None or unknown or any(w is None for w in weights):
        return False
    scale = gain / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    offset = shift - mean * scale
    first = 0
    for conv, weight, bias in zip(convolutions, weights, biases, strict=True):
        assert weight is not None
        part = slice(first, first := first + len(weight))
        zero = np.zeros(len(weight), weight.dtype) if bias is None else bias
        scaled = weight * scale[part].reshape(-1, *[1] * (weight.ndim - 1))
        shifted = zero * scale[part] + offset[part]
        conv.resize_inputs(3)
        conv.replace_input_with(1, initializer(graph, f"{conv.outputs[0].name}_weight", scaled.astype(weight.dtype)))
        conv.replace_input_with(2, initializer(graph, f"{conv.outputs[0].name}_bias", shifted.astype(weight.dtype)))
    _replace(graph, node)
    return True


def _move_activation(graph: ir.Graph, node: ir.Node, convolutions: list[ir.Node]) -> None:
    concat = node.inputs[0].producer()  # type: ignore[union-attr]
    assert concat is not None
    for number, conv in enumerate(convolutions):
        moved = ir.node(node.op_type, [conv.outputs[0], *node.inputs[1:]], dict(node.attributes))
        if conv.outputs[0].dtype is not None:
            moved.outputs[0].dtype = conv.outputs[0].dtype
        graph.insert_before(concat, moved)
        concat.replace_input_with(number, moved.outputs[0])
    _replace(graph, node)


def _replace(graph: ir.Graph, node: ir.Node) -> None:
    """Let the readers of a node read its first input."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _constant(value: ir.Value | None) -> NDArray[np.floating] | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else np.asarray(tensor.numpy())
