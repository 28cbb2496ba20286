"""What real engines share: interleaved samples, random inputs, and the names of models and of the processor."""

import math
import platform
import random
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from graphprune.engines.base import Model, Timing
from graphprune.errors import InputError, StepError

SAMPLE_SECONDS = 1e-3
"""A sample is the mean of as many runs as take this long, so that the clock and a single interrupt weigh little."""

ATTEMPTS = 4
"""How often a sample is taken at most, where other processes take the processor away while it is."""

SCHEDULED = Path("/proc/thread-self/schedstat")
"""Where Linux tells of this thread: nanoseconds on a processor, nanoseconds of waiting for one, and turns."""

SEED = 0
"""Of the random inputs and of the order of models in a round."""

Run = Callable[[], object]
"""Runs a loaded model once on inputs of its own. Raises StepError."""


def interleaved(load: Callable[[Model], Run], models: Sequence[Model], rounds: int) -> list[Timing]:
    """Time models in turns, in an order that is shuffled anew (with a fixed seed) in each round.

    A sample is the mean of enough runs to take about a millisecond, after one untimed run that brings the model's own
    weights back into the caches, as in deployment; one during which this process had to give way to another is taken
    again. Beside busy processes a long run always gives way, a short one seldom, so that waiting would distort ratios:
    what the system says that this thread waited is not counted. A model that fails, in `load` too, gets a Timing with
    the error.
    """
    timers = [_Timer.start(load, model) for model in models]
    order = random.Random(SEED)
    for _ in range(rounds):
        for timer in order.sample(timers, len(timers)):
            timer.sample()
    return [timer.timing for timer in timers]


@dataclass
class _Timer:
    """A model being timed: it collects samples until it fails."""

    run: Run | None = None
    runs: int = 1
    samples: tuple[float, ...] = ()
    error: str | None = None

    @classmethod
    def start(cls, load: Callable[[Model], Run], model: Model) -> "_Timer":
        """Load the model, warm it up, and find how many runs make a sample."""
        try:
            timer = cls(load(model))
        except (InputError, StepError) as error:
            return cls(error=str(error))
        timer.sample()
        timer.sample()
        if timer.error is None:
            timer.runs = max(1, math.ceil(SAMPLE_SECONDS / min(timer.samples)))
            timer.samples = ()
        return timer

    def sample(self) -> None:
        """Take one sample; after an error nothing is run any more."""
        if self.run is None or self.error is not None:
            return
        attempts: list[float] = []
        try:
            while len(attempts) < ATTEMPTS:
                disturbed, seconds = _timed(self.run, self.runs)
                attempts.append(seconds)
                if not disturbed:
                    self.samples += (seconds,)
                    return
            self.samples += (min(attempts),)  # to wait for the processor only ever adds
        except StepError as error:
            self.error = str(error)

    @property
    def timing(self) -> Timing:
        return Timing(self.samples) if self.error is None else Timing(error=self.error)


def _timed(run: Run, runs: int) -> tuple[bool, float]:
    """Whether another process got the processor meanwhile, and the seconds of one of several runs after a first one.

    Reading how long one waited takes time itself, so the clock that does without is preferred where nobody interfered.
    """
    run()
    outer, waited, preemptions = time.perf_counter(), _waited(), _preemptions()
    start = time.perf_counter()
    for _ in range(runs):
        run()
    seconds = time.perf_counter() - start
    disturbed = _preemptions() > preemptions
    if disturbed:
        waited = _waited() - waited
        seconds = time.perf_counter() - outer - waited  # in this order, so that never too much is taken off
    return disturbed, seconds / runs


def _preemptions() -> int:
    """How often this process had to give way to others so far; 0 where the system does not tell (Windows)."""
    with suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    return 0


def _waited() -> float:
    """Seconds for which this thread was ready but had no processor so far; 0 where the system does not tell."""
    with suppress(OSError):
        return int(SCHEDULED.read_text(encoding="ascii").split()[1]) / 1e9
    return 0.0


def random_values(
    generator: np.random.Generator, element: type[np.generic], shape: Sequence[int]
) -> NDArray[np.generic]:
    """Normal numbers; zeros and ones where the type is no floating-point one, since those may be indices or lengths."""
    kind = np.dtype(element)
    if kind.kind == "f":
        return generator.standard_normal(shape).astype(kind)
    return generator.integers(0, 2, shape).astype(kind)


def check_counts(**counts: int) -> None:
    """Raise InputError for a count below 1, by its name."""
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


def check_batch(firsts: Sequence[int | None], batch: int) -> None:
    """Raise StepError where no input can hold `batch` examples. `firsts` are their first axes, None where dynamic."""
    if batch > 1 and not any(first is None or first % batch == 0 for first in firsts):
        raise StepError(f"its batch is fixed, so that it cannot be timed at batch {batch}")


def check_file(model: Model) -> None:
    """Raise InputError for a path at which there is no file."""
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"{model} does not exist or is not a file")


def name_of(model: Model) -> str:
    """How messages call a model."""
    return "the model" if isinstance(model, bytes) else str(model)


def processor() -> str:
    """The processor's model name, with family and model number where the kernel tells them (names can be generic)."""
    try:
        entries = re.findall(
            r"^([^:\n]+?)\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:
        entries = []
    known = dict(reversed(entries))  # the first processor's entries win
    if "model name" in known:
        return f"{known['model name']} ({known.get('cpu family', '?')}/{known.get('model', '?')})"
    return platform.processor() or platform.machine() or "unknown processor"
