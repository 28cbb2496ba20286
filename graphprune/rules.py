"""The table of operator rules: how the axes of an operator's inputs map to the axes of its outputs.

One entry per ATen operator of `torch.export`. An entry has two directions:

* `couple(call)` unifies the axes of the inputs (parameters are inputs too) and returns the axes of the output;
* `literals(call, sizes)` returns the arguments that name sizes, for the operator after a cut.

A new operator needs one function here:

    @operator("my_library::scale_channels")
    def _scale_channels(call: Call) -> Axes:
        unify(call.axes("x")[1], call.axes("scale")[0], call.reason)
        return call.axes("x")
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphprune.axes import Axis, concatenation, freeze, frozen_axis, product, reshape, segments, unify

Axes = list[Axis]
Sizes = Callable[[Axis], int]
"""The size of an axis after the cut."""


@dataclass
class Call:
    """One call of an operator: its arguments by name, the axes of its tensors, and its output shape."""

    node: fx.Node
    arguments: dict[str, Any]
    known: dict[fx.Node, Any]
    reason: str
    extra: dict[str, Axis] = field(default_factory=dict)
    """Axes that are no dimension of a tensor: `groups` of a convolution or norm, `heads` of an attention."""

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def axes(self, name: str) -> Axes:
        """The axes of a tensor argument; none for a number."""
        return self.axes_of(self.arguments[name])

    def axes_of(self, value: Any) -> Axes:
        """The axes of a tensor."""
        return list(self.known.get(value, [])) if isinstance(value, fx.Node) else []

    @property
    def shape(self) -> list[int]:
        """The concrete shape of the (first) output."""
        return shapes_of(self.node)[0]

    def fresh(self, sizes: Sequence[int], why: str) -> Axes:
        """New axes on which nothing may be cut."""
        return [frozen_axis(size, f"{why} ({self.reason})") for size in sizes]


@dataclass(frozen=True)
class Rule:
    """One entry of the table."""

    couple: Callable[[Call], Any]
    literals: Callable[[Call, Any, Sizes], dict[str, Any]] | None = None


RULES: dict[str, Rule] = {}


def operator(*names: str, literals: Callable[[Call, Any, Sizes], dict[str, Any]] | None = None) -> Callable[[Any], Any]:
    """Enter a coupling function into the table under ATen names without overload (`conv2d`), or `namespace::name`."""

    def enter(couple: Callable[[Call], Any]) -> Callable[[Call], Any]:
        for name in names:
            RULES[name] = Rule(couple, literals)
        return couple

    return enter


def concrete(size: Any) -> int:
    """A size as a number: the value of the example input for a symbolic one."""
    return size if isinstance(size, int) else int(size.node.hint)


def shapes_of(node: fx.Node) -> list[list[int]]:
    """The concrete shapes of all output tensors of a node."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return [[concrete(size) for size in v.shape] for v in values if isinstance(v, torch.Tensor)]


def _dimension(call: Call, name: str, rank: int) -> int:
    return int(call[name]) % rank


# --- layers -----------------------------------------------------------------------------------------------------


