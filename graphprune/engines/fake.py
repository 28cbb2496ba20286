"""An engine that computes its timings instead of measuring them: exact, repeatable, for tests."""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from graphprune.engines.base import Model, Timing
from graphprune.engines.sampling import check_batch
from graphprune.errors import InputError, StepError

SECONDS_PER_PRODUCT = 1e-11
"""Time of one multiply-add."""

SECONDS_PER_NODE = 1e-6
"""Time of any node, whatever it does."""

Shape = tuple[int, ...]


@dataclass
class FakeEngine:
    """Times a graph as the sum over its nodes of a constant plus the multiply-adds of convolutions and products.

    The threads share the multiply-adds evenly.

    Output channels of a convolution count in whole vector blocks of `block`, as they do in real engines. `noise` is
    the standard deviation of the logarithm of a sample, drawn from `seed`. `failing` holds the numbers (from 0, in
    order of arrival) of the models whose measurement fails. `models` counts those asked for so far, `calls` the calls
    of `measure`. A dynamic first axis is `batch`, every other one 1. With `sparse_kernels`, weights with 2 in each 4
    inputs zero count half.
    """

    block: int = 16
    noise: float = 0.0
    seed: int = 0
    sparse_kernels: bool = False
    failing: Collection[int] = ()
    models: int = 0
    calls: int = 0
    threads: int = 1
    batch: int = 1

    @property
    def identity(self) -> str:
        """All that the timings depend on."""
        settings = f"block {self.block}, noise {self.noise}, seed {self.seed}, {self.threads} threads"
        kernels = ", 2:4 kernels" if self.sparse_kernels else ""
        return f"fake, {settings}{kernels}{f', batch {self.batch}' if self.batch != 1 else ''}"

    def run(self, model: Model, inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """The outputs by ONNX's reference implementation. Raises as the contract says."""
        graph = _load(model)
        try:
            outputs: list[NDArray[np.generic]] = ReferenceEvaluator(graph).run(None, dict(inputs))
        except Exception as error:  # numpy, onnx and the evaluator each raise their own
            raise StepError(f"the reference evaluator cannot run the model: {error}") from None
        return outputs

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        """The computed time of each model, `rounds` times, with noise if any."""
        self.calls += 1
        generator = random.Random(f"{self.seed} {self.calls}")
        timings = []
        for model in models:
            number, self.models = self.models, self.models + 1
            try:
                exact = math.nan if number in self.failing else self.seconds(model)
            except (InputError, StepError) as error:
                timings.append(Timing(error=str(error)))
                continue
            samples = tuple(exact * math.exp(self.noise * generator.gauss(0, 1)) for _ in range(rounds))
            timings.append(Timing(error=f"model {number} fails on demand") if math.isnan(exact) else Timing(samples))
        return timings

    def seconds(self, model: Model) -> float:
        """The exact time of one run in seconds. Raises InputError for what is no ONNX model, StepError for a batch that
        it cannot have.
        """
        graph = _fixed(_load(model), self.batch)
        shapes = _shapes(graph)
        halved = _halved(graph) if self.sparse_kernels else set()
        products = sum(self._products(node, shapes) / (2 if halved & {*node.input} else 1) for node in graph.graph.node)
        return products * SECONDS_PER_PRODUCT / self.threads + len(graph.graph.node) * SECONDS_PER_NODE

    def _products(self, node: Any, shapes: Mapping[str, Shape]) -> int:
        """Multiply-adds of one node."""
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            return 0
        left, right, output = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
        if node.op_type == "Conv":
            channels = math.ceil(output[1] / self.block) * self.block
            return output[0] * channels * math.prod(output[2:]) * math.prod(right[1:])
        transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        return math.prod(output) * (left[0] if transposed else left[-1])


def _load(model: Model) -> Any:
    name = "the model" if isinstance(model, bytes) else str(model)
    try:
        loaded = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(Path(model))
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}") from None
    except Exception as error:  # protobuf's error, whose class moved between its versions
        raise InputError(f"{name} is not an ONNX model: {error}") from None
    if not loaded.graph.node:
        raise InputError(f"{name} is not an ONNX model: it has no graph")
    return loaded


def _fixed(model: Any, batch: int) -> Any:
    """The same model with every dynamic axis fixed and no shapes but those of its inputs."""
    del model.graph.value_info[:]
    shapes = [entry.type.tensor_type.shape.dim for entry in model.graph.input]
    firsts = [axes[0] for axes in shapes if axes]
    check_batch([first.dim_value if first.HasField("dim_value") else None for first in firsts], batch)
    for axes in shapes:
        for number, axis in enumerate(axes):
            if not axis.HasField("dim_value"):
                axis.dim_value = 1 if number else batch
    for entry in model.graph.output:
        entry.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _halved(model: Any) -> set[str]:
    """Weights that keep at most 2 of each 4 consecutive inputs of every output."""
    weights = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    axes = {node.input[1]: _input_axis(node) for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    turned = {name: np.moveaxis(weights[name], axis, -1) for name, axis in axes.items() if name in weights}
    return {
        name for name, weight in turned.items()
        if weight.shape[-1] % 4 == 0 and (np.count_nonzero(weight.reshape(-1, 4), axis=1) <= 2).all()
    }  # fmt: skip


def _input_axis(node: Any) -> int:
    """The axis of a weight that runs over the inputs."""
    turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 1 if node.op_type == "Conv" or turned else 0


def _shapes(model: Any) -> dict[str, Shape]:
    entries = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    known = {entry.name: tuple(axis.dim_value or 1 for axis in entry.type.tensor_type.shape.dim) for entry in entries}
    return known | {entry.name: tuple(entry.dims) for entry in model.graph.initializer}
