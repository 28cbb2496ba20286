"""A folder of images as a task: one subfolder per class, or no classes at all."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from graphprune.errors import InputError
from graphprune.models import IMAGENET_MEAN, IMAGENET_STD
from graphprune.randomness import derive, seeded
from graphprune.tasks.options import Options
from graphprune.tasks.task import Task

IMAGE_SIZE = 224
SLICE = 512
"""Default number of images in the calibration slice and, at most, in the validation slice."""
CROP_SCALE = (0.5, 1.0)
"""Share of an image that a training crop covers: fine-tuning needs milder crops than training from scratch."""

Sample = tuple[str, int | None]


def load(folder: Path, options: Options) -> Task:
    """`folder` holds `train/` and `val/` (and perhaps `test/`), or class folders, or just images (an unlabelled task).

    Raises InputError when there is no image, an image cannot be read, or `val/` has other classes than `train/`.
    """
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        classes, training = _samples(folder / "train")
        return _task(training, _part(folder / "val", classes), folder, options)
    if not any(path.is_dir() for path in folder.iterdir()):
        return _unlabelled(folder, options)
    _, samples = _samples(folder)
    held = options.validation or min(SLICE, max(1, len(samples) // 5))
    if held >= len(samples):
        raise InputError(f"{folder} has {len(samples)} images, too few to validate on {held} of them")
    samples = _shuffled(samples, options.seed)
    return _task(samples[held:], samples[:held], folder, options)


def _shuffled(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """In seeded order: files are listed class by class, and slices are cut from the front."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    return [samples[i] for i in order]


def _task(training: Sequence[Sample], validation: Sequence[Sample], folder: Path, options: Options) -> Task:
    calibrating = _shuffled(training, options.seed)[: options.calibration or SLICE]
    validating = _shuffled(validation, options.seed)[: options.validation]
    calibration = tuple(inputs for inputs, _ in _batches(calibrating, options))
    has_test = (folder / "train").is_dir() and (folder / "test").is_dir()
    classes = {Path(path).parent.name for path, _ in training} if has_test else set()
    return Task(
        name="imagefolder",
        example_inputs=(calibration[0][torch.tensor([0, -1])],),
        calibration=calibration,
        validation=tuple(_batches(validating, options)),
        train=lambda seed: _Epoch(training, options, seed),
        test=(lambda: _batches(_part(folder / "test", sorted(classes)), options)) if has_test else None,
        mean=options.mean or IMAGENET_MEAN,
        std=options.std or IMAGENET_STD,
    )


def _samples(folder: Path) -> tuple[list[str], list[Sample]]:
    try:
        dataset = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise InputError(f"{folder} cannot be used: {error}".splitlines()[0]) from None
    return dataset.classes, list(dataset.samples)


def _part(folder: Path, classes: Sequence[str]) -> list[Sample]:
    found, samples = _samples(folder)
    if list(found) != list(classes):
        raise InputError(f"{folder} has other classes than the training images: {', '.join(found[:5])}")
    return samples


def _unlabelled(folder: Path, options: Options) -> Task:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMG_EXTENSIONS)
    if len(paths) < 2:
        raise InputError(f"{folder} holds {len(paths)} images; an unlabelled task needs at least two")
    validating = options.validation or min(SLICE, len(paths) // 2)
    calibrating = options.calibration or min(SLICE, len(paths) - validating)
    samples = _shuffled([(str(path), None) for path in paths], options.seed)[: calibrating + validating]
    images = torch.cat([inputs for inputs, _ in _batches(samples, options)])
    task = Task.unlabelled(images, options.batch_size, calibrating, name="imagefolder")
    return replace(task, mean=options.mean or IMAGENET_MEAN, std=options.std or IMAGENET_STD)


def _batches(samples: Sequence[Sample], options: Options) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All samples in order, resized and cropped in the centre."""
    transform = _transform(options, training=False)
    for start in range(0, len(samples), options.batch_size):
        yield _batch(samples[start : start + options.batch_size], transform)


@dataclass(frozen=True)
class _Epoch:
    """One shuffled, augmented pass over the files."""

    samples: Sequence[Sample]
    options: Options
    seed: int

    def __len__(self) -> int:
        return max(1, len(self.samples) // self.options.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        samples = _shuffled(self.samples, self.seed)
        transform, size = _transform(self.options, training=True), self.options.batch_size
        for batch in range(len(self)):
            with seeded(derive(self.seed, batch)):  # timm's transforms draw from the global generators
                made = _batch(samples[batch * size : (batch + 1) * size], transform)
            yield made


def _transform(options: Options, training: bool) -> Any:
    size = options.image_size or IMAGE_SIZE
    return create_transform(
        input_size=(3, size, size),
        is_training=training,
        scale=CROP_SCALE,
        interpolation="bicubic",
        crop_pct=1.0,
        mean=options.mean or IMAGENET_MEAN,
        std=options.std or IMAGENET_STD,
    )


def _batch(samples: Sequence[Sample], transform: Any) -> tuple[Tensor, Tensor | None]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter lock
        opened = list(pool.map(_open, [path for path, _ in samples]))
    labels = [label for _, label in samples if label is not None]
    return torch.stack([transform(image) for image in opened]), torch.tensor(labels) if labels else None


def _open(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image: {error}") from None
