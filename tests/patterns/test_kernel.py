"""The small kernels: where they lie, and that they compute what the masked whole kernel computes."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from graphprune.coupling.graph import Site
from graphprune.coupling.operators import Convolution
from graphprune.cutting.window import windowed
from graphprune.errors import InputError
from graphprune.patterns.kernel import Kernel

PICTURES = {
    "3x2 left": "xx. xx. xx.",
    "3x2 right": ".xx .xx .xx",
    "2x3 top": "xxx xxx ...",
    "2x3 bottom": "... xxx xxx",
    "2x2 top left": "xx. xx. ...",
    "2x2 top right": ".xx .xx ...",
    "2x2 bottom left": "... xx. xx.",
    "2x2 bottom right": "... .xx .xx",
    "3x1 left": "x.. x.. x..",
    "3x1 centre": ".x. .x. .x.",
    "3x1 right": "..x ..x ..x",
    "1x3 top": "xxx ... ...",
    "1x3 middle": "... xxx ...",
    "1x3 bottom": "... ... xxx",
    "1x1 top left": "x.. ... ...",
    "1x1 top centre": ".x. ... ...",
    "1x1 top right": "..x ... ...",
    "1x1 middle left": "... x.. ...",
    "1x1 centre": "... .x. ...",
    "1x1 middle right": "... ..x ...",
    "1x1 bottom left": "... ... x..",
    "1x1 bottom centre": "... ... .x.",
    "1x1 bottom right": "... ... ..x",
}
LARGER = {
    "3x3 centre": "..... .xxx. .xxx. .xxx. .....",
    "5x1 centre": "..x.. ..x.. ..x.. ..x.. ..x..",
    "1x5 middle": "..... ..... xxxxx ..... .....",
}


def site(rows: int, columns: int) -> Site:
    return Site("conv/kernel", "kernel", rows * columns, ("conv",), "conv", kernel=(rows, columns))


def positions(picture: str) -> tuple[int, ...]:
    return tuple(number for number, mark in enumerate(picture.replace(" ", "")) if mark == "x")


def test_every_window_of_three_by_three() -> None:
    assert {level.name: level.keep for level in Kernel().levels(site(3, 3), 16)} == {
        name: positions(picture) for name, picture in PICTURES.items()
    }


def test_larger_kernels_keep_the_centre() -> None:
    assert {level.name: level.keep for level in Kernel().levels(site(5, 5), 16)} == {
        name: positions(picture) for name, picture in LARGER.items()
    }
    wide = {level.name: level.keep for level in Kernel().levels(site(5, 7), 16)}
    assert wide["3x3 centre"] == tuple(row * 7 + column for row in (1, 2, 3) for column in (2, 3, 4))
    assert wide["5x1 centre"] == (3, 10, 17, 24, 31)
    assert wide["1x7 middle"] == tuple(range(14, 21))


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1), (2, 2), (4, 4), (3, 5), (5, 6)])
def test_other_kernels_have_no_level(kernel: tuple[int, int]) -> None:
    assert Kernel().levels(site(*kernel), 16) == ()


@pytest.mark.parametrize("keep", [(0, 8), (0, 1, 3), (0, 1, 2, 3), (0, 2), (1, 3, 4, 5, 7), (3, 4, 6, 8)])
def test_what_is_no_rectangle_is_refused(keep: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="the kept positions of 'conv/kernel' are not a rectangle"):
        Kernel().rewrite(site(3, 3), keep)


def test_every_rectangle_becomes_its_window() -> None:
    for top, left in product(range(3), range(5)):
        for bottom, right in product(range(top + 1, 4), range(left + 1, 6)):
            keep = tuple(row * 5 + column for row in range(top, bottom) for column in range(left, right))
            whole = len(keep) == 15
            assert Kernel().rewrite(site(3, 5), keep).windows == (
                {} if whole else {"conv": ((top, bottom), (left, right))}
            )


GRID = list(product([(3, 3), (5, 5)], [1, 2], [1, 2], [0, 1, "same size"], [(1, 1), (4, 1), (9, 8), (8, 11)]))


def convolution(kernel: tuple[int, int], stride: int, dilation: int, padding: int | str, groups: int = 1) -> nn.Conv2d:
    torch.manual_seed(kernel[0] + stride)
    ends = tuple(dilation * (size - 1) // 2 for size in kernel) if isinstance(padding, str) else (padding, padding)
    conv = nn.Conv2d(4, 6, kernel, stride, ends, dilation, groups, bias=groups == 1)
    return conv.double()


def masked(conv: nn.Conv2d, keep: tuple[int, ...], x: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(conv.weight[0, 0].numel(), dtype=torch.float64)
    mask[list(keep)] = 1
    weight = conv.weight * mask.reshape(conv.kernel_size)
    return functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_small_kernel_computes_what_the_masked_one_does(groups: int) -> None:
    checked = 0
    for kernel, stride, dilation, padding, size in GRID:
        conv = convolution(kernel, stride, dilation, padding, groups)
        x = torch.randn(2, 4, *size, dtype=torch.float64)
        if any(side + 2 * p < dilation * (k - 1) + 1 for side, p, k in zip(size, conv.padding, kernel, strict=True)):
            continue  # the whole kernel does not fit either
        for level in Kernel().levels(site(*kernel), 16):
            window = Kernel().rewrite(site(*kernel), level.keep).windows["conv"]
            small = windowed(conv, window)
            assert small.weight[0, 0].numel() == len(level.keep)
            with torch.no_grad():
                assert torch.allclose(small(x), masked(conv, level.keep, x), rtol=0, atol=1e-12), (level, conv, size)
            checked += 1
    assert checked > 400


def test_the_operator_of_a_window_has_its_size_and_work() -> None:
    for kernel, stride, dilation, padding, size in GRID:
        conv = convolution(kernel, stride, dilation, padding)
        height, width = conv.padding
        operator = Convolution(
            1, 4, 6, *size, kernel, conv.stride, conv.dilation, (height, width, height, width)
        )  # fmt: skip
        if min(operator.output_size) < 1:
            continue
        for level in Kernel().levels(site(*kernel), 16):
            window = Kernel().rewrite(site(*kernel), level.keep).windows["conv"]
            cut, small = operator.window(*window), windowed(conv, window)
            with torch.no_grad():
                shape = small(torch.zeros(1, 4, *size, dtype=torch.float64)).shape[2:]
            left, right, top, bottom = small.ends
            assert cut.output_size == operator.output_size == tuple(shape)
            assert cut.padding == (top, left, bottom, right)
            assert cut.flops * np.prod(kernel) == operator.flops * len(level.keep)
