"""Layers with zeros that stay: a linear layer or convolution whose weight is masked, of the shape that it had.

The mask is nothing but the zeros of the weight, so it is saved, copied, moved and exported with it.
"""

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional


def held(weight: Tensor) -> Tensor:
    """The weight itself, through which no gradient reaches its zeros; so every optimiser leaves them where they are."""
    return weight * (weight != 0)


class MaskedLinear(nn.Linear):
    """An `nn.Linear` whose zero weights stay zero in training; state dict names as before."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return functional.linear(input, held(self.weight) if self.training else self.weight, self.bias)


class MaskedConv2d(nn.Conv2d):
    """An `nn.Conv2d` whose zero weights stay zero in training; state dict names as before."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, outputs, H', W']."""
        weight = held(self.weight) if self.training else self.weight
        return functional.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def masked(layer: nn.Linear | nn.Conv2d, mask: NDArray[np.bool_]) -> MaskedLinear | MaskedConv2d:
    """The layer with zeros where `mask` [outputs, inputs] is False, sharing nothing with `layer`."""
    made = copy.deepcopy(layer)
    made.__class__ = MaskedConv2d if isinstance(layer, nn.Conv2d) else MaskedLinear  # type: ignore[assignment]
    made.weight = nn.Parameter(zeroed(layer.weight.detach(), mask), layer.weight.requires_grad)
    return made  # type: ignore[return-value]


def zeroed(weight: Tensor, mask: NDArray[np.bool_]) -> Tensor:
    """A copy of a weight [outputs, inputs, ...] with zeros where `mask` [outputs, inputs] is False."""
    kept = torch.from_numpy(mask).to(weight.device)
    return torch.where(kept.reshape(*kept.shape, *[1] * (weight.dim() - 2)), weight, 0)
