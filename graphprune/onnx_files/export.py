"""ONNX export. A file is only written once ONNX Runtime has reproduced what torch computes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError, StepError
from graphprune.files.atomic import staging
from graphprune.onnx_files.exporters import Request, convert, outputs_of, prepare, routes

EXTERNAL_BYTES = 2**31 - 2**24
"""Weights above this size go to a second file, `<name>.data`: a protobuf message ends at 2 GiB."""


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | Sequence[Tensor],
    dynamic_batch: bool = True,
    opset: int | None = None,
    tolerance: float = 1e-4,
) -> Path:
    """Export the model in eval mode to an ONNX file, and check the file in ONNX Runtime against torch.

    `example_inputs` is a tensor or a tuple of tensors with a leading batch axis, which may have any size in the file if
    `dynamic_batch`. `tolerance` bounds the largest difference as a share of the output's largest value, on random
    inputs at the example's batch and, if dynamic, at another. The model is left as it was. Raises InputError where the
    model does not accept the example or the file cannot be written. Raises StepError, with nothing written, where the
    values differ or the model cannot be exported; a batch axis that cannot be dynamic is such a case, no fixed one is
    put in its place. What one of torch's exporters cannot do the other is asked for.
    """
    path = Path(path)
    request = prepare(model, example_inputs, dynamic_batch, opset)
    batches = dict.fromkeys((request.batch, request.batch + 1 if dynamic_batch else request.batch))
    with staging(path.parent) as stage:

        def write(converted: ir.Model) -> None:
            _write(converted, stage / path.name)
            for batch in batches:
                _check(request, stage / path.name, [value.name for value in converted.graph.inputs], batch, tolerance)

        convert(request, routes(request), write)
    return path


def onnx_bytes(model: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> bytes:
    """The model in eval mode as ONNX, with a dynamic batch axis, unchecked: for measuring within a search.

    Raises as `export_onnx` does.
    """
    request = prepare(model, example_inputs, True, None)
    converted = convert(request, routes(request))
    data: bytes = ir.to_proto(converted).SerializeToString()
    return data


def _write(converted: ir.Model, path: Path) -> None:
    size = sum(value.const_value.nbytes for value in converted.graph.initializers.values())
    ir.save(converted, path, external_data=f"{path.name}.data" if size > EXTERNAL_BYTES else None)


def _check(request: Request, file: Path, names: list[str], batch: int, tolerance: float) -> None:
    """Raise StepError unless ONNX Runtime computes what torch does, on random inputs of this batch size."""
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        _random(x, batch if batched else x.shape[0] if x.dim() else 1, generator)
        for x, batched in zip(request.inputs, request.batched, strict=True)
    )
    feeds = {n: x.numpy() for n, x in zip(request.input_names, inputs, strict=True) if n in names}
    expected = [x.double().numpy() for x in outputs_of(request.model, inputs)]
    try:
        found = OnnxRuntimeEngine().run(file, feeds)
    except (InputError, StepError) as error:
        raise StepError(f"the exported model does not run at batch {batch}: {error}") from error
    for name, ours, theirs in zip(request.output_names, expected, found, strict=True):
        _compare(name, ours, np.asarray(theirs, dtype=np.float64), batch, tolerance)


def _compare(name: str, ours: NDArray[Any], theirs: NDArray[Any], batch: int, tolerance: float) -> None:
    where = f"{name!r} at batch {batch}"
    if ours.shape != theirs.shape:
        raise StepError(f"{where} has shape {ours.shape} in torch and {theirs.shape} in ONNX Runtime")
    if not ours.size:
        return
    difference = np.abs(ours - theirs)
    worst = np.unravel_index(np.argmax(difference), difference.shape)
    scale = np.abs(ours).max() or 1.0
    if not difference[worst] <= tolerance * scale:  # false for NaN as well
        raise StepError(
            f"{where} is {ours[worst]:.6g} in torch and {theirs[worst]:.6g} in ONNX Runtime: "
            f"a relative difference of {difference[worst] / scale:.2g}, more than {tolerance:g}"
        )


def _random(example: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Values drawn from the example (legal indices, true flags); normal ones where it holds only a single value."""
    shape = (length, *example.shape[1:]) if example.dim() else ()
    values = example.flatten()
    if example.is_floating_point() and bool((values == values[0]).all()):
        return torch.randn(shape, generator=generator).to(example.dtype)
    return values[torch.randint(len(values), shape, generator=generator)]
