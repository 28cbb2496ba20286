"""Rules of operators that move, join, part or shrink axes: views, permutations, slices, pooling, reductions."""

from collections.abc import Callable
from typing import Any

from graphprune.coupling.axes import Axis, concatenation, freeze, product, reshape, segments, unify
from graphprune.coupling.rule import Axes, Call, Sizes, broadcast, dimension, operator, shapes_of, unknown


def _resize(argument: str) -> Callable[[Call, Any, Sizes], dict[str, Any]]:
    def literals(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
        asked = call.arguments.get(argument)
        if asked is None:  # a view as another type
            return {}
        first = dimension(call, "dim", len(out) - len(asked) + 1) if argument == "sizes" else 0
        axes, shape = out[first : first + len(asked)], call.node.meta["val"].shape[first:]
        after = [_resized(item, axis, size) for item, axis in zip(asked, axes, strict=True)]
        if after.count(-1) > 1:  # one was written in the code, and its size is known
            known = [item == -1 and isinstance(number, int) for item, number in zip(asked, shape, strict=False)]
            after = [size(axis) if k else item for k, item, axis in zip(known, after, axes, strict=True)]
        return {argument: after}

    return literals


def _resized(item: Any, axis: Any, size: Sizes) -> Any:
    """A size after the cut; -1 for one that is computed from the batch size and changes (batch x heads)."""
    if isinstance(item, int):
        return size(axis) if item > 0 else item
    return item if size(axis) == axis.size else -1


@operator("view", "_unsafe_view", literals=_resize("size"))
@operator("reshape", literals=_resize("shape"))
@operator("unflatten", literals=_resize("sizes"))
@operator("flatten", "squeeze", "unsqueeze", "squeeze_", "unsqueeze_")
def _reshape(call: Call) -> Axes:
    before, after = call.axes(next(iter(call.arguments))), [Axis(size) for size in call.shape]
    reshape(before, after, call.reason)
    return after


@operator("view_as", "reshape_as")
def _reshape_as(call: Call) -> Axes:
    before, after = call.axes("self"), call.axes("other")
    reshape(before, after, call.reason)
    return after


@operator("t", "numpy_T", "mT")
def _transposed(call: Call) -> Axes:
    source = call.axes("self")
    return source[::-1] if len(source) == 2 else [*source[:-2], source[-1], source[-2]]


@operator("movedim", "moveaxis")
def _move(call: Call) -> Axes:
    source = call.axes("self")
    given = (call["source"], call["destination"])
    asked = (dims if isinstance(dims, (list, tuple)) else [dims] for dims in given)
    start, end = ([int(dim) % len(source) for dim in dims] for dims in asked)
    others = iter([axis for position, axis in enumerate(source) if position not in start])
    moved = {to: source[position] for position, to in zip(start, end, strict=True)}
    return [moved[position] if position in moved else next(others) for position in range(len(source))]


@operator("permute")
def _permute(call: Call) -> Axes:
    source = call.axes("self")
    return [source[int(dim)] for dim in call["dims"]]


@operator("transpose", "transpose_", "swapdims", "swapaxes")
def _transpose(call: Call) -> Axes:
    source = call.axes("self")
    one, other = (dimension(call, name, len(source)) for name in list(call.arguments)[1:3])
    source[one], source[other] = source[other], source[one]
    return source


@operator("expand", "broadcast_to", literals=_resize("size"))
def _expand(call: Call) -> Axes:
    source, sizes = call.axes("self"), call.shape
    added = len(sizes) - len(source)
    result = call.fresh(sizes[:added], "expanded")
    for axis, size in zip(source, sizes[added:], strict=True):
        result += [axis] if axis.size == size else call.fresh([size], "expanded")
    return result


@operator("expand_as")
def _expand_as(call: Call) -> Axes:
    return broadcast(call, [call.axes("self"), call.axes("other")])


@operator("repeat", "tile")
def _repeat(call: Call) -> Axes:
    source, times = call.axes("self"), list(call["repeats" if "repeats" in call.arguments else "dims"])
    times = [1] * (len(source) - len(times)) + times
    result = call.fresh(call.shape[: len(times) - len(source)], "repeated")
    for axis, size in zip(source, call.shape[len(result) :], strict=True):
        copies = size // max(axis.size, 1)
        result.append(axis if copies == 1 else product([*call.fresh([copies], "repeated"), axis]))
    return result


@operator("repeat_interleave")
def _repeat_interleave(call: Call) -> Axes:
    source = call.axes("self")
    if not isinstance(call["repeats"], int) or call["dim"] is None:
        return unknown(call)  # type: ignore[no-any-return]
    dim = dimension(call, "dim", len(source))
    source[dim] = product([source[dim], *call.fresh([call["repeats"]], "repeated")])
    return source


@operator("pixel_shuffle")
def _pixel_shuffle(call: Call) -> Axes:
    source, squared = call.axes("self"), call["upscale_factor"] ** 2
    channels = Axis(source[-3].size // squared)
    unify(source[-3], product([channels, *call.fresh([squared], "it becomes spatial")]), call.reason)
    return [*source[:-3], channels, *call.fresh(call.shape[-2:], "spatial")]


@operator("pixel_unshuffle")
def _pixel_unshuffle(call: Call) -> Axes:
    source = call.axes("self")
    for axis in source[-2:]:
        freeze(axis, "spatial")
    channels = product([source[-3], *call.fresh([call["downscale_factor"] ** 2], "it was spatial")])
    return [*source[:-3], channels, *call.fresh(call.shape[-2:], "spatial")]


def _shuffled_groups(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    return {"groups": size(call.extra["groups"])}


@operator("channel_shuffle", literals=_shuffled_groups)
def _channel_shuffle(call: Call) -> Axes:
    source, groups = call.axes("self"), Axis(int(call["groups"]))
    within = Axis(source[1].size // groups.size)
    unify(source[1], product([groups, within]), call.reason)
    call.extra["groups"] = groups
    return [source[0], product([within, groups]), *source[2:]]


@operator("roll", "flip")
def _roll(call: Call) -> Axes:
    source = call.axes("self")
    for dim in call["dims"] or range(len(source)):
        freeze(source[dim], f"its order matters ({call.reason})")
    return source


@operator("cat", "concat", "concatenate")
def _cat(call: Call) -> Axes:
    tensors = [axes for value in call["tensors"] if (axes := call.axes_of(value))]
    dim = dimension(call, "dim", len(tensors[0]))
    result: Axes = []
    for position in range(len(tensors[0])):
        here = [axes[position] for axes in tensors]
        if position == dim:
            result.append(concatenation(here))
            continue
        for axis in here[1:]:
            unify(here[0], axis, call.reason)
        result.append(here[0])
    return result


@operator("stack")
def _stack(call: Call) -> Axes:
    tensors = [call.axes_of(value) for value in call["tensors"]]
    shared = broadcast(call, tensors)
    shared.insert(dimension(call, "dim", len(shared) + 1), *call.fresh([len(tensors)], "stacked"))
    return shared


def _split_sizes(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    dim = dimension(call, "dim", len(out[0]))
    return {"split_sizes": [size(axes[dim]) for axes in out]}


@operator("split", "chunk", "split_with_sizes", "unsafe_chunk", "tensor_split", literals=_split_sizes)
def _split(call: Call) -> list[Axes]:
    source, shapes = call.axes("self"), shapes_of(call.node)
    dim = dimension(call, "dim", len(source))
    parts = segments(source[dim], [shape[dim] for shape in shapes], call.reason)
    return [[*source[:dim], part, *source[dim + 1 :]] for part in parts]


@operator("glu")
def _glu(call: Call) -> Axes:
    source = call.axes("self")
    dim = dimension(call, "dim", len(source))
    half = source[dim].size // 2
    value, gate = segments(source[dim], [half, half], call.reason)
    unify(value, gate, call.reason)
    return [*source[:dim], value, *source[dim + 1 :]]


@operator("unbind")
def _unbind(call: Call) -> list[Axes]:
    source = call.axes("self")
    dim = dimension(call, "dim", len(source))
    freeze(source[dim], f"taken apart ({call.reason})")
    return [source[:dim] + source[dim + 1 :] for _ in shapes_of(call.node)]


@operator("select")
def _select(call: Call) -> Axes:
    source = call.axes("self")
    dim = dimension(call, "dim", len(source))
    freeze(source[dim], f"one index is read ({call.reason})")
    return source[:dim] + source[dim + 1 :]


def _slice_bounds(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    before, middle = call.extra.get("before"), call.extra.get("middle")
    if before is None or middle is None:
        return {}
    start = size(before)
    return {"start": start, "end": start + size(middle)}


@operator("slice", literals=_slice_bounds)
def _slice(call: Call) -> Axes:
    source, shape = call.axes("self"), call.shape
    dim = dimension(call, "dim", len(source))
    axis, size = source[dim], shape[dim]
    if size == axis.size:
        return source
    if call["step"] != 1 or not isinstance(call["start"] or 0, int):
        freeze(axis, f"every few indices are read ({call.reason})")
        return [*source[:dim], *call.fresh([size], "sliced"), *source[dim + 1 :]]
    start = call["start"] or 0
    start = max(start + axis.size, 0) if start < 0 else start
    before, middle, _ = segments(axis, [start, size, axis.size - start - size], call.reason)
    call.extra |= {"before": before, "middle": middle}
    return [*source[:dim], middle, *source[dim + 1 :]]


def _narrow_bounds(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    bounds = _slice_bounds(call, out, size)
    return {"start": bounds["start"], "length": bounds["end"] - bounds["start"]} if bounds else {}


@operator("narrow", literals=_narrow_bounds)
def _narrow(call: Call) -> Axes:
    call.arguments |= {"step": 1}
    return _slice(call)  # type: ignore[no-any-return]


@operator("pad", "constant_pad_nd")
def _pad(call: Call) -> Axes:
    source, pads = call.axes("self"), list(call["pad"])
    for number in range(len(pads) // 2):
        low, high, dim = pads[2 * number], pads[2 * number + 1], len(source) - 1 - number
        middle, copies = source[dim], call.arguments.get("mode", "constant") != "constant"
        if (
            not all(isinstance(amount, int) for amount in (low, high))
            or min(low, high) < 0
            or (copies and (low or high))
        ):
            freeze(middle, f"cropped, or padded by what is computed ({call.reason})")
            source[dim] = call.fresh([call.shape[dim]], "padded")[0]
        elif low or high:
            ends = call.fresh([low, high], "the padding is written in the code")
            source[dim] = concatenation([axis for axis in (ends[0], middle, ends[1]) if axis.size])
    return source
