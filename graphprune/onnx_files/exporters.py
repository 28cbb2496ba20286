"""torch's two ONNX exporters behind one interface: a request goes in, an onnx-ir model comes out."""

import copy
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graphprune.cutting.zeros import drop_zeros
from graphprune.errors import InputError, StepError
from graphprune.onnx_files.fold import fold_pads
from graphprune.onnx_files.spread import spread

TIDY_NODES = 1000
"""Up to this many nodes onnxscript's rewriter runs over a graph: its time grows faster than they do (65 s for the 7,372
of a coat_tiny, 25 s for a swinv2_tiny). ONNX Runtime runs both files equally fast."""

_LOGGERS = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Request:
    """What is exported: a copy of the model, its inputs with a batch of at least 2, and the names in the file."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    batched_outputs: tuple[bool, ...]
    dynamic: bool
    opset: int | None

    @property
    def batch(self) -> int:
        return self.inputs[0].shape[0] if self.inputs[0].dim() else 1

    @property
    def batched(self) -> tuple[bool, ...]:
        """Which inputs have the batch axis: those whose first axis is as long as that of the first input."""
        return _batched(self.inputs, self.inputs[0])


def prepare(model: nn.Module, example: Tensor | Sequence[Tensor], dynamic: bool, opset: int | None) -> Request:
    inputs = _checked((example,) if isinstance(example, Tensor) else tuple(example))
    if dynamic and inputs[0].shape[:1] == (1,):  # torch.export would treat a batch of 1 as fixed
        single = _batched(inputs, inputs[0])
        inputs = tuple(torch.cat([x, x]) if alone else x for x, alone in zip(inputs, single, strict=True))
    subject = copy.deepcopy(model).cpu()
    for module in subject.modules():
        module.training = False  # as eval() does, which an exported graph refuses
    outputs = outputs_of(subject, inputs)
    return Request(
        model=subject,
        inputs=inputs,
        input_names=_input_names(subject, len(inputs)),
        output_names=_output_names(subject, len(outputs)),
        output_shapes=tuple(tuple(x.shape) for x in outputs),
        batched_outputs=_batched(outputs, inputs[0]),
        dynamic=dynamic,
        opset=opset,
    )


def _checked(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not given or not all(isinstance(x, Tensor) for x in given):
        raise InputError("example_inputs must be a tensor or a tuple of tensors")
    if any(x.dtype == torch.bfloat16 for x in given):
        raise InputError("ONNX Runtime takes no bfloat16 inputs: export the model in float32")
    return tuple(x.detach().cpu() for x in given)


def _batched(tensors: Sequence[Tensor], first: Tensor) -> tuple[bool, ...]:
    """Which tensors have the batch axis: those whose first axis is as long as that of the first input."""
    return tuple(x.dim() > 0 and first.dim() > 0 and len(x) == len(first) for x in tensors)


def outputs_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The model's outputs, flattened."""
    try:
        with torch.no_grad():
            leaves = tree_leaves(model(*inputs))
    except Exception as error:  # a forward pass may raise anything; the caller's input is the cause
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise InputError(f"the model does not accept inputs of shape {shapes}: {_reason(error)}") from error
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _input_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """The names of the file that the model was read from, else those of forward's parameters, else input_0, ..."""
    own = getattr(model, "input_names", ())
    if len(own) == count:
        return tuple(own)
    parameters = list(inspect.signature(model.forward).parameters.values())[:count]
    named = all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY) for p in parameters)
    if named and len(parameters) == count:
        return tuple(parameter.name for parameter in parameters)
    return tuple(f"input_{index}" for index in range(count))


def _output_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """The names of the file that the model was read from, else output, or output_0, output_1 and so on."""
    own = getattr(model, "output_names", ())
    if len(own) == count:
        return tuple(own)
    return ("output",) if count == 1 else tuple(f"output_{index}" for index in range(count))


Route = Callable[[Request], ir.Model]


def _accept(converted: ir.Model) -> None:
    """Nothing is asked of the file."""


def convert(request: Request, routes: Sequence[Route], accept: Callable[[ir.Model], None] = _accept) -> ir.Model:
    """The model from the first exporter whose file, rewritten for the engine, is accepted: `accept` raises otherwise.

    Of several failures a refusal is told before an exporter's own error.
    """
    failures: list[Exception] = []
    for route in routes:
        try:
            converted = _converted(request, route)
            accept(converted)
        except Exception as error:  # exporters raise anything, from TypeError to errors of their own
            failures.append(error)
        else:
            return converted
    refusal = next((error for error in failures if isinstance(error, StepError)), None)
    if refusal is not None:
        raise refusal
    advice = "; dynamic_batch=False may help" if request.dynamic else ""
    raise StepError(f"the model cannot be exported to ONNX: {_reason(failures[0])}{advice}") from failures[0]


