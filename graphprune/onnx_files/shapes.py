"""ONNX operators that move, join or part tensors, or make them from shapes."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from graphprune.errors import InputError
from graphprune.onnx_files.operators import OnnxCall, Value, on_arrays, onnx_operator

SMALL = 64
"""Up to so many numbers, what is made from constants stays an array."""


@onnx_operator("Shape")
def _shape(call: OnnxCall) -> NDArray[Any]:
    value = call.value(0)
    sizes = list(value.shape) if value is not None else []
    chosen = sizes[call.attribute("start", 0) : call.attribute("end", len(sizes))]
    return np.array(chosen, dtype=np.int64 if all(type(size) is int for size in chosen) else object)


@onnx_operator("Size")
def _size(call: OnnxCall) -> NDArray[Any]:
    return np.asarray(np.prod(np.array(list(call.tensor(0).shape), dtype=object)))


@onnx_operator("ConstantOfShape")
def _constant_of_shape(call: OnnxCall) -> Value:
    shape, value = call.ints(0), np.asarray(call.attribute("value", np.zeros(1, np.float32))).reshape(-1)[0]
    if all(type(size) is int for size in shape) and np.prod(shape, dtype=np.int64) <= SMALL:
        return np.full(shape, value)
    return torch.full(shape, value.item(), dtype=torch.from_numpy(np.asarray([value])).dtype)


@onnx_operator("Range")
def _range(call: OnnxCall) -> Value:
    bounds: list[Any] = [x.reshape(-1)[0] for x in call.values if isinstance(x, np.ndarray)]
    if len(bounds) < len(call.values):
        raise InputError("Range with bounds from the values of a tensor is not supported")
    return torch.arange(*(x.item() if isinstance(x, np.generic) else x for x in bounds))


@onnx_operator("Reshape")
def _reshape(call: OnnxCall) -> Value:
    value, shape = call.values[0], call.ints(1)
    sizes = list(value.shape)  # type: ignore[union-attr]
    if not call.attribute("allowzero", 0):
        shape = [sizes[n] if type(size) is int and size == 0 else size for n, size in enumerate(shape)]
    return value.reshape(shape)  # type: ignore[union-attr]


@onnx_operator("Flatten")
def _flatten(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    axis = call.attribute("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    if axis == 0:
        return x.reshape(1, -1)
    rows = x.flatten(0, axis - 1) if axis > 1 else x
    return rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)


@onnx_operator("Transpose")
def _transpose(call: OnnxCall) -> Value:
    value = call.values[0]
    order = call.attribute("perm") or list(reversed(range(value.ndim)))  # type: ignore[union-attr]
    return value.permute(order) if isinstance(value, Tensor) else value.transpose(order)  # type: ignore[union-attr]


@onnx_operator("Squeeze")
def _squeeze(call: OnnxCall) -> Value:
    value, axes = call.values[0], call.listed("axes", 1)
    if isinstance(value, np.ndarray):
        return np.squeeze(value, tuple(axes) if axes else None)
    x = call.tensor(0)
    chosen = axes if axes is not None else [n for n, size in enumerate(x.shape) if type(size) is int and size == 1]
    for axis in sorted((axis % x.dim() for axis in chosen), reverse=True):
        x = x.squeeze(axis)
    return x


@onnx_operator("Unsqueeze")
def _unsqueeze(call: OnnxCall) -> Value:
    value, axes = call.values[0], call.listed("axes", 1) or []
    if isinstance(value, np.ndarray):
        return np.expand_dims(value, tuple(axes))
    x = call.tensor(0)
    for axis in sorted(axis % (x.dim() + len(axes)) for axis in axes):
        x = x.unsqueeze(axis)
    return x


@onnx_operator("Concat")
def _concat(call: OnnxCall) -> Value:
    axis = call.attribute("axis")
    if on_arrays(call):
        return np.concatenate([np.atleast_1d(x) for x in call.values if x is not None], axis)
    return torch.cat([call.tensor(n) for n in range(len(call.values))], axis)


@onnx_operator("Split")
def _split(call: OnnxCall) -> tuple[Tensor, ...]:
    x, axis, sizes = call.tensor(0), call.attribute("axis", 0), call.listed("split", 1)
    if sizes is None:
        piece = -(-x.shape[axis] // call.attribute("num_outputs", call.outputs))
        return tuple(torch.split(x, piece, axis))
    return tuple(torch.split(x, sizes, axis))


@onnx_operator("Slice")
def _slice(call: OnnxCall) -> Value:
    value = call.values[0]
    starts, ends = call.listed("starts", 1) or [], call.listed("ends", 2) or []
    axes = call.listed("axes", 3) or list(range(len(starts)))
    steps = call.ints(4) if call.has(4) else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        value = _sliced(value, axis % value.ndim, (start, end, step))  # type: ignore[union-attr]
    return value


def _sliced(value: Any, axis: int, bounds: tuple[int, int, int]) -> Any:
    start, end, step = bounds
    size = value.shape[axis]
    if step < 0 and isinstance(value, Tensor):
        start, end = (size - 1 if start >= size else start), (-size - 1 if end < -size else end)
        chosen = range(size)[slice(start, None if end < -size else end, step)]
        return value.index_select(axis, torch.tensor(list(chosen)))
    if isinstance(end, int) and step > 0 and end >= 2**31 - 1:
        end = None  # type: ignore[assignment]
    if step < 0 and isinstance(end, int) and end < -(2**31):
        end = None  # type: ignore[assignment]
    return value[(*[slice(None)] * axis, slice(start, end, step))]


@onnx_operator("Gather")
def _gather(call: OnnxCall) -> Value:
    value, indices, axis = call.values[0], call.values[1], call.attribute("axis", 0)
    if isinstance(value, np.ndarray) and isinstance(indices, np.ndarray):
        return np.asarray(np.take(value, indices.astype(np.int64), axis))
    x = call.tensor(0)
    axis = axis % x.dim()
    if isinstance(indices, np.ndarray) and indices.ndim == 0:
        return x.select(axis, int(indices))
    index = call.tensor(1)
    size = x.shape[axis]
    index = torch.where(index < 0, index + size, index) if isinstance(indices, Tensor) else index % size
    chosen = x.index_select(axis, index.reshape(-1))
    return chosen.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]) if index.dim() != 1 else chosen


@onnx_operator("GatherElements")
def _gather_elements(call: OnnxCall) -> Tensor:
    x, axis = call.tensor(0), call.attribute("axis", 0)
    return torch.gather(x, axis, call.tensor(1) % x.shape[axis])


@onnx_operator("GatherND")
def _gather_nd(call: OnnxCall) -> Tensor:
    if call.attribute("batch_dims", 0):
        raise InputError("GatherND with batch axes is not supported")
    x, indices = call.tensor(0), call.tensor(1)
    return x[tuple(indices.unbind(-1))]


@onnx_operator("ScatterND")
def _scatter_nd(call: OnnxCall) -> Tensor:
    if call.attribute("reduction", "none") != "none":
        raise InputError("ScatterND with a reduction is not supported")
    x, indices = call.tensor(0), call.tensor(1)
    return x.index_put(tuple(indices.unbind(-1)), call.tensor(2))


@onnx_operator("Expand")
def _expand(call: OnnxCall) -> Value:
    shape = call.ints(1)
    if on_arrays(call) and all(type(size) is int for size in shape):  # numpy would fix a symbolic size
        own = np.asarray(call.values[0])
        return np.broadcast_to(own, np.broadcast_shapes(own.shape, tuple(shape)))
    x = call.tensor(0)
    rank = max(x.dim(), len(shape))
    asked, own_sizes = [1] * (rank - len(shape)) + shape, [1] * (rank - x.dim()) + list(x.shape)
    wide = [b if type(a) is int and a == 1 else a for a, b in zip(asked, own_sizes, strict=True)]
    return x.expand(wide)


@onnx_operator("Tile")
def _tile(call: OnnxCall) -> Value:
    times = call.ints(1)
    if on_arrays(call) and all(type(number) is int for number in times):
        return np.tile(np.asarray(call.values[0]), times)
    return call.tensor(0).repeat(times)


@onnx_operator("Pad")
def _pad(call: OnnxCall) -> Tensor:
    x, pads, mode = call.tensor(0), call.listed("pads", 1) or [], call.attribute("mode", "constant")
    axes = call.ints(3) if call.has(3) else list(range(x.dim()))
    value = call.attribute("value", 0.0)
    given = call.value(2)
    if isinstance(given, Tensor):
        raise InputError("Pad with a value that is computed is not supported")
    if given is not None and given.size:
        value = given.reshape(-1)[0].item()
    ends: dict[int, tuple[int, int]] = {axis % x.dim(): (pads[n], pads[n + len(axes)]) for n, axis in enumerate(axes)}
    first = min((axis for axis, both in ends.items() if any(both)), default=x.dim())
    flat = [amount for axis in reversed(range(first, x.dim())) for amount in ends.get(axis, (0, 0))]
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    if not flat:
        return x
    return functional.pad(x, flat, modes[mode], value if mode == "constant" else None)


@onnx_operator("DepthToSpace")
def _depth_to_space(call: OnnxCall) -> Tensor:
    x, block = call.tensor(0), call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, block)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, channels // block**2, height * block, width * block)


@onnx_operator("SpaceToDepth")
def _space_to_depth(call: OnnxCall) -> Tensor:
    x, block = call.tensor(0), call.attribute("blocksize")
    if call.attribute("mode", "DCR") == "CRD":
        return functional.pixel_unshuffle(x, block)
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // block, block, width // block, block).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(batch, channels * block**2, height // block, width // block)


@onnx_operator("Trilu")
def _triangle(call: OnnxCall) -> Tensor:
    diagonal = call.ints(1)[0] if call.has(1) else 0
    return (torch.triu if call.attribute("upper", 1) else torch.tril)(call.tensor(0), diagonal)


@onnx_operator("Resize")
def _resize(call: OnnxCall) -> Tensor:
    x, where = call.tensor(0), call.attribute("coordinate_transformation_mode", "half_pixel")
    mode, target = _resize_mode(call, x.dim()), _resize_target(call, x)
    if mode == "nearest-exact" and any(new % old for new, old in zip(target, x.shape[2:], strict=True)):
        raise InputError("Resize to the nearest by a factor that is no whole number is not supported")
    if where == "pytorch_half_pixel" and 1 in target:
        raise InputError("Resize to a single number by pytorch_half_pixel is not supported")
    options = {} if "nearest" in mode else {"align_corners": where == "align_corners"}
    return functional.interpolate(x, target, mode=mode, **options)


RESIZES: dict[tuple[str, ...], str] = {
    ("nearest", "asymmetric", "floor"): "nearest",
    ("nearest", "half_pixel", "round_prefer_floor"): "nearest-exact",
    **{("linear", where): "bilinear" for where in ("half_pixel", "pytorch_half_pixel", "align_corners")},
    **{("cubic", where): "bicubic" for where in ("half_pixel", "pytorch_half_pixel", "align_corners")},
}
"""torch's name of a mode, where the coordinates mean the same."""
RESIZE_DEFAULTS = {"antialias": 0, "exclude_outside": 0, "cubic_coeff_a": -0.75, "keep_aspect_ratio_policy": "stretch"}


def _resize_mode(call: OnnxCall, rank: int) -> str:
    mode, where = call.attribute("mode", "nearest"), call.attribute("coordinate_transformation_mode", "half_pixel")
    nearest = (call.attribute("nearest_mode", "round_prefer_floor"),) if mode == "nearest" else ()
    name = RESIZES.get((mode, where, *nearest))
    if name is None or "axes" in call.attributes or (rank != 4 and mode != "nearest"):
        raise InputError(f"Resize with {mode}, {where} is not supported")
    if odd := [name for name, value in RESIZE_DEFAULTS.items() if call.attribute(name, value) != value]:
        raise InputError(f"Resize with {odd[0]} is not supported")
    return name


def _resize_target(call: OnnxCall, x: Tensor) -> list[int]:
    if call.has(3):
        return call.ints(3)[2:]
    scales = call.values[2]
    if not isinstance(scales, np.ndarray):
        raise InputError("Resize with scales from the values of a tensor is not supported")
    exact = [size * scale for size, scale in zip(x.shape[2:], scales.tolist()[2:], strict=True)]
    if any(abs(size - round(size)) > 1e-3 for size in exact):
        raise InputError("Resize to a size that is no whole number is not supported")
    return [round(size) for size in exact]
