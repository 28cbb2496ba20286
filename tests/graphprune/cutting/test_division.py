"""Layers in groups against dense layers with block-diagonal weights."""

import pytest
import torch
from torch import nn

from graphprune.coupling.operators import Linear
from graphprune.cutting.division import GroupedLinear, block_diagonal, divided, grouped_linear

MASK = torch.block_diag(*[torch.ones(4, 3)] * 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)])
def test_a_linear_layer_in_groups_is_the_one_with_the_block_diagonal_weight(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 8, bias).double(), torch.randn(shape, dtype=torch.float64)
    expected = nn.functional.linear(x, linear.weight * MASK, linear.bias)
    small = divided(linear, 2)
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grouped_linear(x, small.weight, small.bias, 2), expected, rtol=0, atol=1e-12)
    assert Linear(5, 6, 8, groups=2).parameters == small.weight.numel() == 24


def test_a_linear_layer_in_groups_has_the_names_and_the_modes_of_the_whole_one() -> None:
    linear = nn.Linear(6, 8).eval()
    linear.weight.requires_grad_(False)
    small = divided(linear, 2)
    assert isinstance(small, GroupedLinear)
    assert list(small.state_dict()) == list(linear.state_dict())
    assert (small.in_features, small.out_features, small.groups, small.training) == (6, 8, 2, False)
    assert (small.weight.requires_grad, small.bias.requires_grad) == (False, True)
    assert "in_features=6, out_features=8, bias=True, groups=2" in repr(small)


def test_a_convolution_in_groups_is_the_one_with_the_block_diagonal_weight() -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 8, 3).double(), torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = nn.functional.conv2d(x, conv.weight * MASK[:, :, None, None], conv.bias)
    torch.testing.assert_close(divided(conv, 2)(x), expected, rtol=0, atol=1e-12)


def test_diagonal_blocks() -> None:
    weight = torch.arange(8.0).reshape(4, 2)
    assert block_diagonal(weight, 2).tolist() == [[0], [2], [5], [7]]
