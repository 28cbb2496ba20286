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

from typing import Any

import torch

from graphprune.coupling import reduction_rules, shape_rules
from graphprune.coupling.axes import Axis, freeze, product, unify
from graphprune.coupling.rule import RULES, Axes, Call, Rule, Sizes, broadcast, operator, shapes_of, unknown

__all__ = ["RULES", "Axes", "Call", "Rule", "operator", "reduction_rules", "shape_rules", "shapes_of", "unknown"]

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


@operator("embedding")
def _embedding(call: Call) -> Axes:
    rows, width = call.axes("weight")
    freeze(rows, f"an index is looked up in it ({call.reason})")
    return [*call.axes("indices"), width]


@operator("einsum")
def _einsum(call: Call) -> Axes:
    sides = call["equation"].replace(" ", "").split("->")
    if len(sides) != 2 or "." in sides[0]:
        return unknown(call)  # type: ignore[no-any-return]
    letters: dict[str, Axis] = {}
    for names, tensor in zip(sides[0].split(","), call["tensors"], strict=True):
        for name, axis in zip(names, call.axes_of(tensor), strict=True):
            unify(letters.setdefault(name, axis), axis, call.reason)
    return [letters[name] for name in sides[1]]


@operator("matmul", "bmm")
def _matmul(call: Call) -> Axes:
    one, other = (call.axes(name) for name in list(call.arguments)[:2])
    if len(one) < 2 or len(other) < 2:
        return unknown(call)  # type: ignore[no-any-return]
    unify(one[-1], other[-2], call.reason)
    return [*broadcast(call, [one[:-2], other[:-2]]), one[-2], other[-1]]


def _dense_scale(call: Call, out: Any, size: Sizes) -> dict[str, Any]:
    """A scale that the operator computes from the width is written out once the width is another."""
    width = call.extra["width"]
    given = call["scale"] is not None or size(width) == width.size
    return {"scale": call["scale"] if given else width.size**-0.5}


@operator("scaled_dot_product_attention", literals=_dense_scale)
def _attention(call: Call) -> Axes:
    query, key, value = call.axes("query"), call.axes("key"), call.axes("value")
    unify(query[-1], key[-1], call.reason)
    call.extra["width"] = query[-1]
    if len(query) < 4:
        for axis in (query[-1], value[-1]):
            freeze(axis, f"its attention has no head axis ({call.reason})")
    unify(key[-2], value[-2], call.reason)
    if call["is_causal"]:
        for axis in (query[-2], key[-2]):
            freeze(axis, f"its order matters ({call.reason})")
    if query[-3:-2] and key[-3].size != query[-3].size:
        key, value = (_repeated_heads(call, query[-3], tensor) for tensor in (key, value))
    batch = broadcast(call, [query[:-2], key[:-2], value[:-2]])
    if len(batch) > 1:
        call.extra["heads"] = batch[-1]
    mask = call.axes("attn_mask")
    broadcast(call, [mask, [*batch, query[-2], key[-2]]])
    return [*batch, query[-2], value[-1]]


def _repeated_heads(call: Call, heads: Axis, tensor: Axes) -> Axes:
    """Grouped queries: each head of the keys and values serves the same number of consecutive query heads."""
    unify(heads, product([tensor[-3], Axis(heads.size // tensor[-3].size)]), call.reason)
    return [*tensor[:-3], heads, *tensor[-2:]]


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

_UNARY = """
_to_copy abs absolute alias alpha_dropout bitwise_not ceil celu clamp clamp_max clamp_min clip clone contiguous
cos cumsum detach dropout elu erf exp expm1 feature_dropout floor full_like gelu hardshrink hardsigmoid
hardswish hardtanh isnan leaky_relu lift_fresh_copy log log1p log2 log_sigmoid logical_not mish nan_to_num neg
negative ones_like reciprocal relu relu6 round rsqrt selu sigmoid sign silu sin softplus special_expit sqrt
square tanh threshold to trunc type_as zeros_like
""".split()  # noqa: SIM905 - words that read better than a list of strings
_BROADCAST = """
add addcmul atan2 bitwise_and bitwise_or div divide eq floor_divide fmod ge greater greater_equal gt le lerp
less less_equal logical_and logical_or lt masked_fill maximum minimum mul multiply ne not_equal pow remainder
rsub sub subtract true_divide where
""".split()  # noqa: SIM905


def _in_place(names: list[str]) -> list[str]:
    return [f"{name}_" for name in names if hasattr(torch.ops.aten, f"{name}_")]


@operator(*_UNARY, *_in_place(_UNARY), "softmax", "log_softmax")
def _same(call: Call) -> Axes:
    return call.axes(next(iter(call.arguments)))


@operator(*_BROADCAST, *_in_place(_BROADCAST))
def _elementwise(call: Call) -> Axes:
    return broadcast(call, [call.axes_of(value) for value in call.arguments.values()])


@operator("prelu")
def _prelu(call: Call) -> Axes:
    source, weight = call.axes("self"), call.axes("weight")
    if weight and weight[0].size != 1:
        unify(weight[0], source[1], call.reason)
    return source
