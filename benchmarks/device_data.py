"""CIFAR-10 on the device that trains: all images stay there as bytes, and a whole epoch is augmented there at once.

torchvision's transforms draw once for a batch, so cropping and flipping, which want a draw for each image, are written
here. RandAugment gets the epoch in parts, each spread over all of its batches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import v2

from graphprune.tasks.images import Epoch
from graphprune.tasks.task import Task

PADDING = 4
CLASSES = 10
TOGETHER = 512
"""Images of an epoch, at most, that share the operations which RandAugment draws: a few in each batch. Parts of a batch
would launch so many small kernels that a GPU waits for them."""
OPERATIONS, MAGNITUDE = 2, 6
VALIDATED = 1000
"""Validation images in a batch there."""


def device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_device() -> None:
    """Let a GPU multiply in TF32."""
    torch.set_float32_matmul_precision("high")


def on_device(task: Task, images: int | None = None, randaugment: bool = False, mixing: float = 0.0) -> Task:
    """The same task on the device: validation batches, and the training images (at most `images`), augmented there."""
    assert task.train is not None
    epoch = task.train(0)
    assert isinstance(epoch, Epoch)
    assert epoch.labels is not None
    pixels, labels = epoch.images[:images].to(device()), epoch.labels[:images].to(device())
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(task.mean), list(task.std))])
    augment = v2.RandAugment(OPERATIONS, MAGNITUDE, fill=[255 * value for value in task.mean]) if randaugment else None
    blend = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)])
    mix = v2.RandomApply([blend], p=mixing) if mixing else None
    judged = (torch.cat(parts).to(device()).split(VALIDATED) for parts in zip(*task.validation, strict=True))
    return replace(
        task,
        train=lambda seed: DeviceEpoch(pixels, labels, epoch.batch_size, seed, normalise, augment, mix),
        validation=tuple(zip(*judged, strict=True)),
    )


@dataclass(frozen=True, eq=False)
class DeviceEpoch:
    """One shuffled, augmented pass over uint8 `pixels` [N, C, H, W]; a last incomplete batch is left out.

    Order, crops and flips follow from `seed`; `augment` and `mix` draw from torch's global generator, which the
    training loop seeds for each epoch. Mixed batches have targets [N, classes] in the place of labels [N].
    """

    pixels: Tensor
    labels: Tensor
    batch_size: int
    seed: int
    normalise: Any
    augment: Any = None
    mix: Any = None

    def __len__(self) -> int:
        return max(1, len(self.pixels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed)
        count, place = len(self.pixels), self.pixels.device
        order = torch.randperm(count, generator=generator).to(place)
        corners = torch.randint(0, 2 * PADDING + 1, (2, count), generator=generator).to(place)
        flipped = (torch.rand(count, generator=generator) < 0.5).to(place)
        images, labels = flip(crop(self.pixels[order], corners), flipped), self.labels[order]
        if self.augment is not None:
            parts = math.ceil(count / TOGETHER)
            for part in range(parts):
                images[part::parts] = self.augment(images[part::parts])
        for batch in range(len(self)):
            chosen = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            sample = self.normalise(images[chosen]), labels[chosen]
            yield sample if self.mix is None else self.mix(*sample)


def crop(images: Tensor, corners: Tensor) -> Tensor:
    """Images [N, C, H, W], padded with zeros by PADDING, from their own corners [2, N] (down, right) on."""
    height, width = images.shape[-2:]
    windows = functional.pad(images, (PADDING,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, corners[0], corners[1]]


def flip(images: Tensor, flipped: Tensor) -> Tensor:
    """Images [N, C, H, W], those where `flipped` [N] says so from left to right."""
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
