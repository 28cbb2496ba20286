"""Problems to practise on: random small networks under random machines, as `gp.search` would pose them.

What is drawn here is never judged on: residual networks have other depths and widths than the CIFAR ResNets, vision
transformers are smaller than any that a table names. A machine is a roofline (Williams, Waterman and Patterson 2009)
with a cost per operator, drawn anew for each problem, so that a policy learns to read costs and not one processor.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp
from graphprune.counting import count
from graphprune.coupling.operators import Absent, Attention, Convolution, Linear, Mixture, Operator, key
from graphprune.engines.base import Timing
from graphprune.engines.fake import FakeEngine
from graphprune.models.cifar import BasicBlock
from graphprune.randomness import seeded
from graphprune.registry import chosen_patterns
from graphprune.repairing.sensitivity import calibrated
from graphprune.searching.candidates import Candidates
from graphprune.searching.problem import Problem
from graphprune.searching.search import Session, corrected, latency_cost
from graphprune.timing.profile import Profile

CALIBRATION = 192
"""Images; few, because random networks need no fine scores."""
STEPS = (0, 0, 20)
"""How long a network is fitted, in batches of 64 images, by chance: most are not."""
BYTES = 4


# --- networks ------------------------------------------------------------------------------------------------------


class Inverted(nn.Module):
    """An inverted residual block (MobileNetV2): expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential(nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.spatial = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H / stride, W / stride]."""
        projected: Tensor = self.project(self.spatial(self.expand(x)))
        return x + projected if self.skips else projected


def _pooled(layers: Sequence[nn.Module], width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


def residual(rng: np.random.Generator) -> nn.Module:
    """Two or three stages of one to three basic blocks, of 24 to 96 channels: never those of a CIFAR ResNet."""
    width = int(rng.choice([24, 32, 48]))
    layers, inputs = _conv(3, width, stride=int(rng.choice([1, 2]))), width
    for stage in range(int(rng.integers(2, 4))):
        outputs = min(96, width * 2**stage)
        for block in range(int(rng.integers(1, 4))):
            layers.append(BasicBlock(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return _pooled(layers, inputs)


def plain(rng: np.random.Generator) -> nn.Module:
    """Four to eight convolutions in a row, some of them 5x5, with pooling between."""
    depth, layers, inputs = int(rng.integers(4, 9)), [], 3
    for layer in range(depth):
        outputs = int(rng.choice([32, 48, 64, 96]))
        layers += _conv(inputs, outputs, int(rng.choice([3, 3, 3, 5])) if inputs < 64 else 3)
        layers += [nn.MaxPool2d(2)] if layer in (0, depth // 3, 2 * depth // 3) else []
        inputs = outputs
    return _pooled(layers, inputs)


def inverted(rng: np.random.Generator) -> nn.Module:
    """Four to eight inverted residual blocks."""
    width = int(rng.choice([16, 24, 32]))
    layers, inputs = _conv(3, width, stride=2), width
    for block in range(int(rng.integers(4, 9))):
        grows = bool(block) and rng.random() < 0.4
        outputs = min(64, inputs + width) if grows else inputs
        layers.append(Inverted(inputs, outputs, 2 if grows and inputs < 3 * width else 1, int(rng.choice([2, 3, 4]))))
        inputs = outputs
    return _pooled(layers, inputs)


def transformer(rng: np.random.Generator) -> nn.Module:
    """A timm vision transformer of two to five blocks, 48 to 128 wide."""
    heads = int(rng.integers(2, 5))
    return VisionTransformer(
        img_size=32, patch_size=int(rng.choice([4, 8])), embed_dim=heads * int(rng.choice([16, 24, 32])),
        depth=int(rng.integers(2, 6)), num_heads=heads, mlp_ratio=float(rng.choice([2.0, 3.0, 4.0])), num_classes=10,
        global_pool=str(rng.choice(["token", "avg"])),
    )  # fmt: skip


FAMILIES: tuple[Callable[[np.random.Generator], nn.Module], ...] = (residual, plain, inverted, transformer)


def network(seed: int, task: gp.Task) -> nn.Module:
    """A random network of the family that its number falls on, lightly fitted or not at all."""
    rng = np.random.default_rng([seed, 1])
    assert task.train is not None
    with seeded(seed):
        model = FAMILIES[seed % len(FAMILIES)](rng).train()
        steps = int(rng.choice(STEPS))
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        for step, (images, labels) in enumerate(task.train(seed)):
            if step >= steps:
                with torch.no_grad():
                    model(images)  # batch norms see images at least once
                break
            optimiser.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model.eval()


# --- machines ------------------------------------------------------------------------------------------------------


class Machine(Profile):
    """A profile that computes its times from a roofline with random figures."""

    block = 16  # instead of what a profile finds by measuring
    noise = 0.01

    def __init__(self, seed: int) -> None:
        super().__init__(FakeEngine())
        rng = np.random.default_rng([seed, 2])
        kinds = ("window", "pointwise", "depthwise", "linear", "attention")
        base = 10 ** rng.uniform(9.7, 11.2)
        self.seed, self.block = seed, int(rng.choice([4, 8, 16, 16]))
        self.speed = {kind: base * float(rng.lognormal(0, 0.4)) for kind in kinds}
        self.speed["depthwise"] *= 0.4
        self.bandwidth, self.overhead = base * rng.uniform(0.1, 0.5), 10 ** rng.uniform(-6.7, -5.3)
        self.oblong = rng.uniform(1.0, 1.25)  # kernels that are not square are slower than their FLOPs say
        self.jitter = rng.uniform(0.0, 0.05)

    def fill(self, operators: Any, progress: Any = None) -> None:
        """Nothing has to be measured."""

    def timing(self, operator: Operator) -> Timing:
        """The computed time, with a jitter that is always the same for the same operator."""
        if isinstance(operator, Absent):
            return Timing((0.0,))
        rng = np.random.default_rng([self.seed, zlib.crc32(key(operator).encode())])
        return Timing((self._time(operator) * math.exp(self.jitter * rng.normal()),))

    def _time(self, operator: Operator) -> float:
        if isinstance(operator, Mixture):
            written = sum(part.outputs * math.prod(part.output_size) for part in operator.parts)
            return sum(map(self._time, operator.parts)) + self._moved(2 * written)
        if isinstance(operator, Convolution):
            return self._convolution(operator)
        if isinstance(operator, Linear):
            moved = operator.rows * (operator.inputs + operator.outputs) + operator.parameters
            parted = self._moved(2 * operator.rows * operator.outputs) if operator.groups > 1 else 0.0
            return self.overhead + parted + max(operator.flops / self.speed["linear"], moved * BYTES / self.bandwidth)
        assert isinstance(operator, Attention)
        scores = operator.batch * operator.heads * operator.queries * operator.keys
        return 3 * self.overhead + operator.flops / self.speed["attention"] + 4 * scores * BYTES / self.bandwidth

    def _convolution(self, operator: Convolution) -> float:
        height, width = operator.kernel
        each = operator.outputs // operator.groups
        depthwise = each == 1 and operator.groups > 1
        kind = "depthwise" if depthwise else "pointwise" if height * width == 1 else "window"
        whole = 1.0 if depthwise else math.ceil(each / self.block) * self.block / each
        flops = operator.flops * whole * (self.oblong if height != width else 1.0)
        read = operator.inputs * operator.height * operator.width
        moved = read + operator.outputs * math.prod(operator.output_size) + operator.parameters
        crop = self._moved(2 * read) if min(operator.padding) < 0 else 0.0
        return self.overhead + crop + max(flops / self.speed[kind], moved * BYTES / self.bandwidth)

    def _moved(self, numbers: int) -> float:
        """A copy of that many numbers."""
        return self.overhead + numbers * BYTES / self.bandwidth


# --- problems ------------------------------------------------------------------------------------------------------


def problem(seed: int, model: nn.Module, task: gp.Task) -> Problem:
    """The problem of a network under machine `seed`, with all three costs; its limits mean nothing yet."""
    graph = gp.trace(model, task.example_inputs)
    images = torch.cat(task.calibration)[:CALIBRATION]
    candidates = Candidates(graph, Machine(seed), chosen_patterns(None), calibrated(graph, images.split(64)))
    candidates.collect()
    counts = count(model, task.example_inputs)
    saving = float(np.random.default_rng([seed, 3]).uniform(0.75, 1.0))  # as whole models correct a search's latency
    costs = {
        "latency": corrected(latency_cost(candidates), saving),
        "flops": candidates.cost(lambda operator: operator.flops, counts.flops),
        "params": candidates.cost(lambda operator: operator.parameters, counts.params),
    }
    parts: dict[str, Any] = dict.fromkeys(("module", "task", "target", "bench", "study", "dense", "stopwatch"))
    session = Session(
        graph=graph, candidates=candidates, costs=costs, limits={}, error=candidates.error(),
        progress=lambda *_: None, **parts,
    )  # fmt: skip
    return session.problem(0, dict.fromkeys(costs, 1.0))  # as a search makes it: what agents see cannot differ


def rebudgeted(whole: Problem, share: float, costs: Sequence[str] = ("latency",)) -> Problem:
    """The problem under a target on some costs: `share` of the way from its cheapest plan (0) to dense (1)."""
    task = replace(whole, costs={name: whole.costs[name] for name in costs}, limits=dict.fromkeys(costs, 1.0))
    least, dense = task.cheapest, task.dense
    limits = {
        name: (low := cost(least)) + share * max(cost(dense) - low, 0.0) for name, cost in task.costs.items()
    }  # fmt: skip
    return replace(task, limits=limits, records=[], _seen={})