def _convolution_literals(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    return {"groups": size(call.extra["groups"])} if "groups" in call.extra else {}


@operator("conv1d", "conv2d", "conv3d", literals=_convolution_literals)
def _convolution(call: Call) -> Axes:
    source, weight = call.axes("input"), call.axes("weight")
    _couple_channels(call, source[1], weight[0], weight[1])
    for axis in call.axes("bias"):
        unify(axis, weight[0], call.reason)
    for axis in [*weight[2:], *source[2:]]:
        freeze(axis, "a convolution slides over it")
    return [source[0], weight[0], *call.fresh(call.shape[2:], "spatial")]


@operator("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", literals=_convolution_literals)
def _transposed_convolution(call: Call) -> Axes:
    source, weight = call.axes("input"), call.axes("weight")
    outputs = Axis(call.shape[1])
    _couple_channels(call, outputs, weight[0], weight[1])
    unify(source[1], weight[0], call.reason)
    for axis in call.axes("bias"):
        unify(axis, outputs, call.reason)
    for axis in [*weight[2:], *source[2:]]:
        freeze(axis, "a convolution slides over it")
    return [source[0], outputs, *call.fresh(call.shape[2:], "spatial")]


def _couple_channels(call: Call, wide: Axis, per_group: Axis, narrow: Axis) -> None:
    """`wide` has groups x narrow channels; `per_group` runs over all groups too."""
    groups = int(call["groups"])
    if groups == 1:
        unify(wide, narrow, call.reason)
        return
    shared = Axis(groups)
    call.extra["groups"] = shared
    unify(wide, product([shared, narrow]), call.reason)
    unify(per_group, product([shared, Axis(per_group.size // groups)]), call.reason)


@operator("linear")
def _linear(call: Call) -> Axes:
    source, weight = call.axes("input"), call.axes("weight")
    unify(source[-1], weight[1], call.reason)
    for axis in call.axes("bias"):
        unify(axis, weight[0], call.reason)
    return [*source[:-1], weight[0]]


@operator("matmul", "bmm")
def _matmul(call: Call) -> Axes:
    one, other = (call.axes(name) for name in list(call.arguments)[:2])
    if len(one) < 2 or len(other) < 2:
        return unknown(call)
    unify(one[-1], other[-2], call.reason)
    return [*_broadcast(call, [one[:-2], other[:-2]]), one[-2], other[-1]]


@operator("scaled_dot_product_attention")
def _attention(call: Call) -> Axes:
    query, key, value = call.axes("query"), call.axes("key"), call.axes("value")
    unify(query[-1], key[-1], call.reason)
    if call["scale"] is None:
        freeze(query[-1], f"the attention scale is computed from it ({call.reason})")
    freeze(value[-1], f"the value width stays ({call.reason})")
    unify(key[-2], value[-2], call.reason)
    batch = _broadcast(call, [query[:-2], key[:-2], value[:-2]])
    if len(batch) > 1:
        call.extra["heads"] = batch[-1]
    mask = call.axes("attn_mask")
    _broadcast(call, [mask, [*batch, query[-2], key[-2]]])
    return [*batch, query[-2], value[-1]]


# --- norms ------------------------------------------------------------------------------------------------------


@operator("batch_norm", "instance_norm")
def _batch_norm(call: Call) -> Axes:
    source = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        for axis in call.axes(name):
            unify(axis, source[1], call.reason)
    return source


def _normalized_shape(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    return {"normalized_shape": [size(axis) for axis in out[-len(call["normalized_shape"]) :]]}


@operator("layer_norm", "rms_norm", literals=_normalized_shape)
def _layer_norm(call: Call) -> Axes:
    source = call.axes("input")
    for name in ("weight", "bias"):
        if name in call.arguments:
            for axis, other in zip(reversed(call.axes(name)), reversed(source), strict=False):
                unify(axis, other, call.reason)
    return source


def _number_of_groups(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    return {"num_groups": size(call.extra["groups"])}


@operator("group_norm", literals=_number_of_groups)
def _group_norm(call: Call) -> Axes:
    source, groups = call.axes("input"), int(call["num_groups"])
    call.extra["groups"] = Axis(groups)
    unify(source[1], product([call.extra["groups"], Axis(source[1].size // groups)]), call.reason)
    for name in ("weight", "bias"):
        for axis in call.axes(name):
            unify(axis, source[1], call.reason)
    return source


# --- elementwise ------------------------------------------------------------------------------------------------

_UNARY = """abs alias bernoulli celu clamp clamp_max clamp_min clone contiguous cos detach dropout elu erf exp
feature_dropout floor gelu hardsigmoid hardswish hardtanh leaky_relu log log1p logical_not mish neg reciprocal relu relu6
round rsqrt selu sigmoid sign silu sin softplus sqrt square tanh to _to_copy type_as alpha_dropout cumsum isnan
nan_to_num threshold bitwise_not log_sigmoid zeros_like ones_like full_like expm1 ceil hardshrink softsign""".split()
_BROADCAST = """add sub mul div rsub pow maximum minimum where masked_fill eq ne lt gt le ge logical_and logical_or
atan2 fmod remainder addcmul lerp bitwise_and bitwise_or prelu floor_divide""".split()


@operator(*_UNARY, *(f"{name}_" for name in _UNARY), "softmax", "log_softmax", "normalize", "assert_tensor_metadata")
def _same(call: Call) -> Axes:
    return call.axes(next(iter(call.arguments)))


@operator(*_BROADCAST, *(f"{name}_" for name in _BROADCAST))
def _elementwise(call: Call) -> Axes:
    return _broadcast(call, [call.axes_of(value) for value in call.arguments.values()])


def _broadcast(call: Call, tensors: Sequence[Axes]) -> Axes:
    """Unify axes from the right; size 1 stretches."""
    rank = max((len(axes) for axes in tensors), default=0)
    result: Axes = []
    for position in range(1, rank + 1):
        here = [axes[-position] for axes in tensors if len(axes) >= position]
        wide = [axis for axis in here if axis.size != 1] or here[:1]
        for axis in wide[1:]:
            unify(wide[0], axis, call.reason)
        result.insert(0, wide[0])
    return result


# --- shapes -----------------------------------------------------------------------------------------------------


def _resize(argument: str) -> Callable[[Call, Any, Sizes], dict[str, Any]]:
    def literals(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
        asked = call[argument]
        tail = out[-len(asked) :] if argument != "sizes" else out[_dimension(call, "dim", 99) :]
        return {
            argument: [
                size(axis) if isinstance(item, int) and item > 0 else item
                for item, axis in zip(asked, tail, strict=False)
            ]
        }

    return literals


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


@operator("permute")
def _permute(call: Call) -> Axes:
    source = call.axes("self")
    return [source[int(dim)] for dim in call["dims"]]


@operator("transpose", "transpose_")
def _transpose(call: Call) -> Axes:
    source = call.axes("self")
    one, other = _dimension(call, "dim0", len(source)), _dimension(call, "dim1", len(source))
    source[one], source[other] = source[other], source[one]
    return source


@operator("expand", literals=_resize("size"))
def _expand(call: Call) -> Axes:
    source, sizes = call.axes("self"), call.shape
    added = len(sizes) - len(source)
    result = call.fresh(sizes[:added], "expanded")
    for axis, size in zip(source, sizes[added:], strict=True):
        result += [axis] if axis.size == size else call.fresh([size], "expanded")
    return result


@operator("repeat")
def _repeat(call: Call) -> Axes:
    source, times = call.axes("self"), list(call["repeats"])
    result = call.fresh(call.shape[: len(times) - len(source)], "repeated")
    for axis, size in zip(source, call.shape[len(result) :], strict=True):
        copies = size // max(axis.size, 1)
        result.append(axis if copies == 1 else product([*call.fresh([copies], "repeated"), axis]))
    return result


@operator("roll", "flip")
def _roll(call: Call) -> Axes:
    source = call.axes("self")
    for dim in call["dims"]:
        freeze(source[dim], f"its order matters ({call.reason})")
    return source


@operator("cat")
def _cat(call: Call) -> Axes:
    tensors = [axes for value in call["tensors"] if (axes := call.axes_of(value))]
    dim = _dimension(call, "dim", len(tensors[0]))
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
    shared = _broadcast(call, tensors)
    shared.insert(_dimension(call, "dim", len(shared) + 1), *call.fresh([len(tensors)], "stacked"))
    return shared


def _split_sizes(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    dim = _dimension(call, "dim", len(out[0]))
    return {"split_sizes": [size(axes[dim]) for axes in out]}


@operator("split", "chunk", "split_with_sizes", "unsafe_chunk", "tensor_split", literals=_split_sizes)
def _split(call: Call) -> list[Axes]:
    source, shapes = call.axes("self"), shapes_of(call.node)
    dim = _dimension(call, "dim", len(source))
    parts = segments(source[dim], [shape[dim] for shape in shapes], call.reason)
    return [[*source[:dim], part, *source[dim + 1 :]] for part in parts]


@operator("unbind")
def _unbind(call: Call) -> list[Axes]:
    source = call.axes("self")
    dim = _dimension(call, "dim", len(source))
    freeze(source[dim], f"taken apart ({call.reason})")
    return [source[:dim] + source[dim + 1 :] for _ in shapes_of(call.node)]


@operator("select")
def _select(call: Call) -> Axes:
    source = call.axes("self")
    dim = _dimension(call, "dim", len(source))
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
    dim = _dimension(call, "dim", len(source))
    axis, size = source[dim], shape[dim]
    if size == axis.size:
        return source
    if call["step"] != 1 or not isinstance(call["start"] or 0, int):
        freeze(axis, f"every few indices are read ({call.reason})")
        return [*source[:dim], *call.fresh([size], "sliced"), *source[dim + 1 :]]
    start = (call["start"] or 0) % axis.size
    before, middle, _ = segments(axis, [start, size, axis.size - start - size], call.reason)
    call.extra |= {"before": before, "middle": middle}
    return [*source[:dim], middle, *source[dim + 1 :]]


@operator("pad", "constant_pad_nd")
def _pad(call: Call) -> Axes:
    source, pads = call.axes("self"), list(call["pad"])
    for number in range(len(pads) // 2):
        low, high, dim = pads[2 * number], pads[2 * number + 1], len(source) - 1 - number
        middle = source[dim]
        if not all(isinstance(amount, int) for amount in (low, high)) or min(low, high) < 0:
            freeze(middle, f"cropped or padded by a computed amount ({call.reason})")
            source[dim] = call.fresh([call.shape[dim]], "padded")[0]
        elif low or high:
            ends = call.fresh([low, high], "the padding is written in the code")
            source[dim] = concatenation([axis for axis in (ends[0], middle, ends[1]) if axis.size])
    return source


@operator(
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "lp_pool2d",
    "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "_upsample_nearest_exact2d", "max_pool2d_with_indices",
)  # fmt: skip
def _pool(call: Call) -> Any:
    source = call.axes(next(iter(call.arguments)))
    for axis in source[2:]:
        freeze(axis, "spatial")
    outputs = [[*source[:2], *call.fresh(shape[2:], "spatial")] for shape in shapes_of(call.node)]
    return outputs[0] if len(outputs) == 1 else outputs


@operator("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "any")
def _reduce(call: Call) -> Axes:
    source = call.axes(next(iter(call.arguments)))
    asked = call.arguments.get("dim")
    dims = range(len(source)) if asked is None else [asked] if isinstance(asked, int) else asked
    reduced = {int(dim) % len(source) for dim in dims}
    keepdim = call.arguments.get("keepdim", False)
    return [Axis(1) if i in reduced else axis for i, axis in enumerate(source) if keepdim or i not in reduced]


def unknown(call: Call) -> Any:
    """An operator without a rule: its input axes are frozen and named, its outputs are frozen."""
    why = f"no rule for {call.node.target}"
    for value in call.node.all_input_nodes:
        for axis in _flat(call.known.get(value, [])):
            freeze(axis, f"{why} ({call.reason})")
    outputs = [call.fresh(shape, why) for shape in shapes_of(call.node)]
    many = isinstance(call.node.meta.get("val"), (list, tuple))
    return outputs if many else outputs[0] if outputs else []


def _flat(value: Any) -> Axes:
    return [value] if isinstance(value, Axis) else [axis for item in value for axis in _flat(item)]
