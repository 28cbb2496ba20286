"""A task: the data a network is calibrated, judged and fine-tuned on, and the metric that judges it."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphprune.errors import InputError, StepError
from graphprune.tasks.images import Epoch, crop_and_flip
from graphprune.tasks.sequential import Judgement, hopeless

Batch = tuple[Tensor, Tensor | None]
"""Inputs [N, C, H, W], normalised, and their targets [N], None where there are no labels."""
Metric = Callable[[Tensor, Tensor], float]
Data = Iterable[Batch]
Answers = Callable[[Tensor], Tensor]
"""Maps inputs [N, ...] to the first output of a model, in float32 on the CPU."""

CALIBRATION_IMAGES = 1024


def top1(outputs: Tensor, targets: Tensor) -> float:
    """The share of logits [N, classes] whose largest entry is at the target [N]. InputError for labels out of range."""
    if outputs.ndim != 2:
        raise InputError(f"top-1 needs logits [images, classes], the model gives {list(outputs.shape)}: pass a metric")
    if targets.min() < 0 or targets.max() >= outputs.shape[1]:
        raise InputError(f"the labels go up to {int(targets.max())}, but the model has {outputs.shape[1]} outputs")
    return float((outputs.argmax(1) == targets).double().mean())


@dataclass(frozen=True, eq=False)
class Task:
    """What a network is for.

    `example_inputs` are arguments of one forward call with a batch of 2. `calibration` holds batches of inputs,
    `validation` batches of inputs and targets; both are cut from training data and share no image. `train(seed)` gives
    one augmented epoch; `test()` the test set, which is read once for a published row. `metric` maps all outputs (the
    first one of a model with several) and targets to a number where larger is better. All inputs are normalised:
    (pixel in [0, 1] - mean) / std, per channel. `in_random_order` says that any first validation images are a fair
    sample of all of them.
    """

    name: str
    example_inputs: tuple[Tensor, ...]
    calibration: tuple[Tensor, ...]
    validation: tuple[Batch, ...]
    train: Callable[[int], Data] | None = None
    test: Callable[[], Data] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    metric: Metric = top1
    in_random_order: bool = False

    def __post_init__(self) -> None:
        for part, batches in (("calibration", self.calibration), ("validation", self.validation)):
            if not batches:
                raise InputError(f"task {self.name!r} has no {part} data")

    @property
    def labelled(self) -> bool:
        """Whether every validation batch has targets."""
        return all(targets is not None for _, targets in self.validation)

    @property
    def images(self) -> int:
        """How many validation images there are."""
        return sum(len(inputs) for inputs, _ in self.validation)

    def accuracy(self, model: nn.Module) -> float:
        """The metric of the model on the validation slice. Raises StepError when an output or the metric is NaN."""
        return self._score(partial(predict, model), self.validation)

    def judge(self, answers: Answers, bar: float) -> Judgement:
        """The metric of what answers inputs, as far as it takes to see that it will not reach `bar`, an accuracy.

        Every image is read where they are in no random order, and for a metric of the caller's own, which is no share
        of images. Raises as `accuracy` does.
        """
        total = self.images
        if self.metric is not top1 or not self.in_random_order:
            return Judgement(self._score(answers, self.validation), total, total)
        correct = seen = 0
        for batch in self.validation:
            correct += round(self._score(answers, [batch]) * len(batch[0]))
            seen += len(batch[0])
            if hopeless(correct, seen, total, bar):
                break
        return Judgement(correct / seen, seen, total)

    def shuffled(self, seed: int = 0) -> Self:
        """The same task with its validation images in a random order, in batches of the size of the first.

        Left as it is where batches hold images of different sizes, or some without targets.
        """
        shapes = {inputs.shape[1:] for inputs, _ in self.validation}
        if not self.labelled or len(shapes) > 1:
            return self
        inputs = torch.cat([inputs for inputs, _ in self.validation])
        targets = torch.cat([targets for _, targets in self.validation if targets is not None])
        order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
        pieces = torch.split(order, len(self.validation[0][0]))
        batches = tuple((inputs[piece], targets[piece]) for piece in pieces)
        return replace(self, validation=batches, in_random_order=True)

    def test_accuracy(self, model: nn.Module) -> float:
        """The metric on the test set: for published rows only. Raises InputError when the task has none."""
        if self.test is None:
            raise InputError(f"task {self.name!r} has no test data")
        return self._score(partial(predict, model), self.test())

    def with_reference(self, dense: nn.Module) -> Self:
        """The same task where missing targets are the dense model's predictions: the metric is agreement with it."""
        if self.labelled:
            return self
        batches = ((inputs, targets, predict(dense, inputs)) for inputs, targets in self.validation)
        filled = tuple(
            (inputs, logits.argmax(1) if targets is None else targets) for inputs, targets, logits in batches
        )
        return replace(self, validation=filled)

    def _score(self, answers: Answers, batches: Data) -> float:
        outputs, targets = [], []
        for inputs, expected in batches:
            if expected is None:
                raise InputError(f"task {self.name!r} has no labels: use task.with_reference(dense model) first")
            outputs.append(answers(inputs))
            targets.append(expected.cpu())
        if not outputs:
            raise InputError(f"task {self.name!r} has no data to judge a model on")
        if not all(bool(torch.isfinite(output).all()) for output in outputs):
            raise StepError(f"the model's outputs on task {self.name!r} are not finite")
        score = float(self.metric(torch.cat(outputs), torch.cat(targets)))
        if math.isnan(score):
            raise StepError(f"the metric of task {self.name!r} is NaN")
        return score

    @classmethod
    def load(cls, name: str, **options: Any) -> "Task":
        """A built-in task: `digits`, `cifar10:DIR`, `imagefolder:DIR` or `images:FILE`; options as in
        `options.Options`.

        Raises InputError for an unknown name or option, and for a folder that does not hold such data.
        """
        from graphprune.tasks import data  # imports this module
        from graphprune.tasks.options import Options

        return data.load(name, Options.of(options))

    @classmethod
    def from_loaders(
        cls,
        train: Data | None,
        validation: Data,
        *,
        calibration: Iterable[Tensor | Batch] | None = None,
        test: Data | None = None,
        metric: Metric = top1,
        name: str = "user",
    ) -> Self:
        """A task from data loaders that give (inputs, targets), already normalised.

        Calibration batches default to the first 1,024 training images. Give calibration data that shares nothing with
        the validation data. Raises InputError when a loader is empty or gives something else.
        """
        checked = tuple(_checked(batch, "validation") for batch in validation)
        if calibration is None and train is None:
            raise InputError(f"task {name!r} needs calibration or training data")
        source: Iterable[Tensor | Batch] = calibration if calibration is not None else (train or ())
        slices = tuple(_first_images(source, CALIBRATION_IMAGES if calibration is None else None))
        if not slices:
            raise InputError(f"task {name!r} has no calibration data")
        return cls(
            name=name,
            example_inputs=(_two(slices[0]),),
            calibration=slices,
            validation=checked,
            train=None if train is None else _reseeded(train),
            test=None if test is None else lambda: (_checked(batch, "test") for batch in test),
            metric=metric,
        )

    @classmethod
    def unlabelled(
        cls,
        images: Tensor | NDArray[Any],
        batch_size: int = 64,
        calibration: int | None = None,
        name: str = "unlabelled",
    ) -> Self:
        """A task from normalised images [N, C, H, W] alone: the metric is agreement with the dense model.

        The first `calibration` images (default: half) calibrate and train, shifted and mirrored; the others validate.
        Raises InputError when one of the two parts would be empty, for other shapes or dtypes, and for NaN.
        """
        tensor = torch.as_tensor(np.asarray(images) if not isinstance(images, Tensor) else images)
        if tensor.ndim != 4 or not tensor.is_floating_point():
            raise InputError(f"images must be floats [N, C, H, W], normalised, not {tensor.dtype} {list(tensor.shape)}")
        cut = len(tensor) // 2 if calibration is None else calibration
        if not 0 < cut < len(tensor):
            raise InputError(f"{len(tensor)} images cannot be split into {cut} that calibrate and some that validate")
        tensor = tensor.detach().float()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError("the images hold NaN or infinite values")
        first, second = tensor[:cut], tensor[cut:]
        return cls(
            name=name,
            example_inputs=(_two(first),),
            calibration=_chunks(first, batch_size),
            validation=tuple((batch, None) for batch in _chunks(second, batch_size)),
            train=lambda seed: Epoch(first, None, batch_size, seed, crop_and_flip),
        )


