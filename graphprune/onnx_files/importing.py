"""ONNX in: a file becomes a torch module that can be traced, cut and trained, with its weights as parameters."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from graphprune.errors import InputError
from graphprune.onnx_files.layers import window_pads
from graphprune.onnx_files.operators import OPERATORS, TYPES, OnnxCall, Value
from graphprune.onnx_files.shapes import SMALL

Source: TypeAlias = str | Path | onnx.ModelProto
DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True)
class Step:
    """One node of the file. `layer` is the path of the torch layer that computes it, empty where a function does."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    name: str = ""
    layer: str = ""


class OnnxModule(nn.Module):
    """A network read from an ONNX file. Takes its inputs by position; returns one tensor, or a tuple of them.

    Convolutions, batch norms and linear layers are torch's own, under the path of their weight's name in the file;
    other floating-point constants are parameters under theirs. A vector that several nodes read is several parameters:
    exporters store equal vectors once. `inputs` are the type and the shape of each input, None for a free size.
    """

    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        super().__init__()
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.opset = opset
        self.inputs = [_declared(value) for value in graph.input if value.name not in constants]
        self.input_names = [value.name for value in graph.input if value.name not in constants]
        self.output_names = [value.name for value in graph.output]
        steps = [_step(node) for node in graph.node]
        for step in steps:
            if step.operator == "Constant":
                constants[step.outputs[0]] = np.asarray(next(iter(step.attributes.values())))
        steps = _split_vectors([step for step in steps if step.operator != "Constant"], constants)
        steps = _joined(steps, constants, self.output_names)
        self.arrays: dict[str, NDArray[Any]] = {}
        self.places: dict[str, str] = {}
        weights: dict[str, Any] = {}
        readers = _readers(steps)
        self.steps = tuple(self._with_layer(step, constants, readers, weights) for step in steps)
        settings = {name for step in steps for name in _settings(step)}
        for name in dict.fromkeys(name for step in self.steps for name in step.inputs if name in constants):
            self._hold(name, constants[name], name in settings)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the nodes in the order of the file."""
        known: dict[str, Value] = {"": None, **self.arrays, **dict(zip(self.input_names, inputs, strict=True))}
        known |= {name: _leaf(self, place) for name, place in self.places.items()}
        for step in self.steps:
            values = tuple(known[name] for name in step.inputs)
            if step.layer:
                results: Any = self.get_submodule(step.layer)(*values[:1])
            else:
                call = OnnxCall(step.operator, values, step.attributes, len(step.outputs), self.opset)
                results = OPERATORS[step.operator](call)
            results = results if isinstance(results, tuple) else (results,)
            known |= dict(zip(step.outputs, results, strict=False))
        outputs = tuple(_as_output(known[name]) for name in self.output_names)
        return outputs if len(outputs) > 1 else outputs[0]

    def example_inputs(self, batch: int = 2) -> tuple[Tensor, ...]:
        """Random inputs of the declared types and shapes. Raises InputError where a size beside the batch is free."""
        generator = torch.Generator().manual_seed(0)
        examples = []
        for name, (dtype, sizes) in zip(self.input_names, self.inputs, strict=True):
            if None in sizes[1:]:
                raise InputError(f"the input {name!r} has free sizes {list(sizes)}: give example inputs")
            shape = [batch if sizes[0] is None else sizes[0], *sizes[1:]] if sizes else []
            random = torch.randn(shape, generator=generator)  # type: ignore[arg-type]
            examples.append(random.to(dtype) if dtype.is_floating_point else (random > 0).to(dtype))
        return tuple(examples)

    def _hold(self, name: str, value: NDArray[Any], setting: bool) -> None:
        """Keep a constant: as a parameter, as a buffer, or as an array where it is small and may be a shape."""
        floating = np.issubdtype(value.dtype, np.floating)
        if setting or value.size <= (1 if floating else SMALL):
            self.arrays[name] = value
            return
        path, leaf = _place(name)
        owner = _container(self, path)
        if hasattr(owner, leaf):
            owner, leaf = self, _identifier(name)
        self.places[name] = f"{path}.{leaf}" if owner is not self and path else leaf
        tensor = torch.from_numpy(np.array(value))
        if floating:
            owner.register_parameter(leaf, nn.Parameter(tensor))
        else:
            owner.register_buffer(leaf, tensor)

    def _with_layer(
        self,
        step: Step,
        constants: Mapping[str, NDArray[Any]],
        readers: Mapping[str, Sequence[Step]],
        weights: dict[str, Any],
    ) -> Step:
        """The step with a torch layer in the place of its function, where there is one with the same meaning.

        `weights` are those of the layers so far, by the constant's name, so that layers share them as steps do.
        """
        names = [name for name in step.inputs[1:] if name]
        fixed = all(name in constants for name in names)
        if (
            step.operator not in _LAYERS
            or not fixed
            or not all(_alike(step, x) for name in names for x in readers[name])
        ):
            return step
        call = OnnxCall(
            step.operator, (None, *(constants.get(name) for name in step.inputs[1:])), step.attributes, opset=self.opset
        )
        layer = _LAYERS[step.operator](call)
        if layer is None:
            return step
        layer.weight = weights.setdefault(step.inputs[1], layer.weight)
        path = self._free_path(step)
        _container(self, path.rpartition(".")[0]).add_module(path.rpartition(".")[2], layer)
        return replace(step, layer=path, inputs=step.inputs[:1])

    def _free_path(self, step: Step) -> str:
        """Where a layer belongs: at the path of its weight's or bias's name, else at the name of its node."""
        named = [name.rpartition(".")[0] for name in step.inputs[1:] if name.endswith((".weight", ".bias", ".scale"))]
        for path in named:
            clean = ".".join(map(_identifier, path.split("."))) if path else ""
            if clean and not _exists(self, clean):
                return clean
        base = _identifier(step.name or step.outputs[0])
        free = (f"{base}_{n}" if n else base for n in range(10**6))
        return next(name for name in free if not hasattr(self, name))


def import_onnx(source: Source) -> OnnxModule:
    """Read an ONNX file, or a model in memory, as a torch module in eval mode.

    Raises InputError, one line, for a file that is not ONNX, and for operators that are not in the table.
    """
    model = _read(source)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    opset = max((entry.version for entry in model.opset_import if entry.domain in DOMAINS), default=20)
    kinds = {_operator_name(node) for node in model.graph.node} - {"Constant"}
    if missing := sorted(kinds - OPERATORS.keys()):
        raise InputError(f"no torch equivalent for the ONNX operators {', '.join(missing)}")
    return OnnxModule(model.graph, opset).eval()


def _read(source: Source) -> onnx.ModelProto:
    if isinstance(source, onnx.ModelProto):
        return source
    try:
        model = onnx.load(str(source))
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"{source} is not an ONNX file: {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise InputError(f"cannot read {source}: {error.strerror or error}") from None
    if not model.graph.node:
        raise InputError(f"{source} is not an ONNX file with operators in it")
    return model


# --- layers ---------------------------------------------------------------------------------------------------------


def _convolution(call: OnnxCall) -> nn.Module | None:
    weight = call.tensor(1)
    rank = weight.dim() - 2
    low, high = window_pads(call, [], weight.shape[2:]) if _explicit(call) else ([0], [1])
    if low != high:
        return None
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    groups = call.attribute("group", 1)
    layer = kind(
        weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]), call.attribute("strides", [1] * rank),
        tuple(low), call.attribute("dilations", [1] * rank), groups, call.has(2), device="meta",
    )  # fmt: skip
    return _filled(layer, weight=weight, bias=call.optional(2))


def _explicit(call: OnnxCall) -> bool:
    return call.attribute("auto_pad", "NOTSET") in ("NOTSET", "VALID")


def _linear(call: OnnxCall) -> nn.Module | None:
    weight = call.tensor(1)
    if call.name == "Gemm":
        scaled = call.attribute("alpha", 1.0) != 1 or call.attribute("beta", 1.0) != 1
        if scaled or call.attribute("transA", 0) or (call.has(2) and call.tensor(2).dim() != 1):
            return None
        weight = weight if call.attribute("transB", 0) else weight.t()
    elif weight.dim() == 2:
        weight = weight.t()
    else:
        return None
    layer = nn.Linear(weight.shape[1], weight.shape[0], call.has(2), device="meta")
    return _filled(layer, weight=weight.contiguous(), bias=call.optional(2))


class _AnyBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over inputs with any number of axes."""

    def _check_input_dim(self, input: Tensor) -> None:
        return


