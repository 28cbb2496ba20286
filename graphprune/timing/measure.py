"""Measures ONNX models against each other: interleaved, with raw samples and an interval for the ratio.

`python -m graphprune.timing.measure` is the same in a process of its own: a JSON request on standard input (`models`:
paths, `engine`: its name and settings, `rounds`), JSON timings on standard output. It never imports torch.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from graphprune import engines
from graphprune.engines.base import Engine, Model, Timing
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError, StepError
from graphprune.record import Share

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)
"""Percentiles of the resampled ratios: 95 % between them."""
SEED = 0
"""Of the resampling."""

MARGIN = 0.01
"""Two sessions of the very same model differ by up to so much (where their weights happen to lie in memory)."""


def share(dense: Timing, candidate: Timing, engine: str) -> Share:
    """The candidate's median time as a share of the dense model's, with its 95 % interval.

    Percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13) over rounds: the two
    samples of a round were taken at the same moment, so they are drawn together. Raises StepError if one failed or
    their rounds differ in number.
    """
    for timing in (dense, candidate):
        if timing.error is not None:
            raise StepError(timing.error)
    if len(dense.samples) != len(candidate.samples) or not dense.samples:
        raise StepError(f"{len(dense.samples)} and {len(candidate.samples)} rounds cannot be compared")
    before, after = np.array(dense.samples), np.array(candidate.samples)
    rounds = np.random.default_rng(SEED).integers(0, len(before), (RESAMPLES, len(before)))
    ratios = np.median(after[rounds], axis=1) / np.median(before[rounds], axis=1)
    low, high = np.percentile(ratios, INTERVAL)
    value = float(np.median(after) / np.median(before))
    return Share(value, float(low), float(high), dense.samples, candidate.samples, engine)


def verdict(measured: Share) -> str:
    """ "faster", "slower" or "no difference beyond noise", which is also the answer where the interval is not clear."""
    if measured.high < 1 - MARGIN:
        return "faster"
    return "slower" if measured.low > 1 + MARGIN else "no difference beyond noise"


@dataclass(frozen=True)
class Measurement:
    """What was measured: one timing per model; the first model is what the others are compared with."""

    engine: str
    names: tuple[str, ...]
    timings: tuple[Timing, ...]

    @cached_property
    def shares(self) -> tuple[Share | None, ...]:
        """For each model, its time as a share of the first one's; None for a model that could not be run."""
        first = self.timings[0]
        return tuple(share(first, timing, self.engine) if timing.error is None else None for timing in self.timings)

    @property
    def speedup(self) -> float:
        """Time of the first model / time of the last; NaN if the last could not be run."""
        last = self.shares[-1]
        return 1 / last.value if last is not None else float("nan")

    @property
    def verdict(self) -> str:
        """The last model against the first: "faster", "slower", "no difference beyond noise", or "failed"."""
        last = self.shares[-1]
        return verdict(last) if last is not None else "failed"

    def to_json(self) -> str:
        """All of it as JSON text, raw samples included."""
        models = [
            {
                "name": name,
                "median": None if measured is None else timing.median,
                "samples": timing.samples,
                "error": timing.error,
                "share": None if measured is None else measured.value,
                "interval": None if measured is None else [measured.low, measured.high],
                "verdict": "failed" if measured is None else verdict(measured),
            }
            for name, timing, measured in zip(self.names, self.timings, self.shares, strict=True)
        ]
        return json.dumps({"engine": self.engine, "models": models}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a measurement back."""
        body = json.loads(text)
        timings = tuple(Timing(tuple(model["samples"]), model["error"]) for model in body["models"])
        return cls(body["engine"], tuple(model["name"] for model in body["models"]), timings)

    def __str__(self) -> str:
        width = max(map(len, self.names))
        lines = [self.engine, f"{'model':{width}}  median ms  speed-up  95 % interval"]
        for name, timing, measured in zip(self.names, self.timings, self.shares, strict=True):
            if measured is None:
                lines.append(f"{name:{width}}  failed: {timing.error}")
                continue
            line = f"{name:{width}}  {timing.median * 1e3:9.4f}"
            if timing is not self.timings[0]:
                interval = f"{1 / measured.high:.3f} to {1 / measured.low:.3f}"
                line += f"  {1 / measured.value:7.3f}x  {interval}  {verdict(measured)}"
            lines.append(line)
        return "\n".join(lines)


def measure(
    models: Sequence[Model],
    threads: int = 1,
    provider: str = "CPUExecutionProvider",
    rounds: int = 50,
    engine: Engine | None = None,
    fresh: bool = False,
) -> Measurement:
    """Time ONNX models (paths or bytes) against the first of them, interleaved.

    `rounds` samples are taken of each. An `engine` replaces ONNX Runtime with its `threads` and `provider`. `fresh`
    measures in a new Python process, which nothing done so far in this one can disturb (real engines only). A model
    that fails keeps its error in the measurement. Raises InputError if the first one fails or the request makes no
    sense, StepError if the new process dies.
    """
    engine = engine or OnnxRuntimeEngine(threads, provider)
    if not models or rounds < 2:
        raise InputError("a measurement needs at least one model and two rounds")
    names = tuple(f"model {i}" if isinstance(model, bytes) else str(model) for i, model in enumerate(models))
    timings = _in_new_process(models, names, rounds, engine) if fresh else engine.measure(models, rounds)
    if (error := timings[0].error) is not None:
        raise InputError(error)
    return Measurement(engine.identity, names, tuple(timings))


def _in_new_process(models: Sequence[Model], names: Sequence[str], rounds: int, engine: Engine) -> list[Timing]:
    settings = engines.settings_of(engine)
    if settings is None:
        raise InputError(f"a {type(engine).__name__} cannot measure in a new process")
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        files = [_as_file(model, Path(folder) / f"{index}.onnx") for index, model in enumerate(models)]
        request = {"models": files, "rounds": rounds, "engine": settings}
        process = subprocess.run(
            [sys.executable, "-m", "graphprune.timing.measure"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise StepError(f"the measuring process ended with code {process.returncode}: {last}")
    answers = zip(json.loads(process.stdout), files, names, strict=True)
    return [Timing(tuple(samples), error and error.replace(file, name)) for (samples, error), file, name in answers]


def _as_file(model: Model, place: Path) -> str:
    if not isinstance(model, bytes):
        return str(model)
    place.write_bytes(model)
    return str(place)


def _serve() -> None:
    """Answer the request on standard input: samples and error of each model."""
    request = json.load(sys.stdin)
    timings = engines.create(**request["engine"]).measure(request["models"], request["rounds"])
    json.dump([(timing.samples, timing.error) for timing in timings], sys.stdout)


if __name__ == "__main__":
    _serve()
