"""The built-in tasks by name: `digits`, `cifar10:DIR`, `imagefolder:DIR`, `images:FILE`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.datasets import CIFAR10

from graphprune.errors import InputError
from graphprune.models import IMAGENET_MEAN, IMAGENET_STD
from graphprune.tasks import imagefolder
from graphprune.tasks.images import Augmentation, Images, crop_and_flip, nudge
from graphprune.tasks.options import Options
from graphprune.tasks.task import Task

TILE, TILES_PER_ROW = 32, 100
DIGITS_TEST = 360
DIGITS_SCALE = (0.5, 0.5, 0.5)


def load(name: str, options: Options) -> Task:
    """The task that `name` says. Raises InputError when it is unknown or its folder does not hold such data."""
    kind, _, folder = name.partition(":")
    loaders: dict[str, Callable[[Path, Options], Task]] = {"cifar10": _cifar10, "imagefolder": imagefolder.load}
    if name == "digits":
        return _digits(options)
    if kind not in (*loaders, "images") or not folder:
        raise InputError(f"unknown task {name!r}: expected digits, cifar10:DIR, imagefolder:DIR or images:FILE")
    path = Path(folder).expanduser()
    if kind == "images":
        return _images(path, options)
    if not path.is_dir():
        raise InputError(f"there is no folder {path} for task {kind!r}")
    return loaders[kind](path, options)


@dataclass(frozen=True, eq=False)
class _Split:
    """A task's images before slices are cut, how an epoch augments them, and the default sizes of the slices."""

    name: str
    training: Images
    test: Callable[[], Images]
    augmentation: Augmentation
    calibration: int
    validation: int

    def cut(self, options: Options) -> Task:
        """Calibration and validation slices out of the training images; what validates is never trained on."""
        total, held = len(self.training), options.validation or self.validation
        if held >= total:
            raise InputError(f"task {self.name!r}: {total} training images are too few to validate on {held} of them")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(options.seed))
        trained = self.training.select(order[held:])
        calibrating = trained.select(torch.arange(min(len(trained), options.calibration or self.calibration)))
        calibration = tuple(inputs for inputs, _ in calibrating.batches(options.batch_size))
        return Task(
            name=self.name,
            example_inputs=(calibration[0][torch.tensor([0, -1])],),
            calibration=calibration,
            validation=tuple(self.training.select(order[:held]).batches(options.batch_size)),
            train=lambda seed: trained.epoch(seed, options.batch_size, self.augmentation),
            test=lambda: self.test().batches(options.batch_size),
            mean=trained.mean,
            std=trained.std,
        )


def _digits(options: Options) -> Task:
    """scikit-learn's 1,797 scanned digits (8x8, grey), upsampled bilinearly to 32x32, as three equal channels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(digits.images).float().unsqueeze(1) * (255 / digits.images.max())
    large = functional.interpolate(grey, size=32, mode="bilinear").round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    size = options.image_size or 32
    everything = Images(
        large.repeat(1, 3, 1, 1), labels, options.mean or DIGITS_SCALE, options.std or DIGITS_SCALE, size
    )
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    training, test = everything.select(order[DIGITS_TEST:]), order[:DIGITS_TEST]
    return _Split("digits", training, lambda: everything.select(test), nudge, 512, 300).cut(options)


def _cifar10(folder: Path, options: Options) -> Task:
    def test() -> Images:
        return read_cifar10(folder, options, train=False)

    return _Split("cifar10", read_cifar10(folder, options, train=True), test, crop_and_flip, 1024, 2000).cut(options)


def _images(file: Path, options: Options) -> Task:
    """Images alone, as a network gets them: float [N, C, H, W], normalised. Half validate, unless told how many."""
    try:
        images = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read images from {file}: {error}") from None
    if not isinstance(images, np.ndarray):
        raise InputError(f"{file} holds several arrays: save one of them with numpy.save")
    if not images.ndim or len(images) < 2:
        raise InputError(f"{file} holds no images [N, C, H, W]")
    shuffled = images[np.random.default_rng(options.seed).permutation(len(images))]
    held = options.validation or len(images) // 2
    return Task.unlabelled(shuffled, options.batch_size, len(images) - held, "images")


def read_cifar10(folder: Path, options: Options, train: bool) -> Images:
    """All training or all test images. Raises InputError when the folder has neither of the two layouts."""
    read = _read_sheets if (folder / "train_labels.npy").is_file() else _read_torchvision
    pixels, labels = read(folder, train)
    size = options.image_size or TILE
    return Images(pixels, labels, options.mean or IMAGENET_MEAN, options.std or IMAGENET_STD, size)


def _read_torchvision(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """torchvision's layout: `folder` is, or holds, `cifar-10-batches-py` (torchvision checks its MD5 sums)."""
    root = folder.parent if folder.name == CIFAR10.base_folder else folder
    try:
        dataset = CIFAR10(str(root), train=train, download=False)
    except RuntimeError:
        raise InputError(
            f"{folder} holds neither {CIFAR10.base_folder} nor WebP sheets with train_labels.npy"
        ) from None
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def _read_sheets(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Sheets of 32x32 RGB tiles, 100 per row, `train_*.webp` or `test.webp`, with `*_labels.npy`, uint8.

    The sheets hold as many tiles as there are labels; each sheet but the last is full, the last row may end unused.
    """
    part = "train" if train else "test"
    paths = sorted(folder.glob("train_*.webp")) if train else [folder / "test.webp"]
    try:
        labels = torch.from_numpy(np.load(folder / f"{part}_labels.npy", allow_pickle=False)).long()
        pixels = torch.cat([_tiles(path) for path in paths])
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} has no readable {part} sheets: {error}") from None
    if len(pixels) < len(labels):
        raise InputError(f"{folder}: the {part} sheets hold {len(pixels)} images, but there are {len(labels)} labels")
    return pixels[: len(labels)], labels


def _tiles(path: Path) -> Tensor:
    """All tiles of one sheet, uint8 [N, 3, 32, 32]."""
    with Image.open(path) as image:
        sheet = np.array(image.convert("RGB"))
    tiles = sheet.reshape(-1, TILE, TILES_PER_ROW, TILE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)
    return torch.from_numpy(np.ascontiguousarray(tiles))
