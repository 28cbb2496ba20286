"""Each ONNX operator against the cases that the standard itself gives, and shapes that depend on the batch size."""

import warnings
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper

from graphprune.errors import InputError
from graphprune.onnx_files.importing import import_onnx
from graphprune.onnx_files.operators import OPERATORS

with warnings.catch_warnings():  # some cases of the standard overflow on purpose
    warnings.simplefilter("ignore")
    from onnx.backend.test.case.node import collect_testcases


EXACT = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL}


FROM_SHAPES = {"ConstantOfShape", "Range"}
"""They make tensors out of sizes alone."""
ONLY_OTHERS = {"Dropout"}
"""The standard's cases draw random numbers, except those that are not supported."""


def cases() -> dict[str, list[Any]]:
    """The standard's cases of operators in the table, by operator."""
    found = defaultdict(list)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collected = collect_testcases(None)
    for case in collected:
        nodes, values = case.model.graph.node, (*case.model.graph.input, *case.model.graph.output)
        typed = all(value.type.tensor_type.elem_type in EXACT for value in values)
        plain = all(isinstance(x, np.ndarray) for inputs, _ in case.data_sets for x in inputs)
        if len(nodes) == 1 and not nodes[0].domain and nodes[0].op_type in OPERATORS and typed and plain:
            found[nodes[0].op_type].append(case)
    return found


CASES = cases()


def run(case: Any) -> None:
    """Feed the inputs of a case as constants where they are small integers (shapes, axes), else as tensors."""
    for inputs, expected in case.data_sets:
        model = ModelProto()
        model.CopyFrom(case.model)
        fixed = {value.name: x for value, x in zip(model.graph.input, inputs, strict=True) if shapes_or_axes(x)}
        if len(fixed) == len(inputs) and case.model.graph.node[0].op_type not in FROM_SHAPES:
            fixed = dict(list(fixed.items())[1:])
        for name, x in fixed.items():
            model.graph.initializer.append(numpy_helper.from_array(x, name))
        imported = import_onnx(model)
        given = zip(model.graph.input, inputs, strict=True)
        feeds = [torch.from_numpy(np.array(x)) for value, x in given if value.name not in fixed]
        with torch.no_grad():
            found = imported(*feeds)
        for ours, theirs in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-3, atol=1e-5)
            assert ours.shape == theirs.shape


def shapes_or_axes(x: np.ndarray) -> bool:
    """Whether an input is one that exporters write as a constant."""
    return x.dtype in (np.int64, np.int32, np.bool_) and x.ndim <= 1 and x.size <= 10


@pytest.mark.parametrize("operator", sorted(set(CASES)))
def test_the_standard_cases(operator: str) -> None:
    """What is computed is right; what is not supported is said in one line, and some case of each operator is."""
    refused = []
    for case in CASES[operator]:
        try:
            run(case)
        except InputError as error:
            refused.append(str(error))
    assert all(len(message.splitlines()) == 1 for message in refused)
    assert len(refused) < len(CASES[operator]) or operator in ONLY_OTHERS
