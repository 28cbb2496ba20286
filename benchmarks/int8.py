"""ONNX Runtime's static quantisation, as its documentation advises: QDQ, calibrated, one scale per output channel.

Without VNNI instructions products of eight by eight bits saturate, so that weights have seven there; signed activations
would be slower than float32.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor


class Batches(CalibrationDataReader):
    """Calibration batches, one after the other."""

    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self.feeds: Iterator[dict[str, np.ndarray]] = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch; None at the end."""
        return next(self.feeds, None)


def vnni() -> bool:
    """Whether the processor has VNNI instructions; no where that cannot be read."""
    told = Path("/proc/cpuinfo")
    return told.exists() and "vnni" in told.read_text()


def quantise(file: Path, batches: Sequence[Tensor], name: str, target: Path) -> Path:
    """Write the int8 version of an ONNX file: unsigned activations, signed weights, scales from calibration batches.

    `name` is the file's input.
    """
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(file, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, target, Batches(name, batches), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=not vnni(),
        )  # fmt: skip
    return target
