"""Images as tensors in memory: normalised per batch, augmented per batch, one seeded epoch at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)
class Images:
    """uint8 `pixels` [N, C, H, W] with their `labels` [N] (None: unlabelled), and how they become inputs.

    An input is (pixel / 255 - mean) / std per channel, resized bilinearly to `size` (height and width) if it differs.
    """

    pixels: Tensor
    labels: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int

    def __len__(self) -> int:
        return len(self.pixels)

    def select(self, indices: Tensor) -> Self:
        """The images at these indices."""
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, pixels=self.pixels[indices], labels=labels)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32 [N, C, size, size]."""
        mean, std = (255 * torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        inputs = pixels.float().sub_(mean).div_(std)
        if inputs.shape[-2:] == (self.size, self.size):
            return inputs
        return functional.interpolate(inputs, size=self.size, mode="bilinear", antialias=True)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All images in order, normalised, not augmented."""
        for start in range(0, len(self), batch_size):
            part = slice(start, start + batch_size)
            yield self.normalised(self.pixels[part]), None if self.labels is None else self.labels[part]

    def epoch(self, seed: int, batch_size: int, augmentation: Augmentation) -> "Epoch":
        """One shuffled, augmented epoch."""
        return Epoch(self.pixels, self.labels, batch_size, seed, augmentation, self.normalised)


@dataclass(frozen=True, eq=False)
class Epoch:
    """One pass over the images in seeded order; a last incomplete batch is left out where there is a complete one."""

    images: Tensor
    labels: Tensor | None
    batch_size: int
    seed: int
    augmentation: Augmentation
    finish: Callable[[Tensor], Tensor] = lambda images: images
    """Applied to an augmented batch: normalisation, for images that are kept as pixels."""

    def __len__(self) -> int:
        return max(1, len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.images), generator=generator)
        for batch in range(len(self)):
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            images = self.finish(self.augmentation(self.images[chosen], generator))
            yield images, None if self.labels is None else self.labels[chosen]


def shift(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Each image [C, H, W] of the batch moved by up to `padding` pixels along both axes; what comes in is zero."""
    height, width = images.shape[-2:]
    padded = functional.pad(images, (padding,) * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(0, 2 * padding + 1, (2, len(images)), generator=generator)
    return windows[torch.arange(len(images)), :, down, right]


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of the batch flipped left to right with probability one half."""
    flipped = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flipped.view(-1, 1, 1, 1).to(images.device), images.flip(3), images)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """The usual augmentation of small photographs: pad by 4 and crop, then mirror."""
    return mirror(shift(images, generator), generator)


def nudge(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts by up to 2 pixels, for images whose meaning a mirror would change, such as digits."""
    return shift(images, generator, padding=2)
