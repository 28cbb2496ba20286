"""ONNX operators in terms of torch: one function each, entered into a table by the operator's name.

A value is a tensor, or a numpy array where it is known without the model's input: constants, and shapes, whose entries
may be symbolic. Operators on arrays alone are computed at once, so that a shape never becomes a tensor.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from graphprune.errors import InputError

Value = Tensor | NDArray[Any] | None
Converter = Callable[["OnnxCall"], Any]

OPERATORS: dict[str, Converter] = {}
"""By operator name, or `domain::name` outside the standard domain."""
TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.DOUBLE: torch.float64,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT64: torch.int64,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.BOOL: torch.bool,
}


@dataclass(frozen=True)
class OnnxCall:
    """One call of an operator: its values by position, None where one is left out, and its attributes by name."""

    name: str
    values: tuple[Value, ...]
    attributes: Mapping[str, Any]
    outputs: int = 1
    opset: int = 20

    def has(self, position: int) -> bool:
        """Whether an input is given."""
        return position < len(self.values) and self.values[position] is not None

    def value(self, position: int) -> Value:
        """An input as it is; None where it is left out."""
        return self.values[position] if position < len(self.values) else None

    def tensor(self, position: int) -> Tensor:
        """An input as a tensor."""
        value = self.value(position)
        if isinstance(value, Tensor):
            return value
        if value is None:
            raise InputError(f"{self.name} lacks its input {position}")
        return as_tensor(value)

    def optional(self, position: int) -> Tensor | None:
        """An input as a tensor, or None where it is left out."""
        return self.tensor(position) if self.has(position) else None

    def operand(self, position: int) -> Any:
        """An input of an operator that broadcasts: a number where it is a single constant."""
        value, others = self.values[position], [x for x in self.values if isinstance(x, Tensor)]
        if isinstance(value, Tensor) or not others or value is None:
            return self.tensor(position)
        single = value.size == 1 and value.ndim <= max(x.dim() for x in others)
        return value.reshape(-1)[0].item() if single and value.dtype != object else self.tensor(position)

    def ints(self, position: int) -> list[int]:
        """An input that is a list of sizes or axes."""
        value = self.values[position]
        if not isinstance(value, np.ndarray):
            raise InputError(f"{self.name} computes a shape from the values of a tensor")
        return [_integer(x) for x in value.reshape(-1)]

    def attribute(self, name: str, default: Any = None) -> Any:
        """An attribute."""
        return self.attributes.get(name, default)

    def listed(self, name: str, position: int) -> list[int] | None:
        """Axes, from an attribute (older files) or from an input; None where neither is given."""
        if name in self.attributes:
            return list(self.attributes[name])
        return self.ints(position) if self.has(position) else None


def onnx_operator(*names: str) -> Callable[[Converter], Converter]:
    """Enter a function into the table under operator names, `domain::name` for a domain of one's own.

    It takes an `OnnxCall` and returns the output, a tensor or an array, or a tuple of outputs.
    """

    def enter(convert: Converter) -> Converter:
        for name in names:
            OPERATORS[name] = convert
        return convert

    return enter


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A constant or a shape as a tensor."""
    if array.dtype != object:
        return torch.from_numpy(np.array(array))
    flat = [torch.as_tensor(x) if isinstance(x, (int, float, bool)) else torch.scalar_tensor(x) for x in array.flat]
    joined = torch.stack(flat) if flat else torch.zeros(0)
    whole = all(isinstance(x, (int, torch.SymInt)) for x in array.flat)
    return joined.to(torch.int64 if whole else joined.dtype).reshape(array.shape)


def on_arrays(call: OnnxCall) -> bool:
    """Whether all that a call reads is known as arrays."""
    return bool(call.values) and not any(isinstance(value, Tensor) for value in call.values)


def _integer(value: Any) -> Any:
    return int(value) if isinstance(value, (np.generic, int, float)) else value


def _axes(axes: Sequence[int], rank: int) -> list[int]:
    return [axis % rank for axis in axes]


# --- elementwise ----------------------------------------------------------------------------------------------------

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": functional.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}
_ON_NUMBERS: dict[str, Callable[[Any], Any]] = {
    "Ceil": math.ceil,
    "Floor": math.floor,
    "Neg": lambda x: -x,
    "Not": lambda x: not x,
    "Sqrt": lambda x: x**0.5,
}


def _enter_unary(name: str, compute: Callable[[Tensor], Tensor]) -> None:
    @onnx_operator(name)
    def convert(call: OnnxCall) -> Value:
        value = call.value(0)
        if isinstance(value, np.ndarray) and name in _ON_NUMBERS:
            return _each(_ON_NUMBERS[name], value)
        return compute(call.tensor(0))


