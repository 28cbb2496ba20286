"""Augmentation and epochs against brute force."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graphprune.tasks.images import Images, crop_and_flip, mirror, nudge, shift


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def all_shifts(image: Tensor, padding: int) -> list[Tensor]:
    padded = functional.pad(image, (padding,) * 4)
    size = image.shape[-1]
    steps = range(2 * padding + 1)
    return [padded[:, down : down + size, right : right + size] for down in steps for right in steps]


def test_shift_is_one_of_all_crops_and_each_occurs() -> None:
    image = torch.randint(1, 256, (3, 8, 8), dtype=torch.uint8, generator=generator())
    crops = all_shifts(image, 2)
    moved = nudge(image.expand(1000, -1, -1, -1), generator())
    found = [[index for index, crop in enumerate(crops) if torch.equal(crop, one)] for one in moved]
    assert all(len(indices) == 1 for indices in found)
    assert {indices[0] for indices in found} == set(range(25))


def test_shift_does_not_mix_images() -> None:
    images = torch.arange(1, 6, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6)
    moved = shift(images, generator(), padding=2)
    for number, image in enumerate(moved, start=1):
        assert set(image.unique().tolist()) <= {0, number}


def test_mirror_flips_about_half_and_nothing_else() -> None:
    image = torch.rand(3, 5, 5)
    mirrored = mirror(image.expand(400, -1, -1, -1), generator())
    flipped = [torch.equal(one, image.flip(2)) for one in mirrored]
    assert all(flip or torch.equal(one, image) for one, flip in zip(mirrored, flipped, strict=True))
    assert 150 < sum(flipped) < 250


def test_normalised_against_numpy() -> None:
    pixels = torch.randint(0, 256, (4, 3, 6, 6), dtype=torch.uint8, generator=generator())
    images = Images(pixels, torch.arange(4), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 6)
    inputs, labels = next(images.batches(3))
    mean, std = (np.array(values).reshape(1, 3, 1, 1) for values in (images.mean, images.std))
    np.testing.assert_allclose(inputs, (pixels[:3].numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    assert labels is not None
    assert labels.tolist() == [0, 1, 2]


def test_resized_to_the_input_size() -> None:
    images = Images(torch.full((2, 3, 8, 8), 51, dtype=torch.uint8), None, (0.0,) * 3, (1.0,) * 3, 20)
    inputs, labels = next(images.batches(2))
    torch.testing.assert_close(inputs, torch.full((2, 3, 20, 20), 0.2))
    assert labels is None


def test_an_epoch_holds_each_image_once_with_its_label() -> None:
    pixels = torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    images = Images(pixels, torch.arange(10), (0.0,) * 3, (1 / 255,) * 3, 4)
    epoch = images.epoch(3, 5, lambda batch, _: batch)
    seen = []
    for inputs, labels in epoch:
        assert labels is not None
        torch.testing.assert_close(inputs[:, 0, 0, 0], labels.float())
        seen += labels.tolist()
    assert sorted(seen) == list(range(10))
    assert len(epoch) == 2


def test_an_epoch_repeats_with_its_seed_and_changes_with_another() -> None:
    images = Images(
        torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8), torch.arange(16), (0.5,) * 3, (1.0,) * 3, 8
    )
    first, again, other = (
        torch.cat([inputs for inputs, _ in images.epoch(seed, 8, crop_and_flip)]) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
