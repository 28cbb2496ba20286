"""ONNX Runtime behind the engine contract."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from graphprune.engines.base import Model, Timing
from graphprune.engines.sampling import (
    SEED,
    Run,
    check_batch,
    check_counts,
    check_file,
    interleaved,
    name_of,
    processor,
    random_values,
)
from graphprune.errors import InputError, StepError

OPTIMISATION = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
"""The graph optimisation levels by name; "all" includes the blocked convolution layout."""

ELEMENTS: dict[str, type[np.generic]] = {
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

    name: ClassVar[str] = "onnxruntime"
    sparse_kernels: ClassVar[bool] = False
    """It multiplies zeros like any other number (`benchmarks/operators.py`)."""
    threads: int = 1
    provider: str = "CPUExecutionProvider"
    optimisation: str = "all"
    batch: int = 1

    def __post_init__(self) -> None:
        check_counts(threads=self.threads, batch=self.batch)
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
        return self.loaded(model)(inputs)

    def loaded(self, model: Model) -> Callable[[Mapping[str, NDArray[np.generic]]], list[NDArray[np.generic]]]:
        """What runs the model as `run` does, loaded once. Raises InputError if it cannot be loaded."""
        session = self._session(model)

        def run(inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
            try:
                outputs: list[NDArray[np.generic]] = session.run(None, dict(inputs))
            except Exception as error:  # ONNX Runtime's errors share no base class of their own
                raise StepError(f"ONNX Runtime cannot run {name_of(model)}: {_reason(error)}") from None
            return outputs

        return run

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        """Time the models in turns (see `graphprune.engines.sampling.interleaved`)."""
        return interleaved(self._load, models, rounds)

    def _load(self, model: Model) -> Run:
        session = self._session(model)
        inputs = self._inputs(session)

        def run() -> None:
            try:
                session.run(None, inputs)
            except Exception as error:  # ONNX Runtime's errors share no base class of their own
                raise StepError(f"ONNX Runtime cannot run it: {_reason(error)}") from None

        return run

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
        check_file(model)
        try:
            return onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=providers
            )
        except Exception as error:  # see run
            raise InputError(_refusal(model, error)) from None

    def _inputs(self, session: Any) -> dict[str, NDArray[np.generic]]:
        generator = np.random.default_rng(SEED)
        entries, found = session.get_inputs(), {}
        firsts = [entry.shape[0] for entry in entries if entry.shape]
        check_batch([first if isinstance(first, int) else None for first in firsts], self.batch)
        for entry in entries:
            if entry.type not in ELEMENTS:
                raise StepError(f"an input of type {entry.type} cannot be filled with random values")
            found[entry.name] = random_values(generator, ELEMENTS[entry.type], self._shape(entry.shape))
        return found

    def _shape(self, declared: Sequence[int | str | None]) -> tuple[int, ...]:
        free = (self.batch if axis == 0 else 1 for axis in range(len(declared)))
        return tuple(size if isinstance(size, int) else default for size, default in zip(declared, free, strict=True))


def _refusal(model: Model, error: Exception) -> str:
    kind = type(error).__name__
    if kind in ("InvalidProtobuf", "InvalidArgument") or "ModelProto does not have a graph" in str(error):
        return f"{name_of(model)} is not an ONNX model: {_reason(error)}"
    return f"ONNX Runtime cannot load {name_of(model)}: {_reason(error)}"


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