def _each(compute: Callable[..., Any], *arrays: NDArray[Any]) -> NDArray[Any]:
    """A function of numbers on every entry, numbers symbolic or not."""
    broad = np.broadcast_arrays(*arrays)
    result = np.empty(broad[0].shape, dtype=object)
    for index in np.ndindex(result.shape):
        result[index] = compute(*(x[index].item() if isinstance(x[index], np.generic) else x[index] for x in broad))
    return _plain(result)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    """Without the object type where every entry is an ordinary number."""
    kinds = {type(x) for x in array.flat}
    if kinds <= {bool}:
        return array.astype(bool)
    if kinds <= {int, bool}:
        return array.astype(np.int64)
    return array.astype(np.float32) if kinds <= {float, int} and kinds else array


def _quotient(one: Any, other: Any) -> Any:
    whole = all(isinstance(x, (int, torch.SymInt)) for x in (one, other))
    return one // other if whole else one / other


def _divide(one: Any, other: Any) -> Any:
    whole = isinstance(one, Tensor) and not one.is_floating_point() and not isinstance(other, float)
    return torch.div(one, other, rounding_mode="trunc") if whole else one / other


def _smaller(one: Any, other: Any) -> Any:
    return torch.minimum(one, other) if isinstance(one, Tensor) else min(one, other)


def _larger(one: Any, other: Any) -> Any:
    return torch.maximum(one, other) if isinstance(one, Tensor) else max(one, other)


_BINARY: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "Add": (operator.add, operator.add),
    "Sub": (operator.sub, operator.sub),
    "Mul": (operator.mul, operator.mul),
    "Div": (_divide, _quotient),
    "Pow": (operator.pow, operator.pow),
    "Mod": (torch.remainder, operator.mod),
    "Equal": (operator.eq, operator.eq),
    "Less": (operator.lt, operator.lt),
    "LessOrEqual": (operator.le, operator.le),
    "Greater": (operator.gt, operator.gt),
    "GreaterOrEqual": (operator.ge, operator.ge),
    "And": (torch.logical_and, lambda a, b: bool(a) and bool(b)),
    "Or": (torch.logical_or, lambda a, b: bool(a) or bool(b)),
    "Xor": (torch.logical_xor, lambda a, b: bool(a) != bool(b)),
}
"""On tensors, and on numbers."""


def _enter_binary(name: str, on_tensors: Callable[[Any, Any], Any], on_numbers: Callable[[Any, Any], Any]) -> None:
    @onnx_operator(name)
    def convert(call: OnnxCall) -> Value:
        if call.attribute("fmod", 0):
            raise InputError("Mod with the sign of the dividend is not supported")
        if on_arrays(call):
            return _each(on_numbers, *(x for x in call.values if isinstance(x, np.ndarray)))
        result: Tensor = on_tensors(call.operand(0), call.operand(1))
        return result


for _name, _compute in _UNARY.items():
    _enter_unary(_name, _compute)
for _name, (_first, _second) in _BINARY.items():
    _enter_binary(_name, _first, _second)


def _enter_several(name: str, on_tensors: Callable[[Any, Any], Any]) -> None:
    @onnx_operator(name)
    def convert(call: OnnxCall) -> Value:
        if on_arrays(call):
            return _each(on_tensors, *(x for x in call.values if isinstance(x, np.ndarray)))
        result = call.tensor(0)
        for position in range(1, len(call.values)):
            result = on_tensors(result, call.tensor(position))
        return result / len(call.values) if name == "Mean" else result


for _name, _compute2 in {
    "Min": _smaller,
    "Max": _larger,
    "Sum": operator.add,
    "Mean": operator.add,
}.items():
    _enter_several(_name, _compute2)


@onnx_operator("Identity", "Dropout")
def _identity(call: OnnxCall) -> Any:
    value = call.value(0)
    if call.name == "Dropout" and isinstance(training := call.value(2), np.ndarray) and training.any():
        raise InputError("Dropout in training mode is not supported")
    return (value, torch.ones_like(call.tensor(0), dtype=torch.bool)) if call.outputs > 1 else value


@onnx_operator("Cast", "CastLike")
def _cast(call: OnnxCall) -> Value:
    kind = call.tensor(1).dtype if call.name == "CastLike" else TYPES[call.attribute("to")]
    value = call.value(0)
    if isinstance(value, np.ndarray):
        return _each(float if kind.is_floating_point else bool if kind is torch.bool else _truncated, value)
    return call.tensor(0).to(kind)


def _truncated(value: Any) -> Any:
    return value if isinstance(value, torch.SymInt) else int(value)


