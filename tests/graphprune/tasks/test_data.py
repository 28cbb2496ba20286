"""The built-in tasks: pixels against their source, slices that do not overlap, test data left alone."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from graphprune import models
from graphprune.errors import InputError
from graphprune.tasks import data
from graphprune.tasks.options import Options
from graphprune.tasks.task import Task

SHARED = Path(__file__).parents[4] / "shared"
needs_cifar10 = pytest.mark.skipif(not (SHARED / "cifar10").is_dir(), reason="CIFAR-10 is not beside the checkout")


def prints(inputs: Tensor) -> set[bytes]:
    """What tells one image from another."""
    return {image.numpy().tobytes() for image in inputs}


def validation_inputs(task: Task) -> Tensor:
    return torch.cat([inputs for inputs, _ in task.validation])


def write_sheets(folder: Path, part: str, sizes: list[int], seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Random tiles as lossless sheets; the unused end of the last row is black."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (sum(sizes), 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, len(images), dtype=np.uint8)
    start = 0
    for index, size in enumerate(sizes):
        rows = -(-size // 100)
        sheet = np.zeros((rows * 32, 3200, 3), dtype=np.uint8)
        for tile in range(size):
            top, left = tile // 100 * 32, tile % 100 * 32
            sheet[top : top + 32, left : left + 32] = images[start + tile]
        name = f"train_{index}.webp" if part == "train" else "test.webp"
        Image.fromarray(sheet).save(folder / name, lossless=True)
        start += size
    np.save(folder / f"{part}_labels.npy", labels)
    return images, labels


@pytest.fixture(scope="module")
def digits() -> Task:
    return Task.load("digits")


def test_digits_are_the_bundled_ones(digits: Task) -> None:
    """Averaging 4x4 blocks of the upsampled image gives back something close to the 8x8 scan it came from."""
    from sklearn.datasets import load_digits

    source = load_digits()
    inputs, labels = digits.validation[0]
    assert labels is not None
    assert inputs.shape[1:] == (3, 32, 32)
    assert torch.equal(inputs[:, 0], inputs[:, 2])
    small = torch.nn.functional.avg_pool2d((inputs[:, :1] + 1) * 8, 4).flatten(1).numpy()
    nearest = ((small[:, None] - source.data[None]) ** 2).sum(2).argmin(1)
    assert (source.target[nearest] == labels.numpy()).mean() == 1.0


def test_digits_slices(digits: Task) -> None:
    assert digits.train is not None
    assert digits.test is not None
    calibration, validation = prints(torch.cat(digits.calibration)), prints(validation_inputs(digits))
    test = prints(torch.cat([inputs for inputs, _ in digits.test()]))
    assert (len(calibration), len(validation), len(test)) == (512, 300, 360)
    assert not calibration & validation
    assert not test & (calibration | validation)


def test_slices_follow_the_seed() -> None:
    first, again, other = (validation_inputs(Task.load("digits", seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_options_reach_the_images() -> None:
    task = Task.load(
        "digits", image_size=16, batch_size=7, calibration=21, validation=14, mean=(0.0,) * 3, std=(1.0,) * 3
    )
    assert [tuple(batch.shape) for batch in task.calibration] == [(7, 3, 16, 16)] * 3
    assert len(task.validation) == 2
    assert float(task.calibration[0].min()) == 0
    assert float(task.calibration[0].max()) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 3}, "unknown task option 'batch'"),
        ({"batch_size": 0}, "at least 1"),
        ({"std": (0.0, 1.0, 1.0)}, "must be positive"),
        ({"mean": (0.5,)}, "one value per channel"),
        ({"validation": 5000}, "too few to validate"),
    ],
)
def test_unusable_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Task.load("digits", **options)


@pytest.mark.parametrize("name", ["digit", "cifar10", "cifar10:", "svhn:/tmp", ""])
def test_unknown_tasks(name: str) -> None:
    with pytest.raises(InputError, match="unknown task"):
        Task.load(name)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        Task.load(f"cifar10:{tmp_path / 'none'}")
    with pytest.raises(InputError, match="holds neither"):
        Task.load(f"cifar10:{tmp_path}")


def test_sheets_give_every_tile_with_its_label(tmp_path: Path) -> None:
    images, labels = write_sheets(tmp_path, "train", [200, 150], seed=1)
    task = Task.load(f"cifar10:{tmp_path}", validation=349, calibration=1, mean=(0.0,) * 3, std=(1.0,) * 3)
    known = {image.transpose(2, 0, 1).tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    found = {}
    for inputs, targets in task.validation:
        assert targets is not None
        pixels = (inputs * 255).round().to(torch.uint8)
        found |= {image.numpy().tobytes(): int(target) for image, target in zip(pixels, targets, strict=True)}
    assert len(found) == 349
    assert found.items() <= known.items()


def test_only_test_reads_the_test_sheet(tmp_path: Path) -> None:
    write_sheets(tmp_path, "train", [120], seed=1)
    task = Task.load(f"cifar10:{tmp_path}", validation=20)  # there is no test.webp yet, and nobody minds
    assert task.test is not None
    with pytest.raises(InputError, match="no readable test sheets"):
        list(task.test())
    _, labels = write_sheets(tmp_path, "test", [130], seed=2)
    read = torch.cat([targets for _, targets in task.test() if targets is not None])
    assert read.tolist() == labels.tolist()


def test_validation_images_are_never_trained_on(tmp_path: Path) -> None:
    """Constant images keep their colour under shifts (where not black) and flips, so each can be followed."""
    sheet = np.zeros((64, 3200, 3), dtype=np.uint8)
    for tile in range(200):
        top, left = tile // 100 * 32, tile % 100 * 32
        sheet[top : top + 32, left : left + 32] = tile + 1
    Image.fromarray(sheet).save(tmp_path / "train_0.webp", lossless=True)
    np.save(tmp_path / "train_labels.npy", np.zeros(200, dtype=np.uint8))
    options = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    task = Task.load(f"cifar10:{tmp_path}", validation=50, calibration=30, batch_size=10, **options)
    assert task.train is not None

    def colours(inputs: Tensor) -> set[int]:
        return {int(value) for value in (inputs.amax((1, 2, 3)) * 255).round()}

    held = colours(validation_inputs(task))
    trained = set().union(*(colours(inputs) for inputs, _ in task.train(0)))
    assert len(held) == 50
    assert trained == set(range(1, 201)) - held
    assert not colours(torch.cat(task.calibration)) & held


def test_damaged_sheets(tmp_path: Path) -> None:
    write_sheets(tmp_path, "train", [120], seed=1)
    sheet = (tmp_path / "train_0.webp").read_bytes()
    (tmp_path / "train_0.webp").write_bytes(sheet[: len(sheet) // 2])
    with pytest.raises(InputError, match="no readable train sheets"):
        Task.load(f"cifar10:{tmp_path}")
    (tmp_path / "train_0.webp").write_bytes(sheet)
    np.save(tmp_path / "train_labels.npy", np.zeros(900, dtype=np.uint8))
    with pytest.raises(InputError, match="hold 200 images, but there are 900 labels"):
        Task.load(f"cifar10:{tmp_path}")


def test_torchvisions_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision reads and checks the files; its arrays [N, H, W, C] must arrive as [N, C, H, W]."""
    (tmp_path / "cifar-10-batches-py").mkdir()
    source = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    roots = []

    def reader(root: str, train: bool, download: bool) -> SimpleNamespace:
        roots.append((root, train, download))
        return SimpleNamespace(data=source, targets=list(range(60)))

    reader.base_folder = "cifar-10-batches-py"  # type: ignore[attr-defined]
    monkeypatch.setattr(data, "CIFAR10", reader)
    for folder in (tmp_path, tmp_path / "cifar-10-batches-py"):
        task = Task.load(f"cifar10:{folder}", validation=59, mean=(0.0,) * 3, std=(1.0,) * 3)
        inputs, labels = task.validation[0]
        assert labels is not None
        expected = torch.from_numpy(source[labels.numpy()]).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(inputs, expected)
    assert roots == [(str(tmp_path), True, False)] * 2


@needs_cifar10
def test_published_resnet20_scores_as_published() -> None:
    """2,500 of the test images, so within three standard errors of the 91.73 % on all of them."""
    images = data.read_cifar10(SHARED / "cifar10", Options(), train=False).select(torch.arange(2500))
    task = Task.from_loaders(None, images.batches(250), calibration=[torch.zeros(1, 3, 32, 32)])
    model = models.create("cifar:resnet20", weights=SHARED / "weights" / "cifar10_resnet20.safetensors")
    assert task.accuracy(model) == pytest.approx(0.9173, abs=3 * (0.9173 * 0.0827 / 2500) ** 0.5)
