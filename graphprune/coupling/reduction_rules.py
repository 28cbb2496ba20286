"""Rules of operators that pool, reduce, look up or make tensors."""

import re
from typing import Any

from graphprune.coupling.axes import Axis, freeze
from graphprune.coupling.rule import Axes, Call, broadcast, dimension, operator, shapes_of, unknown


@operator(
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
    "max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "_upsample_nearest_exact2d", "max_pool2d_with_indices",
    "upsample_nearest1d", "upsample_linear1d", "upsample_nearest3d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)  # fmt: skip
def _pool(call: Call) -> Any:
    source = call.axes(next(iter(call.arguments)))
    lead = len(source) - int(re.findall(r"(\d)d", str(call.node.target))[0])
    for axis in source[lead:]:
        freeze(axis, f"spatial ({call.reason})")
    outputs = [[*source[:lead], *call.fresh(shape[lead:], "spatial")] for shape in shapes_of(call.node)]
    return outputs[0] if len(outputs) == 1 else outputs


@operator("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "any", "prod")
def _reduce(call: Call) -> Axes:
    source = call.axes(next(iter(call.arguments)))
    asked = call.arguments.get("dim")
    dims = range(len(source)) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    reduced = {int(dim) % len(source) for dim in dims}
    keepdim = call.arguments.get("keepdim", False)
    return [Axis(1) if i in reduced else axis for i, axis in enumerate(source) if keepdim or i not in reduced]


@operator("var_mean", "std_mean")
def _moments(call: Call) -> list[Axes]:
    return [_reduce(call), _reduce(call)]


@operator("max", "min", "argmax", "argmin", "topk", "sort", "argsort")
def _ordered(call: Call) -> Any:
    source = call.axes("self")
    if "other" in call.arguments:
        return broadcast(call, [source, call.axes("other")])
    if call.arguments.get("dim") is None:
        return unknown(call)
    dim = dimension(call, "dim", len(source))
    freeze(source[dim], f"an index into it is returned ({call.reason})")
    kept = [axis.size for axis in source]
    outputs = []
    for shape in shapes_of(call.node):
        lead = [*source[:dim], *call.fresh([shape[dim]], "chosen")] if len(shape) == len(kept) else source[:dim]
        outputs.append([*lead, *source[dim + 1 :]])
    return outputs if isinstance(call.node.meta["val"], (list, tuple)) else outputs[0]


@operator("index")
def _index(call: Call) -> Axes:
    source = call.axes("self")
    asked = [(position, value) for position, value in enumerate(call["indices"]) if value is not None]
    if len(asked) != 1:
        return unknown(call)  # type: ignore[no-any-return]
    position, value = asked[0]
    freeze(source[position], f"indices are looked up in it ({call.reason})")
    return [*source[:position], *call.axes_of(value), *source[position + 1 :]]


@operator("index_select")
def _index_select(call: Call) -> Axes:
    source = call.axes("self")
    dim = dimension(call, "dim", len(source))
    freeze(source[dim], f"indices are looked up in it ({call.reason})")
    return [*source[:dim], *call.axes("index"), *source[dim + 1 :]]


@operator("unfold")
def _unfold(call: Call) -> Axes:
    source = call.axes("self")
    dim = dimension(call, "dimension", len(source))
    freeze(source[dim], f"windows slide over it ({call.reason})")
    count, size = call.shape[dim], call.shape[-1]
    return [*source[:dim], *call.fresh([count], "windows"), *source[dim + 1 :], *call.fresh([size], "windows")]


@operator(
    "new_zeros", "new_ones", "new_full", "new_empty", "zeros", "ones", "full", "empty", "arange", "eye", "linspace"
)
def _made(call: Call) -> Axes:
    return call.fresh(call.shape, "made by the code")
