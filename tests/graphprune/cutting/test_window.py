"""A kernel's window as a convolution of its own, against the whole convolution with the other positions zero."""

from itertools import combinations, product

import pytest
import torch
from torch import nn

from graphprune.coupling.operators import Convolution
from graphprune.cutting.window import WindowConv2d, window_padding, windowed

CONVOLUTIONS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 0, "stride": 2},
    {"kernel_size": (3, 5), "padding": (2, 1), "stride": (1, 2), "dilation": (2, 1), "bias": False},
    {"kernel_size": (1, 4), "padding": (0, 3), "groups": 2},
    {"kernel_size": (2, 3), "padding": (3, 0), "dilation": (1, 3), "groups": 4},
]


def windows(kernel: tuple[int, int]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Every rectangle of a kernel."""
    rows, columns = (list(combinations(range(size + 1), 2)) for size in kernel)
    return list(product(rows, columns))


def masked(conv: nn.Conv2d, window: tuple[tuple[int, int], tuple[int, int]], x: torch.Tensor) -> torch.Tensor:
    (top, bottom), (left, right) = window
    mask = torch.zeros(conv.kernel_size, dtype=x.dtype)
    mask[top:bottom, left:right] = 1
    arguments = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return nn.functional.conv2d(x, conv.weight * mask, conv.bias, *arguments)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_every_window_equals_the_masked_kernel(options: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, **options).double()
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64)
    for window in windows(conv.kernel_size):
        small = windowed(conv, window)
        torch.testing.assert_close(small(x), masked(conv, window, x), rtol=0, atol=1e-12)
        assert small.weight.shape[2:] == small.kernel_size == tuple(stop - start for start, stop in window)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 3)])
def test_a_crop_wider_than_the_input(size: tuple[int, int]) -> None:
    """Late layers on small images: a far window reads padding only."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 7, padding=3).double()
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    for window in windows((7, 7))[::5]:
        torch.testing.assert_close(windowed(conv, window)(x), masked(conv, window, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_the_operator_predicts_padding_and_size(options: dict) -> None:
    """`Convolution.window`, which the engine times, against the module."""
    conv = nn.Conv2d(4, 8, **options)
    top, left = conv.padding
    dense = Convolution(
        1, 4, 8, 9, 11, conv.kernel_size, conv.stride, conv.dilation, (top, left, top, left), conv.groups
    )  # fmt: skip
    for window in windows(conv.kernel_size):
        cut = dense.window(*window)
        left, right, top, bottom = window_padding(conv.kernel_size, conv.padding, conv.dilation, window)
        assert cut.padding == (top, left, bottom, right)
        assert cut.output_size == tuple(windowed(conv, window)(torch.zeros(1, 4, 9, 11)).shape[2:]) == dense.output_size
        assert cut.parameters == windowed(conv, window).weight.numel()


def test_a_window_is_a_convolution_with_the_same_names() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).eval()
    conv.weight.requires_grad_(False)
    small = windowed(conv, ((0, 3), (2, 3)))
    assert isinstance(small, WindowConv2d)
    assert isinstance(small, nn.Conv2d)
    assert list(small.state_dict()) == list(conv.state_dict())
    assert (small.weight.requires_grad, small.bias.requires_grad, small.training) == (False, True, False)
    assert small.weight.data_ptr() != conv.weight.data_ptr()
    assert "ends=(-1, 1, 1, 1)" in repr(small)
