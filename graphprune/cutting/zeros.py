"""What stands for a dropped branch in the user's own module, and how an ONNX graph gets rid of it."""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

MOVES = frozenset(
    {"Cast", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Operators that only move numbers: of zeros they make zeros."""


class Zero(nn.Module):
    """Stands for a module inside a dropped branch: zeros like its first input, whatever else that module took.

    Each of them gives zeros, not the last one alone: what the code around them does next, a gate for instance, need not
    end in the last module. They are negated zeros: -0.0 is the number that changes none to which it is added, and
    nobody else negates zeros, so that `drop_zeros` knows them again. (A constant -0.0 may not survive an export: it is
    equal to 0.0, and equal constants are stored once.)
    """

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[...] -> zeros of the same shape and type."""
        return -torch.zeros_like(x)


def drop_zeros(model: ir.Model) -> int:
    """Replace each sum of a tensor and the zeros of a dropped branch by that tensor, in place. Returns how many."""
    zeros: set[ir.Value] = set()
    count = 0
    for node in model.graph:
        sources = [value for value in node.inputs if value is not None]
        nothing = [value for value in sources if value in zeros or _is_marked(value)]
        if _makes_marked(node) or _keeps_zero(node, sources, nothing):
            zeros.update(node.outputs)
        elif node.op_type == "Add" and nothing and not node.outputs[0].is_graph_output():
            kept = sources[1] if sources[0] in nothing else sources[0]
            ir.convenience.replace_all_uses_with(node.outputs[0], kept)
            count += 1
    if count:
        RemoveUnusedNodesPass()(model)
    return count


def _keeps_zero(node: ir.Node, sources: list[ir.Value], nothing: list[ir.Value]) -> bool:
    if node.op_type == "Mul":
        return bool(nothing)
    if node.op_type in ("Add", "Concat"):
        return bool(sources) and len(nothing) == len(sources)
    return node.op_type in MOVES and bool(nothing) and sources[0] in nothing


def _makes_marked(node: ir.Node) -> bool:
    """Whether the node negates zeros."""
    source = node.inputs[0] if node.op_type == "Neg" else None
    if source is None:
        return False
    maker = source.producer()
    return _constant_zeros(source) is not None or (maker is not None and _fills_with_zeros(maker))


def _fills_with_zeros(node: ir.Node) -> bool:
    if node.op_type == "Expand":
        return node.inputs[0] is not None and _constant_zeros(node.inputs[0]) is not None
    if node.op_type != "ConstantOfShape":
        return False
    return "value" not in node.attributes or not np.any(node.attributes["value"].as_tensor().numpy())


def _is_marked(value: ir.Value) -> bool:
    """Whether an exporter has negated the zeros itself, where their shape is fixed."""
    array = _constant_zeros(value)
    return array is not None and bool(np.all(np.signbit(array)))


def _constant_zeros(value: ir.Value) -> NDArray[np.floating] | None:
    """The constant, if it is one, of floating-point zeros alone."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or not tensor.dtype.is_floating_point() or not tensor.size:
        return None
    array = np.asarray(tensor.numpy())
    # One look spares reading all of a layer's weights.
    return None if array.flat[0] or np.any(array) else array
