"""The networks of the headline table are what its page says they are."""

import pytest
import torch
import zoo
from torch import nn


def sizes(name: str) -> int:
    return sum(value.numel() for value in zoo.build(name).parameters())


@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_every_network_classifies_small_images(name: str):
    with torch.no_grad():
        assert zoo.build(name).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_siblings_are_smaller():
    for name, network in zoo.NETWORKS.items():
        for sibling in network.siblings:
            assert sizes(sibling) < sizes(name)


def test_the_transformer_has_few_parameters_and_small_patches():
    model = zoo.build("vit")
    assert sizes("vit") <= 2.9e6
    assert model.patch_embed.patch_size == (4, 4)


def test_mobilenet_keeps_sixteen_positions():
    model = zoo.build("mobilenetv2").eval()
    with torch.no_grad():
        assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape[-2:] == (4, 4)
    strides = [module.stride for module in model.modules() if isinstance(module, nn.Conv2d) and module.stride != (1, 1)]
    assert strides == [(2, 2)] * 3


def test_weights_are_found_in_the_first_folder_that_has_them(tmp_path):
    for folder in ("b", "c"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "cifar10_vit.safetensors").touch()
    folders = [tmp_path / name for name in ("a", "b", "c")]
    assert zoo.weights_of("vit", folders).parent.name == "b"
    with pytest.raises(SystemExit, match="no trained resnet20"):
        zoo.weights_of("resnet20", folders)
