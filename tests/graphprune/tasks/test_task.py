"""Tasks: the score against brute force, what is refused, and that the slices are honest."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from graphprune.errors import InputError, StepError
from graphprune.tasks.task import Task, first_output, top1


def batches(count: int, size: int = 4, classes: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, 3, 8, 8), torch.randint(0, classes, (size,))) for _ in range(count)]


def classifier(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, classes))


def test_accuracy_against_a_loop() -> None:
    torch.manual_seed(0)
    validation = batches(50)
    task, model = Task.from_loaders(batches(2), validation), classifier()
    weight, bias = (p.detach().numpy().astype(np.float64) for p in model.parameters())
    right = [
        int(np.argmax(weight @ image.numpy().ravel() + bias) == target)
        for inputs, targets in validation
        for image, target in zip(inputs, targets.tolist(), strict=True)
    ]
    assert task.accuracy(model) == pytest.approx(sum(right) / 200)


def test_the_mode_of_every_module_is_restored() -> None:
    model = classifier().train()
    model[1].eval()
    Task.from_loaders(batches(1), batches(1)).accuracy(model)
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_mode_is_restored_after_a_failure() -> None:
    model = nn.Sequential(nn.Linear(5, 2)).train()
    with pytest.raises(RuntimeError):
        Task.from_loaders(batches(1), batches(1)).accuracy(model)
    assert model.training


def test_own_metric_sees_all_outputs_at_once() -> None:
    seen = []

    def metric(outputs: Tensor, targets: Tensor) -> float:
        seen.append((outputs.shape, targets.shape))
        return 0.25

    assert Task.from_loaders(batches(1), batches(3), metric=metric).accuracy(classifier()) == 0.25
    assert seen == [((12, 3), (12,))]


def test_nan_is_an_error() -> None:
    task, model = Task.from_loaders(batches(1), batches(1)), classifier()
    with torch.no_grad():
        model[2].bias[0] = math.nan
    with pytest.raises(StepError, match="not finite"):
        task.accuracy(model)
    broken = Task.from_loaders(batches(1), batches(1), metric=lambda outputs, targets: math.nan)
    with pytest.raises(StepError, match="is NaN"):
        broken.accuracy(classifier())


def test_labels_beyond_the_models_outputs() -> None:
    with pytest.raises(InputError, match="labels go up to 7, but the model has 3 outputs"):
        top1(torch.zeros(2, 3), torch.tensor([0, 7]))
    with pytest.raises(InputError, match="pass a metric"):
        top1(torch.zeros(2, 3, 4), torch.tensor([0, 1]))


def test_first_output() -> None:
    one, two = torch.zeros(1), torch.ones(1)
    assert first_output(one) is one
    assert first_output((two, one)) is two
    assert first_output({"a": [two], "b": one}) is two
    with pytest.raises(InputError, match="NoneType"):
        first_output(None)


def test_unlabelled_measures_agreement() -> None:
    images, dense = torch.randn(20, 3, 8, 8), classifier()
    task = Task.unlabelled(images, batch_size=4)
    with pytest.raises(InputError, match="with_reference"):
        task.accuracy(dense)
    task = task.with_reference(dense)
    assert task.accuracy(dense) == 1.0
    other = classifier().eval()
    with torch.no_grad():
        agreement = float((dense.eval()(images[10:]).argmax(1) == other(images[10:]).argmax(1)).float().mean())
    assert task.accuracy(other) == pytest.approx(agreement)


def test_unlabelled_halves_share_nothing_and_cover_all() -> None:
    images = torch.randn(9, 3, 8, 8)
    task = Task.unlabelled(images.numpy(), batch_size=2)
    halves = torch.cat([*task.calibration, *(inputs for inputs, _ in task.validation)])
    assert torch.equal(halves, images)
    assert sum(map(len, task.calibration)) == 4
    assert task.train is not None
    (trained, labels), *_ = list(task.train(0))
    assert trained.shape == (2, 3, 8, 8)
    assert labels is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8), "cannot be split"),
        (torch.zeros(0, 3, 8, 8), "cannot be split"),
        (torch.zeros(4, 8, 8), "N, C, H, W"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "normalised"),
        (torch.full((4, 3, 8, 8), math.nan), "NaN"),
    ],
)
def test_unusable_images(images: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Task.unlabelled(images)


def test_labels_are_kept_by_with_reference() -> None:
    task = Task.from_loaders(batches(1), batches(1))
    assert task.with_reference(classifier()) is task


def test_from_loaders_takes_data_loaders() -> None:
    images, labels = torch.randn(40, 3, 8, 8), torch.arange(40) % 3
    train = DataLoader(TensorDataset(images[:30], labels[:30]), batch_size=5, shuffle=True)
    task = Task.from_loaders(train, DataLoader(TensorDataset(images[30:], labels[30:]), batch_size=5))
    assert sum(map(len, task.calibration)) == 30
    assert task.example_inputs[0].shape == (2, 3, 8, 8)
    assert task.accuracy(classifier()) <= 1.0


def test_a_loaders_own_generator_is_reseeded() -> None:
    data = TensorDataset(torch.arange(30.0).view(30, 1, 1, 1), torch.arange(30))
    loader = DataLoader(data, batch_size=30, shuffle=True, generator=torch.Generator())
    task = Task.from_loaders(loader, batches(1))
    assert task.train is not None
    orders = [next(iter(task.train(seed)))[1].tolist() for seed in (1, 2, 1)]  # type: ignore[union-attr]
    assert orders[0] == orders[2] != orders[1]


def test_default_calibration_stops_at_1024_images() -> None:
    train = [(torch.zeros(400, 1, 1, 1), torch.zeros(400).long())] * 4
    assert sum(map(len, Task.from_loaders(train, batches(1)).calibration)) == 1024


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (batches(1), [], "no validation data"),
        ([], batches(1), "no calibration data"),
        (None, batches(1), "needs calibration or training data"),
        (batches(1), [torch.zeros(2, 3, 8, 8)], "must give"),
        ([({"x": 1}, 2)], batches(1), "must give"),
        (batches(1), [(torch.zeros(0, 3, 8, 8), torch.zeros(0))], "empty batch"),
    ],
)
def test_unusable_loaders(train: list[tuple[Tensor, Tensor]], validation: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Task.from_loaders(train, validation)  # type: ignore[arg-type]


def test_test_data_is_read_by_test_accuracy_only() -> None:
    class Counted(list[tuple[Tensor, Tensor]]):
        reads = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            self.reads += 1
            return super().__iter__()

    test = Counted(batches(2))
    task, model = Task.from_loaders(batches(1), batches(1), test=test), classifier()
    task.accuracy(model)
    assert test.reads == 0
    assert 0 <= task.test_accuracy(model) <= 1
    assert test.reads == 1
    with pytest.raises(InputError, match="no test data"):
        Task.from_loaders(batches(1), batches(1)).test_accuracy(model)
