"""What every engine offers. Only the modules in this folder import an inference engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Model = bytes | str | Path
"""An ONNX model: its serialised bytes, or the path of its file."""


@dataclass(frozen=True)
class Timing:
    """Raw latency samples of one model in seconds per run, or the text of the error that prevented them."""

    samples: tuple[float, ...] = ()
    error: str | None = None

    @property
    def median(self) -> float:
        """The median sample in seconds; NaN where the model could not be run."""
        return median(self.samples) if self.samples else float("nan")


class Engine(Protocol):
    """Runs ONNX models and measures them. Failure is a value: `measure` never raises for a bad model."""

    @property
    def identity(self) -> str:
        """Names the engine, its version, threads, provider, processor and batch: the scope in which timings compare."""
        ...

    @property
    def batch(self) -> int:
        """How many examples one timed run takes."""
        ...

    @property
    def sparse_kernels(self) -> bool:
        """Whether it has kernels that skip the zeros of a weight with 2 in each 4 consecutive inputs zero (2:4)."""
        ...

    def run(self, model: Model, inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """The outputs of one run. Raises InputError if the model cannot be loaded, StepError if it cannot be run."""
        ...

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        """Time the models interleaved: each of the `rounds` takes one sample of every model, in shuffled order.

        Inputs are random with a fixed seed. A dynamic first axis is `batch`, every other one 1; a model whose batch is
        fixed and no multiple of `batch` gets an error.
        """
        ...
