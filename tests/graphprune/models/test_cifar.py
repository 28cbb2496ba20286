"""The CIFAR networks against published sizes, and the parameter-free shortcut against a convolution."""

import pytest
import torch
from torch.nn import functional

from graphprune.models.cifar import NETWORKS, Shortcut


def parameters_of_resnet(depth: int) -> int:
    """He et al. 2016: 6n+2 layers, 3x3 convolutions without bias, batch norm's two values, one classifier."""
    blocks = (depth - 2) // 6
    count = 3 * 16 * 9 + 2 * 16
    before = 16
    for width in (16, 32, 64):
        for _ in range(blocks):
            count += (before + width) * width * 9 + 4 * width
            before = width
    return count + 64 * 10 + 10


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_resnet_sizes(depth: int) -> None:
    model = NETWORKS[f"resnet{depth}"]()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters_of_resnet(depth)


def test_resnet20_is_the_published_size() -> None:
    assert parameters_of_resnet(20) == 269_722  # "0.27M" in table 6 of the paper


def test_resnet20_multiply_adds() -> None:
    """40.55 M multiply-adds in convolutions: 0.4424 M in the first, 18 layers of 2.36 M less the halved inputs."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        NETWORKS["resnet20"]().eval()(torch.zeros(1, 3, 32, 32))
    stage = 16 * 16 * 9 * 32 * 32
    expected = 3 * 16 * 9 * 32 * 32 + 6 * stage + (stage // 2 + 5 * stage) * 2 + 64 * 10
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 8), (3, 8), (4, 4)])
def test_shortcut_equals_a_convolution(inputs: int, outputs: int) -> None:
    """Option A is a 1x1 convolution of stride 2 whose weight is an identity between zero rows."""
    images = torch.randn(2, inputs, 7, 8)
    weight = torch.zeros(outputs, inputs, 1, 1)
    offset = (outputs - inputs) // 2
    weight[offset : offset + inputs, :, 0, 0] = torch.eye(inputs)
    torch.testing.assert_close(Shortcut(inputs, outputs)(images), functional.conv2d(images, weight, stride=2))


@pytest.mark.parametrize("name", ["resnet20", "vgg11", "vgg16"])
def test_classes_and_channels(name: str) -> None:
    model = NETWORKS[name](num_classes=7, in_channels=1).eval()
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
