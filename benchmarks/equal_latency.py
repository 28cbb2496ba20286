"""What scripts that compare at equal measured latency share: a dense model to measure against, the search for the
candidate nearest below a target, and rows that survive a killed run.
"""

import copy
import json
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune import models
from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.tracing import trace
from graphprune.cutting.surgery import remember
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import StepError
from graphprune.onnx_files.export import onnx_bytes
from graphprune.record import Share
from graphprune.tasks.task import Data, Task
from graphprune.timing.measure import measure

ROUNDS, FINAL_ROUNDS = 20, 100
"""Samples of each model while a candidate is looked for, and for a published row."""
CLOSE = 0.02
"""A candidate this little below the target ends the search."""
STEPS = 4
"""Bisections for each target, after the coarse knobs."""
CHECKS = 4
"""Candidates that are measured again, in a fresh process, until one holds."""
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Dense:
    """The model that everything is compared with, and its task."""

    name: str
    module: nn.Module
    graph: ModelGraph
    task: Task
    onnx: bytes

    @classmethod
    def load(cls, name: str, weights: Path, data: str, test_images: int | None = None) -> Self:
        """`cifar:<name>` with the weights of `cifar10_<name>.safetensors`; `test_images` reads no more of the test."""
        module = models.create(f"cifar:{name}", weights / f"cifar10_{name}.safetensors").eval()
        task = Task.load(f"cifar10:{data}", batch_size=128)
        if test_images is not None and (whole := task.test) is not None:
            task = replace(task, test=lambda: first_images(whole(), test_images))
        graph = remember(module, trace(module, task.example_inputs))
        return cls(name, module, graph, task, onnx_bytes(module, task.example_inputs))

    def share(self, model: nn.Module, rounds: int = ROUNDS, fresh: bool = False) -> Share:
        """The latency of a model as a share of the dense one's: one thread, batch 1, interleaved."""
        candidate = onnx_bytes(model, self.task.example_inputs)
        measured = measure([self.onnx, candidate], rounds=rounds, engine=OnnxRuntimeEngine(), fresh=fresh)
        if (share := measured.shares[-1]) is None:
            raise StepError(measured.timings[-1].error or "the candidate could not be measured")
        return share


def first_images(batches: Data, count: int) -> Data:
    """The first `count` images of some batches."""
    for inputs, targets in batches:
        yield inputs[:count], None if targets is None else targets[:count]
        count -= len(inputs)
        if count <= 0:
            return


@torch.no_grad()
def with_new_norms(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """A copy in evaluation mode whose batch norms hold the average statistics of these images."""
    model = copy.deepcopy(model)
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average over all batches
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


@dataclass
class Finder(Generic[T]):
    """Looks for the candidate that is just fast enough.

    `build` makes the candidate of a knob, None where there is none; a larger knob means slower, on the whole. `share`
    measures a candidate. `key` names a candidate: equal ones are measured once. `knobs`, rising, are tried first, for
    all targets together: latency over the knob is a staircase, and where channels leave whole blocks not even that.
    """

    build: Callable[[float], T | None]
    share: Callable[[T, int, bool], Share]
    key: Callable[[T], object]
    knobs: Sequence[float]
    _shares: dict[object, float] = field(default_factory=dict)
    _found: dict[float, T] = field(default_factory=dict)

    def find(self, target: float) -> tuple[T, Share] | None:
        """The slowest candidate whose latency, measured again in a fresh process, is within the target, if any."""
        for knob in self.knobs:
            self._try(knob)
        for _ in range(CHECKS):
            knob = self._bisect(target)
            if knob is None:
                return None
            checked = self.share(self._found[knob], FINAL_ROUNDS, True)
            if checked.value <= target:
                return self._found[knob], checked
            self._shares[self.key(self._found[knob])] = checked.value  # it only looked fast enough
        return None

    @property
    def fastest(self) -> float:
        """The smallest share met so far."""
        return min(self._shares.values(), default=1.0)

    def _known(self, knob: float) -> float:
        return self._shares[self.key(self._found[knob])]

    def _try(self, knob: float) -> bool:
        """Build and measure the candidate of a knob; whether there is one."""
        if knob in self._found:
            return True
        candidate = self.build(knob)
        if candidate is None:
            return False
        key = self.key(candidate)
        if key not in self._shares:
            self._shares[key] = self.share(candidate, ROUNDS, False).value
        self._found[knob] = candidate
        return True

    def _bisect(self, target: float) -> float | None:
        """The best knob that is fast enough, after looking between it and the next one, which is not; None for none."""
        tried = sorted(self._found)
        fast = [knob for knob in tried if self._known(knob) <= target]
        if not fast:
            return None
        low = max(fast, key=self._known)
        place = bisect_right(tried, low)
        if place == len(tried):
            return low
        best, high = low, tried[place]
        for _ in range(STEPS):
            if self._known(best) >= target * (1 - CLOSE):
                break
            middle = (low + high) / 2
            if self._try(middle) and self._known(middle) > target:
                high = middle
            else:
                low = middle
                best = max((best, middle), key=self._known) if middle in self._found else best
        return best


@dataclass
class Rows:
    """Rows of results, each kept in a file as a line of JSON as soon as it is known."""

    file: Path
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            text = self.file.read_text()
            whole, _, cut = text.rpartition("\n")
            self.rows = [json.loads(line) for line in whole.splitlines()]
            if cut:  # the line that a killed run was writing
                self.file.write_text(whole + "\n" * bool(whole))

    def has(self, **facts: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in facts.items()) for row in self.rows)

    def add(self, row: Row) -> None:
        """Keep a row."""
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
