"""Folding padding into convolutions: the same values, and no Pad left where one can be avoided."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.onnx_files.fold import fold_pads

INPUT = np.random.default_rng(0).standard_normal((2, 3, 7, 6)).astype(np.float32)


def network(
    pads: list[int],
    own: list[int] | None = None,
    axes: list[int] | None = None,
    fill: float = 0.0,
    **attributes: object,
) -> ir.Model:
    """Conv(Pad(x)); `pads` in the order of ONNX, all beginnings and then all ends."""
    weight = np.random.default_rng(1).standard_normal((4, 3, 2, 2)).astype(np.float32)
    constants = {"weight": weight, "pads": np.array(pads), "fill": np.array(fill, np.float32)}
    names = ["x", "pads", "fill"]
    if axes is not None:
        constants["axes"] = np.array(axes)
        names.append("axes")
    nodes = [
        helper.make_node("Pad", names, ["padded"], **{"mode": "constant"} | attributes),
        helper.make_node("Conv", ["padded", "weight"], ["y"], **({} if own is None else {"pads": own})),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    value[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 7, 6])
    value[1] = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", None, None, None])
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", value[:1], value[1:], initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ir.from_proto(proto)


def run(model: ir.Model) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return OnnxRuntimeEngine(optimisation="none").run(proto.SerializeToString(), {"x": INPUT})[0]


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-2, 3), min_size=4, max_size=4),
    st.none() | st.lists(st.integers(0, 2), min_size=4, max_size=4),
    st.sampled_from(["all", "spatial", "negative"]),
)
def test_values_stay_and_pads_go(amounts: list[int], own: list[int] | None, written: str) -> None:
    pads = amounts if written != "all" else [0, 0, *amounts[:2], 0, 0, *amounts[2:]]
    axes = {"all": None, "spatial": [2, 3], "negative": [-2, -1]}[written]
    model = network(pads, own, axes)
    before = run(model)
    assert fold_pads(model) == 1
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-6)
    assert operators(model) == {"Conv": 1, "Slice": 1} if min(amounts) < 0 else {"Conv": 1}


@pytest.mark.parametrize(
    "model",
    [
        network([0, 1, 0, 1], axes=[2, 3], fill=1.0),
        network([0, 1, 0, 1], axes=[2, 3], mode="reflect"),
        network([0, 1, 0, 1], axes=[2, 3], mode="edge"),
        network([1, 0, 1, 1, 0, 0, 1, 1]),  # the batch axis
    ],
)
def test_other_padding_is_left_alone(model: ir.Model) -> None:
    before = run(model)
    assert fold_pads(model) == 0
    assert operators(model) == {"Pad": 1, "Conv": 1}
    np.testing.assert_array_equal(run(model), before)


def test_channel_padding_is_left_alone() -> None:
    model = network([0, 1, 0, 0, 0, 0, 0, 0])
    assert fold_pads(model) == 0
    assert operators(model) == {"Pad": 1, "Conv": 1}


def test_pads_that_are_computed_are_left_alone() -> None:
    model = network([0, 1, 0, 1], axes=[2, 3])
    pads = model.graph.initializers.pop("pads")
    pads.const_value = None
    model.graph.inputs.append(pads)
    assert fold_pads(model) == 0


def test_a_padded_tensor_with_other_readers_keeps_its_pad() -> None:
    model = network([-1, 1, 1, 0], axes=[2, 3])
    pad = next(iter(model.graph))
    relu = ir.node("Relu", [pad.outputs[0]])
    model.graph.append(relu)
    relu.outputs[0].name = "z"
    relu.outputs[0].dtype, relu.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([None] * 4)
    model.graph.outputs.append(relu.outputs[0])
    before = run(model)
    assert fold_pads(model) == 1
    np.testing.assert_allclose(run(model), before, rtol=1e-5, atol=1e-6)
    assert operators(model) == {"Pad": 1, "Relu": 1, "Slice": 1, "Conv": 1}
