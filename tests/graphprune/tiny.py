"""A network, a task and engines that are small enough to be searched in a second."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.operators import Operator
from graphprune.engines.base import Engine
from graphprune.engines.fake import FakeEngine
from graphprune.registry import patterns
from graphprune.repairing.calibration import Statistics
from graphprune.searching.candidates import Candidates
from graphprune.tasks.task import Task
from graphprune.timing.profile import MOST_GAIN
from tests.graphprune.networks import conv_bn

CLASSES = 4


def network(seed: int = 0) -> nn.Module:
    """Two 3x3 convolutions of 32 channels and a classifier, all random but the classifier: see `fitted`."""
    torch.manual_seed(seed)
    layers = [conv_bn(3, 32), conv_bn(32, 32, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES)]
    return nn.Sequential(*layers).eval()


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy stripes [count, 3, 16, 16] across, down and along both diagonals, and which of them it is [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = torch.stack([torch.sin(1.5 * axis) for axis in (x, y, (x + y) / 2**0.5, (x - y) / 2**0.5)])
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    return waves[labels][:, None] + 1.5 * noise, labels


def batches(count: int, seed: int, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """The same in batches."""
    return list(zip(*(part.split(size) for part in images(count, seed)), strict=True))


def fitted(seed: int = 0) -> nn.Module:
    """The network with norms that saw the images and a classifier solved by least squares: trained, at no cost."""
    model = network(seed)
    x, labels = images(256, 1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        model.train()(x)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1
        features = torch.cat([model.eval()[:-1](x), torch.ones(len(x), 1)], 1)
        wanted = nn.functional.one_hot(labels, CLASSES).float() - 1 / CLASSES
        solution = torch.linalg.lstsq(features, wanted).solution
        model[-1].weight.copy_(solution[:-1].T)
        model[-1].bias.copy_(solution[-1])
    return model


def forbidden() -> Iterable[tuple[Tensor, Tensor]]:
    """Test data that must not be read."""
    raise AssertionError("the test data was read")


def task(labelled: bool = True) -> Task:
    """Stripes: calibration and validation data of different seeds, and test data that nobody may read."""
    made = Task.from_loaders(batches(96, 1), batches(64, 2), test=(forbidden() for _ in range(1)), name="stripes")
    made = Task(made.name, made.example_inputs, made.calibration, made.validation, made.train, forbidden)
    if labelled:
        return made
    unlabelled = tuple((x, None) for x, _ in made.validation)
    return Task("stripes, unlabelled", made.example_inputs, made.calibration, unlabelled, test=forbidden)


@dataclass
class Weighted(FakeEngine):
    """A fake engine on which each multiply-add counts `factor` times: 0 gains from nothing, 1e6 from everything."""

    factor: int = 0

    @property
    def identity(self) -> str:
        """The engine's, and the factor."""
        return f"{super().identity}, factor {self.factor}"

    def _products(self, node: Any, shapes: Mapping[str, Any]) -> int:
        return self.factor * super()._products(node, shapes)


@dataclass
class LinearProfile:
    """A profile whose times are proportional to FLOPs; it counts what it was asked to measure."""

    block: int = 16
    engine: Engine = field(default_factory=FakeEngine)
    filled: set[Operator] = field(default_factory=set)
    failing: Callable[[Operator], bool] = lambda _: False

    def fill(self, operators: Iterable[Operator], progress: Callable[[int, int], None] | None = None) -> None:
        """Note the operators."""
        self.filled |= set(operators)

    def seconds(self, operator: Operator) -> float:
        """A nanosecond per FLOP."""
        assert operator in self.filled, f"{operator} was not measured beforehand"
        return float("nan") if self.failing(operator) else operator.flops * 1e-9

    def gain(self, dense: Iterable[Operator], cut: Iterable[Operator]) -> float:
        """The ratio of times, as that of a real profile."""
        before, after = sum(map(self.seconds, dense)), sum(map(self.seconds, cut))
        return min(before / after, MOST_GAIN) if after else MOST_GAIN

    def beyond_noise(self, dense: Iterable[Operator], cut: Iterable[Operator]) -> bool:
        """Every gain is."""
        return self.gain(dense, cut) > 1


def candidates(graph: ModelGraph, statistics: Statistics, profile: LinearProfile | None = None) -> Candidates:
    """Collected candidates of all patterns under a linear profile."""
    made = Candidates(graph, profile or LinearProfile(), list(patterns().values()), statistics)  # type: ignore[arg-type]
    made.collect()
    return made
