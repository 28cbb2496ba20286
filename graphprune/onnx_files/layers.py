"""ONNX operators that are layers: products, convolutions, pools, norms and attention."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from graphprune.errors import InputError
from graphprune.onnx_files.operators import OnnxCall, onnx_operator


@onnx_operator("MatMul")
def _matmul(call: OnnxCall) -> Tensor:
    product = torch.matmul(call.tensor(0), call.tensor(1))
    return product + call.tensor(2) if call.has(2) else product  # a sum that the importer has joined to it


@onnx_operator("Gemm")
def _gemm(call: OnnxCall) -> Tensor:
    a = call.tensor(0).t() if call.attribute("transA", 0) else call.tensor(0)
    b = call.tensor(1).t() if call.attribute("transB", 0) else call.tensor(1)
    y: Tensor = torch.matmul(a, b) * call.attribute("alpha", 1.0)
    return torch.add(y, call.tensor(2), alpha=call.attribute("beta", 1.0)) if call.has(2) else y


@onnx_operator("Einsum")
def _einsum(call: OnnxCall) -> Tensor:
    equation = call.attribute("equation").replace(" ", "")
    return torch.einsum(equation, *(call.tensor(n) for n in range(len(call.values))))


def padded(x: Tensor, call: OnnxCall, kernel: Sequence[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input, padded where torch's layers cannot do it themselves, and the padding that is left to them."""
    rank = len(kernel)
    low, high = window_pads(call, list(x.shape[2:]), kernel)
    if low == high and all(2 * amount <= size for amount, size in zip(low, kernel, strict=True)):
        return x, low
    ends = [amount for n in reversed(range(rank)) for amount in (low[n], high[n])]
    return functional.pad(x, ends, value=value), [0] * rank