@onnx_operator("Where")
def _where(call: OnnxCall) -> Value:
    if on_arrays(call):
        return _each(lambda c, a, b: a if c else b, *(x for x in call.values if isinstance(x, np.ndarray)))
    return torch.where(call.tensor(0).bool(), call.operand(1), call.operand(2))


@onnx_operator("Clip")
def _clip(call: OnnxCall) -> Value:
    if on_arrays(call) and call.opset >= 11:
        least, most = call.value(1), call.value(2)
        return np.asarray(call.values[0] if least is None and most is None else np.clip(call.values[0], least, most))  # type: ignore[arg-type]
    bounds = [call.attribute(name) for name in ("min", "max")]
    if call.opset >= 11:
        bounds = [float(call.tensor(n)) if isinstance(call.value(n), np.ndarray) else call.optional(n) for n in (1, 2)]
    return call.tensor(0) if bounds == [None, None] else torch.clamp(call.tensor(0), *bounds)


@onnx_operator("Gelu")
def _gelu(call: OnnxCall) -> Tensor:
    return functional.gelu(call.tensor(0), approximate=call.attribute("approximate", "none"))


@onnx_operator("HardSigmoid")
def _hard_sigmoid(call: OnnxCall) -> Tensor:
    alpha, beta = call.attribute("alpha", 0.2), call.attribute("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return functional.hardsigmoid(call.tensor(0))
    return torch.clamp(alpha * call.tensor(0) + beta, 0, 1)


@onnx_operator("LeakyRelu")
def _leaky_relu(call: OnnxCall) -> Tensor:
    return functional.leaky_relu(call.tensor(0), call.attribute("alpha", 0.01))


@onnx_operator("Elu")
def _elu(call: OnnxCall) -> Tensor:
    return functional.elu(call.tensor(0), call.attribute("alpha", 1.0))


@onnx_operator("Celu")
def _celu(call: OnnxCall) -> Tensor:
    return functional.celu(call.tensor(0), call.attribute("alpha", 1.0))


@onnx_operator("Selu")
def _selu(call: OnnxCall) -> Tensor:
    alpha, gamma = call.attribute("alpha", 1.6732632423543772), call.attribute("gamma", 1.0507009873554805)
    x = call.tensor(0)
    result: Tensor = gamma * torch.where(x > 0, x, alpha * torch.expm1(x))
    return result


@onnx_operator("PRelu")
def _prelu(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    return torch.where(x > 0, x, x * call.operand(1))


@onnx_operator("Softmax", "LogSoftmax")
def _softmax(call: OnnxCall) -> Tensor:
    x, compute = call.tensor(0), torch.softmax if call.name == "Softmax" else torch.log_softmax
    if call.opset >= 13:
        return compute(x, call.attribute("axis", -1))
    axis = call.attribute("axis", 1) % x.dim()  # older files flatten all axes from this one on
    return compute(x.flatten(axis), -1).reshape(x.shape)


# --- reductions -----------------------------------------------------------------------------------------------------

_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
}


def _enter_reduction(name: str, compute: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    @onnx_operator(name)
    def convert(call: OnnxCall) -> Tensor:
        x, axes = call.tensor(0), call.listed("axes", 1)
        if not axes and call.attribute("noop_with_empty_axes", 0):
            return x
        if 0 in x.shape:
            raise InputError(f"{name} of no numbers is not supported")
        return compute(x, axes or list(range(x.dim())), bool(call.attribute("keepdims", 1)))


for _name, _compute3 in _REDUCTIONS.items():
    _enter_reduction(_name, _compute3)


@onnx_operator("ReduceProd")
def _product(call: OnnxCall) -> Value:
    axes, keep = call.listed("axes", 1), bool(call.attribute("keepdims", 1))
    value = call.value(0)
    if isinstance(value, np.ndarray):
        return np.asarray(np.prod(value, axis=tuple(axes) if axes else None, keepdims=keep))
    x = call.tensor(0)
    for axis in sorted(_axes(axes or range(x.dim()), x.dim()), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


@onnx_operator("ArgMax", "ArgMin")
def _arg(call: OnnxCall) -> Tensor:
    if call.attribute("select_last_index", 0):
        raise InputError(f"{call.name} of the last index is not supported")
    compute = torch.argmax if call.name == "ArgMax" else torch.argmin
    return compute(call.tensor(0), call.attribute("axis", 0), keepdim=bool(call.attribute("keepdims", 1)))


@onnx_operator("CumSum")
def _cumulated(call: OnnxCall) -> Tensor:
    if call.attribute("exclusive", 0) or call.attribute("reverse", 0):
        raise InputError("CumSum that is exclusive or reversed is not supported")
    return torch.cumsum(call.tensor(0), call.ints(1)[0])
