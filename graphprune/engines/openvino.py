"""OpenVINO behind the engine contract (extra `openvino`)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import openvino
from google.protobuf.message import DecodeError
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

ELEMENTS: dict[str, type[np.generic]] = {
    "f32": np.float32, "f16": np.float16, "f64": np.float64, "i64": np.int64, "i32": np.int32, "i8": np.int8,
    "u8": np.uint8, "boolean": np.bool_,
}  # fmt: skip
"""Input element types of OpenVINO as numpy types."""

NOISE = ("Exception from", "Check '", "While validating", "FrontEnd API failed", "Summary:", "To facilitate")
"""Beginnings of lines in OpenVINO's messages that tell a user nothing."""


@dataclass(frozen=True)
class OpenVinoEngine:
    """Runs and times ONNX models in OpenVINO on the CPU, one request at a time, in float32.

    An operator's time in a profile holds one pass over its input too, which in a real network OpenVINO fuses into the
    layer in front of it: gains are understated, most where a layer does little.

    `threads` is the number of threads of that request. When timing, dynamic axes are made static, as OpenVINO wants
    them for its best speed: the first one is `batch`, every other one 1. Raises InputError for values below 1.
    """

    name: ClassVar[str] = "openvino"
    sparse_kernels: ClassVar[bool] = False
    threads: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        check_counts(threads=self.threads, batch=self.batch)

    @property
    def identity(self) -> str:
        """Version, device, threads and processor, and the batch where it is not 1."""
        version = openvino.get_version().partition("-")[0]
        parts = [f"openvino {version}", "CPU", f"{self.threads} threads", processor()]
        return ", ".join(parts + [f"batch {self.batch}"] * (self.batch != 1))

    def run(self, model: Model, inputs: Mapping[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """The outputs of one run. Raises InputError if the model cannot be loaded, StepError if it cannot be run."""
        read = _read(model)
        for port in read.inputs:  # a mismatch of some operators is not noticed when they run
            given = inputs.get(port.any_name)
            if given is None or not port.partial_shape.compatible(openvino.PartialShape(list(given.shape))):
                have = "nothing" if given is None else f"shape {list(given.shape)}"
                raise StepError(f"the input {port.any_name!r} is {port.partial_shape}, what is given is {have}")
        request = self._request(read, model)
        try:
            outputs = request.infer(dict(inputs))
        except RuntimeError as error:
            raise StepError(f"OpenVINO cannot run {name_of(model)}: {_reason(error)}") from None
        return [np.array(value) for value in outputs.values()]

    def measure(self, models: Sequence[Model], rounds: int = 30) -> list[Timing]:
        """Time the models in turns (see `graphprune.engines.sampling.interleaved`)."""
        return interleaved(self._load, models, rounds)

    def _load(self, model: Model) -> Run:
        read = _read(model)
        for port in read.inputs:
            if (kind := port.element_type.get_type_name()) not in ELEMENTS:
                raise StepError(f"an input of type {kind} cannot be filled with random values")
            if port.partial_shape.rank.is_dynamic:
                raise StepError(f"the input {port.any_name!r} has no fixed number of axes")
        firsts = [port.partial_shape[0] for port in read.inputs if len(port.partial_shape)]
        check_batch([None if first.is_dynamic else len(first) for first in firsts], self.batch)
        try:
            read.reshape({port: self._shape(port.partial_shape) for port in read.inputs})
        except RuntimeError as error:
            raise StepError(f"OpenVINO cannot fix the shapes of {name_of(model)}: {_reason(error)}") from None
        request = self._request(read, model)
        generator = np.random.default_rng(SEED)
        for port in read.inputs:
            element = ELEMENTS[port.element_type.get_type_name()]
            request.get_tensor(port).data[...] = random_values(generator, element, list(port.shape))

        def run() -> None:
            try:
                request.infer()
            except RuntimeError as error:
                raise StepError(f"OpenVINO cannot run it: {_reason(error)}") from None

        return run

    def _shape(self, declared: Any) -> list[int]:
        free = (self.batch if axis == 0 else 1 for axis in range(len(declared)))
        return [default if size.is_dynamic else len(size) for size, default in zip(declared, free, strict=True)]

    def _request(self, read: Any, model: Model) -> Any:
        settings = {
            "INFERENCE_NUM_THREADS": self.threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,  # pinned to a core that another process keeps busy, it would only wait
        }  # fmt: skip
        try:
            return openvino.Core().compile_model(read, "CPU", settings).create_infer_request()
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot load {name_of(model)}: {_reason(error)}") from None


def _read(model: Model) -> Any:
    check_file(model)
    try:
        known = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{name_of(model)} is not an ONNX model: {_reason(error)}") from None
    if not known.graph.node:
        raise InputError(f"{name_of(model)} is not an ONNX model: it has no operators")
    try:
        return openvino.Core().read_model(model if isinstance(model, bytes) else str(model))
    except RuntimeError as error:
        raise InputError(f"OpenVINO cannot load {name_of(model)}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """OpenVINO's message as one line, without places in its source, checks and advice."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(NOISE)]
    return " ".join(told) or type(error).__name__