def window_pads(call: OnnxCall, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int]]:
    """What a sliding window adds before and after each spatial axis."""
    rank = len(kernel)
    pads, auto = list(call.attribute("pads", [0] * 2 * rank)), call.attribute("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        stride, dilation = call.attribute("strides", [1] * rank), call.attribute("dilations", [1] * rank)
        total = [
            max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
            for size, k, s, d in zip(sizes, kernel, stride, dilation, strict=True)
        ]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        return (small, large) if auto == "SAME_UPPER" else (large, small)
    return ([0] * rank, [0] * rank) if auto == "VALID" else (pads[:rank], pads[rank:])


@onnx_operator("Conv")
def _convolution(call: OnnxCall) -> Tensor:
    weight = call.tensor(1)
    rank = weight.dim() - 2
    x, padding = padded(call.tensor(0), call, weight.shape[2:])
    compute = (functional.conv1d, functional.conv2d, functional.conv3d)[rank - 1]
    stride, dilation = call.attribute("strides", [1] * rank), call.attribute("dilations", [1] * rank)
    return compute(x, weight, call.optional(2), stride, padding, dilation, call.attribute("group", 1))


@onnx_operator("ConvTranspose")
def _transposed_convolution(call: OnnxCall) -> Tensor:
    weight = call.tensor(1)
    rank = weight.dim() - 2
    automatic = "output_shape" in call.attributes or call.attribute("auto_pad", "NOTSET") != "NOTSET"
    low, high = ([0], [1]) if automatic else window_pads(call, [], [1] * rank)
    if low != high:
        raise InputError("a transposed convolution with unequal or automatic padding is not supported")
    compute = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[rank - 1]
    stride, dilation = call.attribute("strides", [1] * rank), call.attribute("dilations", [1] * rank)
    extra = call.attribute("output_padding", [0] * rank)
    return compute(call.tensor(0), weight, call.optional(2), stride, low, extra, call.attribute("group", 1), dilation)


@onnx_operator("MaxPool")
def _max_pool(call: OnnxCall) -> Tensor:
    kernel = call.attribute("kernel_shape")
    rank = len(kernel)
    x, padding = padded(call.tensor(0), call, kernel, -math.inf)
    compute = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[rank - 1]
    stride, dilation = call.attribute("strides", [1] * rank), call.attribute("dilations", [1] * rank)
    if call.outputs > 1:
        raise InputError("MaxPool that returns indices is not supported")
    return compute(x, kernel, stride, padding, dilation, bool(call.attribute("ceil_mode", 0)))


@onnx_operator("AveragePool")
def _average_pool(call: OnnxCall) -> Tensor:
    kernel = call.attribute("kernel_shape")
    rank, x = len(kernel), call.tensor(0)
    low, high = window_pads(call, list(x.shape[2:]), kernel)
    counted = bool(call.attribute("count_include_pad", 0))
    wide = low != high or any(2 * amount > size for amount, size in zip(low, kernel, strict=True))
    if any(d != 1 for d in call.attribute("dilations", [1] * rank)) or (wide and not counted):
        raise InputError("AveragePool with dilation or unequal padding is not supported")
    compute = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[rank - 1]
    x, padding = padded(x, call, kernel)
    stride = call.attribute("strides", [1] * rank)
    return compute(x, kernel, stride, padding, bool(call.attribute("ceil_mode", 0)), counted)


@onnx_operator("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    axes = list(range(2, x.dim()))
    return x.mean(axes, keepdim=True) if call.name == "GlobalAveragePool" else x.amax(axes, keepdim=True)


@onnx_operator("LayerNormalization")
def _layer_norm(call: OnnxCall) -> Tensor | tuple[Tensor, ...]:
    x, epsilon = call.tensor(0), call.attribute("epsilon", 1e-5)
    first = call.attribute("axis", -1) % x.dim()
    y = functional.layer_norm(x, list(x.shape[first:]), call.optional(1), call.optional(2), epsilon)
    if call.outputs == 1:
        return y
    variance, mean = torch.var_mean(x, list(range(first, x.dim())), correction=0, keepdim=True)
    return y, mean, torch.rsqrt(variance + epsilon)


@onnx_operator("RMSNormalization")
def _rms_norm(call: OnnxCall) -> Tensor:
    x = call.tensor(0)
    shape = list(x.shape[call.attribute("axis", -1) % x.dim() :])
    return functional.rms_norm(x, shape, call.optional(1), call.attribute("epsilon", 1e-5))


@onnx_operator("GroupNormalization")
def _group_norm(call: OnnxCall) -> Tensor:
    x, groups = call.tensor(0), call.attribute("num_groups")
    weight, bias = call.tensor(1), call.tensor(2)
    if call.opset < 21:  # a weight for each group, not for each channel
        weight, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (weight, bias))
    return functional.group_norm(x, groups, weight, bias, call.attribute("epsilon", 1e-5))


@onnx_operator("InstanceNormalization")
def _instance_norm(call: OnnxCall) -> Tensor:
    epsilon = call.attribute("epsilon", 1e-5)
    return functional.instance_norm(call.tensor(0), weight=call.tensor(1), bias=call.tensor(2), eps=epsilon)


@onnx_operator("BatchNormalization")
def _batch_norm(call: OnnxCall) -> Tensor | tuple[Tensor, ...]:
    x, weight, bias, mean, variance = (call.tensor(n) for n in range(5))
    epsilon = call.attribute("epsilon", 1e-5)
    if call.opset < 14 and call.outputs > 1:
        raise InputError("BatchNormalization in training mode, as it was before opset 14, is not supported")
    if not call.attribute("training_mode", 0):
        return functional.batch_norm(x, mean, variance, weight, bias, eps=epsilon)
    normed = functional.batch_norm(x, None, None, weight, bias, training=True, eps=epsilon)  # as weights are, somewhere
    if call.outputs == 1:
        return normed
    axes, kept = [axis for axis in range(x.dim()) if axis != 1], call.attribute("momentum", 0.9)
    now = x.mean(axes), x.var(axes, correction=0)
    return normed, *(old * kept + new * (1 - kept) for old, new in zip((mean, variance), now, strict=True))


@onnx_operator("Col2Im")
def _col2im(call: OnnxCall) -> Tensor:
    image, kernel = tuple(call.ints(1)), tuple(call.ints(2))
    pads = call.attribute("pads", [0, 0, 0, 0])
    if len(image) != 2 or pads[:2] != pads[2:]:
        raise InputError("Col2Im with other than two axes, padded alike on both sides, is not supported")
    dilations, strides = (call.attribute(name, [1, 1]) for name in ("dilations", "strides"))
    return functional.fold(call.tensor(0), image, kernel, dilations, pads[:2], strides)


@onnx_operator("Attention")
def _attention(call: OnnxCall) -> Tensor:
    query, key, value = (call.tensor(n) for n in range(3))
    causal = bool(call.attribute("is_causal", 0))
    if query.dim() != 4 or call.outputs > 1 or any(call.has(n) for n in (4, 5, 6)) or call.attribute("softcap", 0.0):
        raise InputError("Attention on tensors without a head axis, with a cache or a soft cap is not supported")
    if unknown := sorted(call.attributes.keys() - {"is_causal", "scale", "softcap"}):
        raise InputError(f"Attention with {unknown[0]} is not supported")
    mask = call.optional(3)
    if mask is not None and (causal or mask.shape[-1] != key.shape[-2]):
        raise InputError("Attention with a mask that is causal as well, or narrower than the keys, is not supported")
    if causal and query.shape[-2] != key.shape[-2]:
        raise InputError("causal Attention with more keys than queries is not supported")
    return functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal,
        scale=call.attribute("scale"), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