def predict(model: nn.Module, inputs: Tensor) -> Tensor:
    """The first output of the model in eval mode, on the CPU in float32; the model's mode and device are kept."""
    parameter = next(model.parameters(), None)
    if parameter is not None:
        inputs = inputs.to(parameter.device)
    with evaluating(model), torch.no_grad():
        return first_output(model(inputs)).float().cpu()


def first_output(outputs: Any) -> Tensor:
    """The tensor that a metric or loss reads: the output itself, or the first of a tuple, list or dict of outputs."""
    while not isinstance(outputs, Tensor):
        if isinstance(outputs, dict):
            outputs = tuple(outputs.values())
        if not isinstance(outputs, Sequence) or not outputs:
            raise InputError(f"the model gives a {type(outputs).__name__}, not a tensor")
        outputs = outputs[0]
    return outputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _two(inputs: Tensor) -> Tensor:
    """A batch of two: tracing generalises from 2 images, but specialises on 1."""
    return torch.cat([inputs[:1], inputs[-1:]])


def _chunks(images: Tensor, size: int) -> tuple[Tensor, ...]:
    return tuple(images[start : start + size] for start in range(0, len(images), size))


def _reseeded(loader: Data) -> Callable[[int], Data]:
    def epoch(seed: int) -> Data:
        generator = getattr(loader, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        return loader

    return epoch


def _checked(batch: Any, part: str) -> Batch:
    if not isinstance(batch, Sequence) or len(batch) != 2 or not isinstance(batch[0], Tensor):
        raise InputError(f"the {part} loader must give (inputs, targets) with one tensor of inputs")
    if len(batch[0]) == 0:
        raise InputError(f"the {part} loader gives an empty batch")
    return batch[0], batch[1]


def _first_images(batches: Iterable[Any], limit: int | None) -> Iterator[Tensor]:
    seen = 0
    for batch in batches:
        inputs = batch if isinstance(batch, Tensor) else _checked(batch, "calibration")[0]
        kept = inputs if limit is None else inputs[: limit - seen]
        seen += len(kept)
        if len(kept):
            yield kept
        if limit is not None and seen >= limit:
            return
