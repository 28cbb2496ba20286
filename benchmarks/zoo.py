"""The CIFAR-10 networks that `train.py` trains and `headline.py` prunes, and how each is trained from scratch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from graphprune import models
from graphprune.models import cifar
from graphprune.training.recipe import Recipe

TRAINED = Path(__file__).parent / "results" / "weights"
"""Where `train.py` keeps trained weights, in half precision, with their logs."""
VIT = "timm:vit_tiny_patch16_224?img_size=32&patch_size=4&num_classes=10&class_token=false&global_pool=avg"


@dataclass(frozen=True)
class Network:
    """A network: its spec, the recipe to train it, and the smaller networks that a user could take instead.

    `randaugment` and `mixing` (the share of batches that Mixup or CutMix blends) are used where they help; networks as
    small as the ResNets underfit with them.
    """

    spec: str
    recipe: Recipe
    randaugment: bool = False
    mixing: float = 0.0
    siblings: tuple[str, ...] = ()


def _sgd(epochs: int, label_smoothing: float = 0.0) -> Recipe:
    return Recipe(epochs, lr=0.1, weight_decay=5e-4, optimizer="sgd", label_smoothing=label_smoothing, ema_decay=0.999)


def _adamw(epochs: int) -> Recipe:
    return Recipe(epochs, lr=1e-3, weight_decay=0.05, optimizer="adamw", label_smoothing=0.1, ema_decay=0.9995)


NETWORKS = {
    "resnet56": Network("cifar:resnet56", _sgd(100), siblings=("resnet20",)),
    "resnet20": Network("cifar:resnet20", _sgd(100), siblings=("resnet14",)),
    "resnet14": Network("zoo:resnet?blocks=2", _sgd(30)),
    "resnet8": Network("zoo:resnet?blocks=1", _sgd(100)),
    "vgg16_bn": Network("cifar:vgg16", _sgd(100, 0.1), mixing=0.5, siblings=("vgg11_bn",)),
    "vgg11_bn": Network("cifar:vgg11", _sgd(100, 0.1), mixing=0.5),
    "mobilenetv2": Network("zoo:mobilenetv2", _sgd(96, 0.1), siblings=("mobilenetv2_050",)),
    "mobilenetv2_050": Network("zoo:mobilenetv2?width=50", _sgd(96, 0.1)),
    "vit": Network(f"{VIT}&depth=6", _adamw(140), randaugment=True, mixing=0.5, siblings=("vit_depth3",)),
    "vit_depth3": Network(f"{VIT}&depth=3", _adamw(140), randaugment=True, mixing=0.5),
}
"""Name -> network. `zoo:` specs are the functions below."""


def resnet(blocks: int) -> nn.Module:
    """A CIFAR ResNet of 6 * blocks + 2 layers: shallower than those that graphprune knows by name."""
    return cifar.ResNet(blocks)


def mobilenetv2(width: int = 100) -> nn.Module:
    """timm's MobileNetV2 of a width in per cent (35, 50, 75, 100, ...) for 32x32 images.

    The first two of its five strides become 1, so that 4x4 positions are left at the end, as in the usual CIFAR
    version.
    """
    model = timm.create_model(f"mobilenetv2_{width:03d}", num_classes=10)
    for convolution in (model.conv_stem, model.blocks[1][0].conv_dw):
        convolution.stride = (1, 1)
    return model


def build(name: str, weights: Path | None = None) -> nn.Module:
    """A network of the table, with random weights or those of a file."""
    return models.create(NETWORKS[name].spec, weights)


def weights_of(name: str, folders: Sequence[Path]) -> Path:
    """The first file `cifar10_<name>.safetensors` in some folders. Ends the script where there is none."""
    if (file := trained_weights(name, folders)) is None:
        raise SystemExit(f"no trained {name} in {', '.join(map(str, folders))}: run `train.py --model {name}` first")
    return file


def trained_weights(name: str, folders: Sequence[Path]) -> Path | None:
    """The same file, None where there is none."""
    files = (folder / f"cifar10_{name}.safetensors" for folder in folders)
    return next((file for file in files if file.exists()), None)


def settings(name: str) -> dict[str, Any]:
    """How a network is trained, for its log."""
    own = NETWORKS[name]
    return {"spec": own.spec, "randaugment": own.randaugment, "mixing": own.mixing}
