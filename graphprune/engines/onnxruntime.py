"""ONNX Runtime behind the engine contract."""

import math
import platform
import random
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from graphprune.engines.base import Model, Timing
from graphprune.errors import InputError, StepError

OPTIMISATION = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""The graph optimisation levels by name; "all" includes the blocked convolution layout."""

SAMPLE_SECONDS = 1e-3
"""A sample is the mean of as many runs as take this long, so that the clock and a single interrupt weigh little."""

SEED = 0
"""Of the random inputs and of the order of models in a round."""

ELEMENTS = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
"""Input element types of ONNX Runtime as numpy types."""


@dataclass(frozen=True)
class OnnxRuntimeEngine:
    """Runs and times ONNX models in ONNX Runtime.

    `threads` is the number of threads within an operator (operators run one after the other), `provider` an execution
    provider of this installation, `optimisation` one of `OPTIMISATION`. `batch` is the size given to a dynamic first
    axis when timing; every other dynamic axis is 1. Raises InputError for values that cannot be used here.
    """

    threads: int = 1
    provider: str = "CPUExecutionProvider"
    optimisation: str = "all"
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("threads", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        available = onnxruntime.get_available_providers()
        if self.provider not in available:
            raise InputError(f"unknown provider {self.provider!r}; available here: {', '.join(available)}")
        if self.optimisation not in OPTIMISATION:
            raise InputError(f"unknown optimisation {self.optimisation!r}; known: {', '.join(OPTIMISATION)}")

    @property
    def identity(self) -> str:
        """Version, provider, threads and processor; settings that differ from the defaults are named too."""
        parts = [f"onnxruntime {onnxruntime.__version__}", self.provider, f"{self.threads} threads", processor()]
        parts += [f"optimisation {self.optimisation}"] * (self.optimisation != "all")
        parts += [f"batch {self.batch}"] * (self.batch != 1)
        return ", ".join(parts)

    def run(self, model: Model, inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """The outputs of one run. Raises InputError if the model cannot be loaded, StepError if it cannot be run."""
        session = self._session(model)
        try:
            outputs: list[NDArray[np.generic]] = session.run(None, dict(inputs))
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            raise StepError(f"ONNX Runtime cannot run {_name(model)}: {_reason(error)}") from None
        return outputs

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        """Time the models interleaved, in an order that is shuffled anew (with a fixed seed) in each round.

        A sample is the mean of enough runs to take about a millisecond, after one untimed run that brings the model's
        own weights back into the caches, as in deployment. A model that fails gets a Timing with the error.
        """
        timers = [_Timer.start(self, model) for model in models]
        order = random.Random(SEED)
        for _ in range(rounds):
            for timer in order.sample(timers, len(timers)):
                timer.sample()
        return [timer.timing for timer in timers]

    def _session(self, model: Model) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = OPTIMISATION[self.optimisation]
        options.log_severity_level = 4  # errors arrive as exceptions, so nothing else is printed
        # Idle threads of one session would otherwise keep spinning while another session is being timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = list(dict.fromkeys([self.provider, "CPUExecutionProvider"]))
        if not isinstance(model, bytes) and not Path(model).is_file():
            raise InputError(f"{model} does not exist or is not a file")
        try:
            return onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=providers
            )
        except Exception as error:  # see run
            raise InputError(_refusal(model, error)) from None

    def _inputs(self, session: Any) -> dict[str, NDArray[np.generic]]:
        generator = np.random.default_rng(SEED)
        return {entry.name: _random(generator, entry.type, self._shape(entry.shape)) for entry in session.get_inputs()}

    def _shape(self, declared: Sequence[int | str | None]) -> tuple[int, ...]:
        free = (self.batch if axis == 0 else 1 for axis in range(len(declared)))
        return tuple(size if isinstance(size, int) else default for size, default in zip(declared, free, strict=True))


@dataclass
class _Timer:
    """A model being timed: it collects samples until it fails."""

    session: Any = None
    inputs: Mapping[str, NDArray[np.generic]] | None = None
    runs: int = 1
    samples: tuple[float, ...] = ()
    error: str | None = None

    @classmethod
    def start(cls, engine: OnnxRuntimeEngine, model: Model) -> "_Timer":
        """Load the model, warm it up, and find how many runs make a sample."""
        try:
            session = engine._session(model)
            timer = cls(session, engine._inputs(session))
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
        if self.error is not None:
            return
        try:
            self.session.run(None, self.inputs)
            start = time.perf_counter()
            for _ in range(self.runs):
                self.session.run(None, self.inputs)
            self.samples += ((time.perf_counter() - start) / self.runs,)
        except Exception as error:  # ONNX Runtime's errors share no base class of their own
            self.error = f"ONNX Runtime cannot run it: {_reason(error)}"

    @property
    def timing(self) -> Timing:
        return Timing(self.samples) if self.error is None else Timing(error=self.error)


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


def _random(generator: np.random.Generator, element: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    if element not in ELEMENTS:
        raise StepError(f"an input of type {element} cannot be filled with random values")
    kind = np.dtype(ELEMENTS[element])
    if kind.kind == "f":
        return generator.standard_normal(shape).astype(kind)
    # Integers may be indices or lengths: 0 and 1 are legal most often.
    return generator.integers(0, 2, shape).astype(kind)


def _name(model: Model) -> str:
    return "the model" if isinstance(model, bytes) else str(model)


def _refusal(model: Model, error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("InvalidProtobuf", "InvalidArgument") or "ModelProto does not have a graph" in str(error):
        return f"{_name(model)} is not an ONNX model: {_reason(error)}"
    return f"ONNX Runtime cannot load {_name(model)}: {_reason(error)}"


def _reason(error: Exception) -> str:
    """ONNX Runtime's message as one line, without error code, repeated path and source position."""
    text = " ".join(str(error).split())
    for noise in (
        r"^\[ONNXRuntimeError\] : \d+ : \w+ : ",
        r"^Load model from .*? failed:",
        r"^/\S+\.(cc|h):\d+ .*?\) (?=[A-Z])",
    ):
        text = re.sub(noise, "", text)
    return text
