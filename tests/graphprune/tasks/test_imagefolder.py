"""Folders of images: whose image lands where, and what cannot be used."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from graphprune.errors import InputError
from graphprune.tasks import imagefolder
from graphprune.tasks.task import Task

PLAIN = {"image_size": 16, "batch_size": 4, "mean": (0.0,) * 3, "std": (1.0,) * 3}


def paint(folder: Path, colours: range, size: tuple[int, int] = (24, 20)) -> None:
    """One flat image per grey level: the level survives resizing and cropping, so each image can be followed."""
    folder.mkdir(parents=True)
    for colour in colours:
        Image.new("RGB", size, (colour,) * 3).save(folder / f"{colour}.png")


def levels(inputs: Tensor) -> list[int]:
    return [int(value) for value in (inputs[:, 0].mean((1, 2)) * 255).round()]


def load(folder: Path, **options: object) -> Task:
    return Task.load(f"imagefolder:{folder}", **{**PLAIN, **options})


def validation(task: Task) -> dict[int, int]:
    """Grey level -> label."""
    found: dict[int, int] = {}
    for inputs, targets in task.validation:
        assert targets is not None
        found |= dict(zip(levels(inputs), targets.tolist(), strict=True))
    return found


def test_class_folders_are_split(tmp_path: Path) -> None:
    paint(tmp_path / "ants", range(100, 120))
    paint(tmp_path / "bees", range(200, 220))
    task = load(tmp_path)
    held = validation(task)
    calibrating = [level for batch in task.calibration for level in levels(batch)]
    assert len(held) == 8
    assert all(label == (level >= 200) for level, label in held.items())
    assert sorted([*calibrating, *held]) == [*range(100, 120), *range(200, 220)]
    assert held != validation(load(tmp_path, seed=1))
    assert held == validation(load(tmp_path))
    assert task.test is None


def test_training_images_are_augmented_seeded_and_never_validate(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("ants", "bees"):
        (tmp_path / name).mkdir()
        for index in range(10):
            pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    task = load(tmp_path)
    assert task.train is not None
    first, again, other = (torch.cat([inputs for inputs, _ in task.train(seed)]) for seed in (1, 1, 2))
    assert first.shape == (16, 3, 16, 16)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_epoch_opens_each_training_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paint(tmp_path / "ants", range(100, 115))
    task = load(tmp_path)
    opened: list[int] = []
    original = imagefolder._open
    monkeypatch.setattr(imagefolder, "_open", lambda path: opened.append(int(Path(path).stem)) or original(path))
    assert task.train is not None
    list(task.train(3))
    assert sorted([*opened, *validation(task)]) == list(range(100, 115))


def test_augmenting_leaves_the_callers_generators_alone(tmp_path: Path) -> None:
    paint(tmp_path / "ants", range(100, 110))
    task = load(tmp_path)
    assert task.train is not None
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    list(task.train(0))
    assert torch.equal(torch.rand(1), expected)


def test_given_splits_are_kept(tmp_path: Path) -> None:
    for part, start in (("train", 10), ("val", 20), ("test", 30)):
        paint(tmp_path / part / "ants", range(start, start + 5))
        paint(tmp_path / part / "bees", range(start + 100, start + 105))
    task = load(tmp_path)
    assert validation(task) == {**dict.fromkeys(range(20, 25), 0), **dict.fromkeys(range(120, 125), 1)}
    assert task.test is not None
    assert sorted(level for inputs, _ in task.test() for level in levels(inputs)) == [*range(30, 35), *range(130, 135)]


def test_a_limited_validation_slice_of_a_given_split_is_not_one_class(tmp_path: Path) -> None:
    for part, start in (("train", 10), ("val", 20)):
        paint(tmp_path / part / "ants", range(start, start + 8))
        paint(tmp_path / part / "bees", range(start + 100, start + 108))
    assert set(validation(load(tmp_path, validation=8)).values()) == {0, 1}


def test_images_without_classes_are_unlabelled(tmp_path: Path) -> None:
    paint(tmp_path / "flat", range(50, 60))
    task = load(tmp_path / "flat")
    assert not task.labelled
    inputs = torch.cat([*task.calibration, *(batch for batch, _ in task.validation)])
    assert sorted(levels(inputs)) == list(range(50, 60))


def test_sizes_of_unlabelled_slices(tmp_path: Path) -> None:
    paint(tmp_path / "flat", range(50, 60))
    task = load(tmp_path / "flat", calibration=5, validation=2)
    assert (sum(map(len, task.calibration)), sum(len(inputs) for inputs, _ in task.validation)) == (5, 2)
    assert (task.mean, task.std) == (PLAIN["mean"], PLAIN["std"])
    with pytest.raises(InputError, match="cannot be split"):
        load(tmp_path / "flat", calibration=10)


def test_default_input(tmp_path: Path) -> None:
    paint(tmp_path / "flat", range(50, 52))
    inputs = Task.load(f"imagefolder:{tmp_path / 'flat'}").calibration[0]
    level = levels_of_imagenet(inputs)
    assert inputs.shape == (1, 3, 224, 224)
    assert level in (50, 51)


def levels_of_imagenet(inputs: Tensor) -> int:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return round(float((inputs[0].mean((1, 2)) * std + mean).mean() * 255))


def test_unusable_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds 0 images"):
        load(tmp_path / "empty")
    (tmp_path / "classes" / "ants").mkdir(parents=True)
    with pytest.raises(InputError, match="ants"):
        load(tmp_path / "classes")
    paint(tmp_path / "single" / "ants", range(1))
    with pytest.raises(InputError, match="too few"):
        load(tmp_path / "single")


def test_other_classes_in_validation(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "ants", range(3))
    paint(tmp_path / "val" / "wasps", range(3))
    with pytest.raises(InputError, match="other classes than the training images: wasps"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not an image", "half"])
def test_unreadable_images_are_named(tmp_path: Path, content: bytes | str) -> None:
    paint(tmp_path / "flat", range(4))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "flat" / "odd.png")
    whole = (tmp_path / "flat" / "odd.png").read_bytes()
    (tmp_path / "flat" / "odd.png").write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(InputError, match=r"odd\.png cannot be read as an image"):
        load(tmp_path / "flat")
