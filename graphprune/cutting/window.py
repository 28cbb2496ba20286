"""A convolution with a smaller kernel than it had: one-sided padding, and a crop where the window is off-centre.

All filters have the same window (`WindowConv2d`), or each run of filters has one of its own (`MixedConv2d`).
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from graphprune.coupling.graph import Window

Ends = tuple[int, int, int, int]
"""Padding (left, right, top, bottom), in the order of `torch.nn.functional.pad`; negative entries crop."""


def window_padding(
    kernel: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], window: Window
) -> Ends:
    """The padding with which the kernel's window reads what it read inside the whole kernel."""
    (top, bottom), (left, right) = window
    return (
        padding[1] - left * dilation[1],
        padding[1] - (kernel[1] - right) * dilation[1],
        padding[0] - top * dilation[0],
        padding[0] - (kernel[0] - bottom) * dilation[0],
    )


def padded_conv2d(
    source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
    stride: Sequence[int], ends: Ends, dilation: Sequence[int], groups: int,
) -> torch.Tensor:  # fmt: skip
    """A 2-D convolution with its own padding on each side. Shapes as in `torch.nn.functional.conv2d`."""
    left, right, top, bottom = ends
    if left == right >= 0 and top == bottom >= 0:
        return functional.conv2d(source, weight, bias, tuple(stride), (top, left), tuple(dilation), groups)
    return functional.conv2d(padded(source, ends), weight, bias, tuple(stride), 0, tuple(dilation), groups)


def padded(source: torch.Tensor, ends: Ends) -> torch.Tensor:
    """`torch.nn.functional.pad` with zeros, which also lets a crop reach into the padding of the other side."""
    height, width = source.shape[-2:]
    if min(ends[:2]) >= -width and min(ends[2:]) >= -height:
        return functional.pad(source, ends)
    # `pad` crops before it pads, so that it would find too little to crop.
    grown = functional.pad(source, tuple(max(end, 0) for end in ends))
    return functional.pad(grown, tuple(min(end, 0) for end in ends))


class WindowConv2d(nn.Conv2d):
    """An `nn.Conv2d` of which only a window of the kernel is left; state dict names as before.

    `ends` is its padding (left, right, top, bottom); negative entries crop the input.
    """

    ends: Ends = (0, 0, 0, 0)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, outputs, H', W'], the same H' and W' as with the whole kernel."""
        return padded_conv2d(input, self.weight, self.bias, self.stride, self.ends, self.dilation, self.groups)

    def extra_repr(self) -> str:
        """The convolution's own text and its paddings."""
        return f"{super().extra_repr()}, ends={self.ends}"  # type: ignore[no-untyped-call]


def windowed(conv: nn.Conv2d, window: Window) -> WindowConv2d:
    """The convolution with only a window of its kernel, sharing nothing with `conv`."""
    assert not isinstance(conv.padding, str)
    (top, bottom), (left, right) = window
    weight = conv.weight.detach()[:, :, top:bottom, left:right].clone()
    small = WindowConv2d(
        conv.in_channels, conv.out_channels, (bottom - top, right - left), conv.stride,  # type: ignore[arg-type]
        0, conv.dilation, conv.groups, conv.bias is not None, device="meta", dtype=weight.dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    small.ends = window_padding(conv.kernel_size, conv.padding, conv.dilation, window)  # type: ignore[arg-type]
    small.weight = nn.Parameter(weight, conv.weight.requires_grad)
    if conv.bias is not None:
        small.bias = nn.Parameter(conv.bias.detach().clone(), conv.bias.requires_grad)
    return small.train(conv.training)


class MixedConv2d(nn.Module):
    """Convolutions of one input side by side, a kernel window for each; their outputs are concatenated."""

    def __init__(self, parts: Sequence[WindowConv2d]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> [N, outputs, H', W'], the same H' and W' as with the whole kernel."""
        return torch.cat([part(input) for part in self.parts], 1)


def mixed(conv: nn.Conv2d, runs: Sequence[tuple[Window, int]]) -> MixedConv2d:
    """The convolution with a window of its kernel for each run of so many filters, sharing nothing with `conv`."""
    parts, first = [], 0
    for window, count in runs:
        parts.append(windowed(_filters(conv, slice(first, first + count)), window))
        first += count
    return MixedConv2d(parts).train(conv.training)


def _filters(conv: nn.Conv2d, which: slice) -> nn.Conv2d:
    """A convolution with some of the filters, which views the weights of `conv`."""
    weight = conv.weight.detach()[which]
    part = nn.Conv2d(
        conv.in_channels, len(weight), conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None, device="meta", dtype=weight.dtype,
    )  # fmt: skip
    part.weight = nn.Parameter(weight, conv.weight.requires_grad)
    if conv.bias is not None:
        part.bias = nn.Parameter(conv.bias.detach()[which], conv.bias.requires_grad)
    return part