def _converted(request: Request, route: Route) -> ir.Model:
    with torch.no_grad(), _silence():
        converted = route(request)
        fold_pads(converted)
        spread(converted)
        drop_zeros(converted)
    _declare_outputs(converted, request)
    forget_source(converted)
    return converted


def _declare_outputs(model: ir.Model, request: Request) -> None:
    """State the sizes of the outputs that are known, in place: the older exporter loses some of them."""
    for value, shape, batched in zip(model.graph.outputs, request.output_shapes, request.batched_outputs, strict=True):
        if not request.dynamic:
            value.shape = ir.Shape(shape)
        elif batched:
            value.shape = ir.Shape(["batch", *shape[1:]])


def routes(request: Request) -> tuple[Route, ...]:
    """The exporters to try, in their order.

    torch's older one comes first: its files run as fast, and it takes a fraction of the time
    (`benchmarks/exporters.py`). But it writes the example's batch size into exported graphs.
    """
    if request.dynamic and any(isinstance(module, fx.GraphModule) for module in request.model.modules()):
        return (by_dynamo,)
    return (by_torchscript, by_dynamo)


def forget_source(model: ir.Model) -> None:
    """Drop what exporters note of the source code, in place: stack traces name folders of the machine they ran on."""
    for holder in (model, model.graph, *model.graph, *(value for node in model.graph for value in node.outputs)):
        holder.metadata_props.clear()
    for node in model.graph:
        node.doc_string = None


def by_dynamo(request: Request) -> ir.Model:
    """torch.export, then torch's own ONNX translation and onnxscript's optimiser."""
    return tidy(translated(request).model)


def translated(request: Request) -> torch.onnx.ONNXProgram:
    """torch.export and torch's own ONNX translation, operator by operator."""
    batch = torch.export.Dim("batch")
    axes: tuple[Any, ...] = tuple({0: batch} if batched else None for batched in request.batched)
    if any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(request.model.forward).parameters.values()):
        axes = (axes,)
    with torch.no_grad(), _silence(), _Translatable():
        program = torch.onnx.export(
            request.model,
            request.inputs,
            input_names=request.input_names,
            output_names=request.output_names,
            opset_version=request.opset,
            dynamic_shapes=axes if request.dynamic else None,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
    if program is None:
        raise StepError("the exporter returned nothing")
    return program


_POOLING = (
    F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d,
    torch.ops.aten.adaptive_avg_pool1d.default,
    torch.ops.aten.adaptive_avg_pool2d.default,
)


ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)


class _Translatable(TorchFunctionMode):
    """Calls that torch's translation to ONNX takes badly, as equal ones that it takes well.

    Global pooling of a channels-last tensor is traced to `as_strided`, which ONNX can only write as a gather; attention
    is translated for four axes alone.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _POOLING:
            args = (args[0].contiguous(), *args[1:])
        if func in ATTENTION and args[0].dim() != 4:
            return _with_four_axes(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _with_four_axes(
    func: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **named: Any
) -> Tensor:
    """Attention [..., heads, tokens, width] or [batch, tokens, width] with its leading axes as one."""

    def folded(x: Tensor) -> Tensor:
        heads = x.shape[-3] if x.dim() > 4 else 1
        return x.reshape(-1, heads, *x.shape[-2:])

    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = folded(attn_mask.expand(*query.shape[:-2], *attn_mask.shape[-2:]))
    result: Tensor = func(folded(query), folded(key), folded(value), attn_mask, *rest, **named)
    return result.clone(memory_format=torch.contiguous_format).reshape(*query.shape[:-1], value.shape[-1])


def tidy(model: ir.Model) -> ir.Model:
    """Simplify what torch translates operator by operator, in place; large graphs only where it is quick."""
    from onnxscript import optimizer

    if len(model.graph) <= TIDY_NODES:
        optimizer.optimize(model)
    else:
        optimizer.fold_constants(model)
        optimizer.remove_unused_nodes(model)
    return model


def by_torchscript(request: Request) -> ir.Model:
    """torch's older exporter: a trace through the model's code."""
    buffer = io.BytesIO()
    inputs = [n for n, batched in zip(request.input_names, request.batched, strict=True) if batched]
    outputs = [n for n, batched in zip(request.output_names, request.batched_outputs, strict=True) if batched]
    torch.onnx.export(
        request.model,
        request.inputs,
        buffer,  # type: ignore[arg-type]  # the older exporter takes a stream, its declaration does not say so
        input_names=request.input_names,
        output_names=request.output_names,
        opset_version=request.opset,
        dynamic_axes={name: {0: "batch"} for name in inputs + outputs} if request.dynamic else None,
        dynamo=False,
    )
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporters from warning (of their own deprecations) and logging; what fails arrives as an exception.

    The older one would print the whole graph when it fails, whatever its log level.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), patch.object(torch._C, "_jit_onnx_log", create=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the error that started it all: exporters wrap theirs in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
