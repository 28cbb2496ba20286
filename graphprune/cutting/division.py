"""Layers of which each filter reads its group's channels alone: torch's own grouped convolution, and a linear layer.

Of a linear layer a product is made for each group, of its part of the input. One bias is added to all results together,
where ONNX Runtime fuses it with the activation. `patterns/README.md` tells of other forms.
"""

import torch
from torch import nn
from torch.nn import functional


def grouped_linear(
    source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int
) -> torch.Tensor:  # fmt: skip
    """[..., inputs] -> [..., outputs] with a weight [outputs, inputs / groups]."""
    outputs, inputs = weight.shape
    parts = zip(
        source.split_with_sizes([inputs] * groups, -1),
        weight.split_with_sizes([outputs // groups] * groups),
        strict=True,
    )
    joined = torch.cat([functional.linear(part, own) for part, own in parts], -1)
    return joined if bias is None else joined + bias


class GroupedLinear(nn.Linear):
    """An `nn.Linear` in groups; state dict names as before, the weight is [outputs, inputs / groups]."""

    groups: int = 1

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        return grouped_linear(input, self.weight, self.bias, self.groups)

    def extra_repr(self) -> str:
        """The linear layer's own text and the number of groups."""
        return f"{super().extra_repr()}, groups={self.groups}"


def divided(layer: nn.Conv2d | nn.Linear, groups: int) -> nn.Conv2d | GroupedLinear:
    """The layer in groups, with the diagonal blocks of its weight; what was given is changed, or shares its bias."""
    weight = nn.Parameter(block_diagonal(layer.weight.detach(), groups), layer.weight.requires_grad)
    if isinstance(layer, nn.Conv2d):
        layer.weight, layer.groups = weight, groups
        return layer
    small = GroupedLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    small.weight, small.bias, small.groups = weight, layer.bias, groups
    return small.train(layer.training)


def block_diagonal(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """The diagonal blocks of weights [outputs, inputs, ...]: [outputs, inputs / groups, ...]."""
    size = weight.shape[1] // groups
    return torch.cat([part[:, group * size : (group + 1) * size] for group, part in enumerate(weight.chunk(groups))])
