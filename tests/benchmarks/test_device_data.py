"""Augmentation on the device: one draw for each image, the same for the same seed."""

import torch
from device_data import PADDING, TOGETHER, DeviceEpoch, crop, flip, on_device
from torch.nn import functional

from graphprune.randomness import seeded
from graphprune.tasks.images import Images, crop_and_flip
from graphprune.tasks.task import Task


def pixels(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def task(count: int) -> Task:
    images = Images(pixels(count), torch.arange(count) % 10, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 32)
    inputs, targets = next(images.batches(4))
    return Task(
        "some", (inputs[:2],), (inputs,), ((inputs, targets),), lambda seed: images.epoch(seed, 8, crop_and_flip),
        mean=images.mean, std=images.std,
    )  # fmt: skip


def test_each_image_is_cropped_at_its_own_corner():
    images, corners = pixels(3), torch.tensor([[PADDING, 0, 7], [PADDING, 2, 1]])
    wide = functional.pad(images, (PADDING,) * 4)
    found = crop(images, corners)
    assert torch.equal(found[0], images[0])
    for number, (down, right) in enumerate(corners.T.tolist()):
        assert torch.equal(found[number], wide[number, :, down : down + 32, right : right + 32])


def test_only_chosen_images_are_flipped():
    images = pixels(3)
    found = flip(images, torch.tensor([True, False, True]))
    assert torch.equal(found[1], images[1])
    assert torch.equal(found[2], images[2].flip(2))


def test_an_epoch_shows_each_image_once_and_is_seeded():
    images, labels = pixels(16), torch.arange(16)

    def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(DeviceEpoch(images, labels, 4, seed, normalise=lambda batch: batch))

    first, again, other = batches(1), batches(1), batches(2)
    assert sorted(torch.cat([targets for _, targets in first]).tolist()) == list(range(16))
    assert all(torch.equal(a, b) for one, two in zip(first, again, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(first[0][1], other[0][1])


def test_a_task_on_the_device_is_normalised_augmented_and_mixed():
    placed = on_device(task(20), images=16, randaugment=True, mixing=1.0)
    with seeded(0):
        batches = list(placed.train(0))
    assert [len(inputs) for inputs, _ in batches] == [8, 8]
    for inputs, targets in batches:
        assert inputs.dtype == torch.float32
        assert inputs.min() >= -0.5 / 0.2 - 1e-4
        assert inputs.max() <= 0.7 / 0.2 + 1e-4
        assert torch.allclose(targets.sum(1), torch.ones(8))


def test_randaugment_draws_for_parts_of_an_epoch_that_are_spread_over_its_batches():
    labels, drawn = torch.arange(TOGETHER + 6), []

    def augment(images: torch.Tensor) -> torch.Tensor:
        drawn.append(len(images))
        return torch.full_like(images, len(drawn))

    blank = torch.zeros(len(labels), 3, 32, 32, dtype=torch.uint8)
    batches = list(DeviceEpoch(blank, labels, 37, 0, normalise=lambda batch: batch, augment=augment))
    assert drawn == [len(labels) // 2] * 2
    for images, _ in batches:
        assert set(images[:, 0, 0, 0].tolist()) == {1, 2}


def test_validation_on_the_device_is_the_same_images():
    own = task(20)
    placed = on_device(own)
    for found, meant in zip(*(zip(*one.validation, strict=True) for one in (placed, own)), strict=True):
        assert torch.equal(torch.cat(found).cpu(), torch.cat(meant))