def _batch_norm(call: OnnxCall) -> nn.Module | None:
    if call.attribute("training_mode", 0):
        return None
    weight, bias, mean, variance = (call.tensor(n) for n in range(1, 5))
    layer = _AnyBatchNorm(len(mean), call.attribute("epsilon", 1e-5), device="meta")
    layer.running_mean, layer.running_var = mean.clone(), variance.clone()
    layer.num_batches_tracked = torch.tensor(0)
    return _filled(layer, weight=weight, bias=bias)


def _filled(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(layer, name, nn.Parameter(tensor.clone()))
    return layer


_LAYERS = {"Conv": _convolution, "Gemm": _linear, "MatMul": _linear, "BatchNormalization": _batch_norm}


# --- nodes and names ------------------------------------------------------------------------------------------------


def _step(node: onnx.NodeProto) -> Step:
    attributes = {attribute.name: _attribute(attribute) for attribute in node.attribute}
    return Step(_operator_name(node), tuple(node.input), tuple(node.output), attributes, node.name)


def _operator_name(node: onnx.NodeProto) -> str:
    return node.op_type if node.domain in DOMAINS else f"{node.domain}::{node.op_type}"


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if isinstance(value, bytes):
        return value.decode()
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _settings(step: Step) -> tuple[str, ...]:
    """The inputs that tell a step what to do: factors, of which torch wants to know the numbers."""
    return step.inputs[1:] if step.operator == "Resize" else ()


def _readers(steps: Sequence[Step]) -> dict[str, list[Step]]:
    """The steps that read each value, by its name."""
    readers: dict[str, list[Step]] = {}
    for step in steps:
        for name in dict.fromkeys(step.inputs):
            readers.setdefault(name, []).append(step)
    return readers


def _alike(step: Step, other: Step) -> bool:
    """Whether layers can stand for two steps that share a constant: it is the weight of the same operator."""
    same = (step.operator, step.attributes) == (other.operator, other.attributes)
    return same and step.inputs[1] == other.inputs[1] and step.inputs[1] not in other.inputs[2:] + other.inputs[:1]


def _split_vectors(steps: list[Step], constants: dict[str, NDArray[Any]]) -> list[Step]:
    """Give each node its own copy of a vector of numbers that several read."""
    seen: Counter[str] = Counter()
    result = []
    for step in steps:
        names = []
        for name in step.inputs:
            value = constants.get(name)
            if value is None or value.ndim != 1 or not np.issubdtype(value.dtype, np.floating):
                names.append(name)
                continue
            own = f"{name}__{seen[name]}" if seen[name] else name
            constants[own] = value
            seen[name] += 1
            names.append(own)
        result.append(replace(step, inputs=tuple(names)))
    return result


def _joined(steps: list[Step], constants: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[Step]:
    """A product with a matrix and the sum with a vector that follows, as one step."""
    readers: dict[str, list[int]] = {}
    for number, step in enumerate(steps):
        for name in step.inputs:
            readers.setdefault(name, []).append(number)
    result, gone = list(steps), set()
    for number, step in enumerate(steps):
        after = readers.get(step.outputs[0], [])
        if step.operator != "MatMul" or len(after) != 1 or step.outputs[0] in outputs:
            continue
        weight, following = constants.get(step.inputs[1]), steps[after[0]]
        bias = next((name for name in following.inputs if name in constants), "")
        fits = weight is not None and weight.ndim == 2 and constants.get(bias, np.zeros(())).shape == weight.shape[1:]
        if following.operator == "Add" and fits:
            inputs = (*step.inputs, bias)
            result[after[0]] = replace(step, inputs=inputs, outputs=following.outputs, name=following.name)
            gone.add(number)
    return [step for number, step in enumerate(result) if number not in gone]


def _declared(value: onnx.ValueInfoProto) -> tuple[torch.dtype, tuple[int | None, ...]]:
    kind = value.type.tensor_type
    if kind.elem_type not in TYPES:
        raise InputError(f"the input {value.name!r} is not a tensor of numbers")
    sizes = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return TYPES[kind.elem_type], sizes


def _identifier(name: str) -> str:
    clean = re.sub(r"\W+", "_", name).strip("_")
    return clean if clean and not hasattr(nn.Module, clean) else f"value_{clean}"


def _place(name: str) -> tuple[str, str]:
    """The path of the module and the name in it under which a constant is kept."""
    path, _, leaf = name.rpartition(".")
    return ".".join(map(_identifier, path.split("."))) if path else "", _identifier(leaf)


def _container(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, made of empty ones where there is none."""
    for part in path.split(".") if path else ():
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def _exists(root: nn.Module, path: str) -> bool:
    for part in path.split("."):
        if part not in root._modules:
            return hasattr(root, part)
        root = root._modules[part]  # type: ignore[assignment]
    return True


def _leaf(root: nn.Module, place: str) -> Any:
    path, _, leaf = place.rpartition(".")
    return getattr(root.get_submodule(path), leaf)


def _as_output(value: Value) -> Tensor:
    if value is None:
        raise InputError("an output of the network is never computed")
    return value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
