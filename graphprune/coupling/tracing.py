"""Tracing: `torch.export` gives a graph of ATen operators, the rule table couples its axes."""

import copy
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from graphprune.coupling.axes import Axis, Finisher, Form, freeze, frozen_axis, leaves
from graphprune.coupling.graph import Layer, ModelGraph, Node, Parameter
from graphprune.coupling.operators import Attention, Convolution, Linear
from graphprune.coupling.rules import RULES, Call, shapes_of, unknown
from graphprune.errors import InputError, StepError

if TYPE_CHECKING:
    from graphprune.onnx_files.importing import Source

KEEPS_WEIGHTS = {"dropout", "dropout_", "clone", "contiguous", "to"}
KEEPS_SCORES = {"add", "add_", "sub", "mul", "mul_", "div", "div_", "masked_fill", "masked_fill_", "to"}
"""What may stand around the softmax of an attention that is spelled out."""
ACTIVATIONS = {"gelu", "relu", "silu", "relu_", "silu_", "hardswish"}


def trace(
    model: "nn.Module | Source",
    example_inputs: torch.Tensor | Sequence[torch.Tensor] | None = None,
    time_limit: float = 300,
) -> ModelGraph:
    """Trace a model into its graph. The model is left as it was.

    `model` is a torch module or an ONNX file (its path, or a ModelProto). `example_inputs` is a tensor or a tuple of
    tensors with a leading batch axis of any size; a file that declares all sizes but the batch needs none. Raises
    InputError where the model does not accept them or holds NaN weights, or a file is not ONNX or has operators that
    are not known; StepError where `torch.export` cannot trace it in `time_limit` seconds.
    """
    if not isinstance(model, nn.Module):
        from graphprune.onnx_files.importing import import_onnx

        model = import_onnx(model)
        example_inputs = model.example_inputs() if example_inputs is None else example_inputs
    if example_inputs is None:
        raise InputError("example_inputs are needed to trace a torch module")
    inputs = _as_tuple(example_inputs)
    _check_weights(model)
    pair = tuple(torch.cat([x, x])[:2].clone() if x.dim() else x for x in inputs)
    _check_forward(fresh_copy(model), pair)
    with _limit(time_limit):
        program = export(fresh_copy(model), pair, {})
        training = _training_program(program, model, pair)
    return coupled(program, model, training)


def coupled(
    program: torch.export.ExportedProgram,
    model: nn.Module,
    training: torch.export.ExportedProgram | None = None,
) -> ModelGraph:
    """The graph of an exported model; `training` is the model in train mode, where that reads more parameters."""
    return _Walk(program, model).graph(training)


def _training_program(
    program: torch.export.ExportedProgram, model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> torch.export.ExportedProgram | None:
    """The model in train mode, where only that reads some parameters (auxiliary heads) and all its calls have rules."""
    parameters = program.graph_signature.inputs_to_parameters
    state = state_of(model)
    read = {id(state[parameters[node.name]]) for node in program.graph.nodes if node.name in parameters and node.users}
    unread = [name for name in parameters.values() if id(state[name]) not in read]
    if not _reads_in_training(model, unread, inputs):
        return None
    try:
        found = export(copied(model).train(), inputs, {})
    except StepError:
        return None
    calls = [node for node in found.graph.nodes if node.op == "call_function" and shapes_of(node)]
    known = all(operator_name(node) in RULES or operator_name(node) == "getitem" for node in calls)
    return found if known else None


def _reads_in_training(model: nn.Module, names: Sequence[str], inputs: tuple[torch.Tensor, ...]) -> bool:
    """Whether a forward pass in train mode reads some of these parameters; costs far less than an export."""
    if not names:
        return False
    subject = copied(model).train()
    reads = _Reads({id(subject.get_parameter(name)) for name in names})
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), reads:
            subject(*inputs)
    except Exception:  # a model may refuse two random images in train mode; what it then reads nobody can tell
        return False
    return reads.found


class _Reads(TorchFunctionMode):
    """Notes whether some call gets one of these tensors."""

    def __init__(self, tensors: set[int]) -> None:
        super().__init__()
        self.tensors = tensors
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.found = self.found or any(id(leaf) in self.tensors for leaf in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _as_tuple(example_inputs: Any) -> tuple[torch.Tensor, ...]:
    inputs = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise InputError("example_inputs must be a tensor or a tuple of tensors")
    if not all(x.numel() for x in inputs):
        raise InputError("example_inputs must not be empty")
    return inputs


def fresh_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode. Modules that cache tensors in eval mode (attention biases) drop them in `train()`."""
    return copied(model).train().eval()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that cached a tensor with a gradient history, which torch refuses to copy."""
    leaves = (leaf for module in model.modules() for leaf in tree_leaves(vars(module)))
    cached = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in cached})


def _check_weights(model: nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise InputError(f"the weights hold NaN or infinity in {name!r}")


def _check_forward(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(x.shape)) for x in inputs)
        raise InputError(f"the model does not accept an input of shape {shapes}: {first_line(error)}") from None


def export(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> torch.export.ExportedProgram:
    """A call of a module as ATen operators, the first axis of each tensor of any size. Raises StepError."""
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for x in tree_leaves((inputs, named)):
        if isinstance(x, torch.Tensor) and x.dim():
            shapes[x] = {0: torch.export.Dim.AUTO}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            # Caches that the forward code fills (attention biases): the copy that is exported is thrown away.
            warnings.filterwarnings("ignore", message="The tensor attribute", category=UserWarning)
            return torch.export.export(model, inputs, named, dynamic_shapes=shapes, strict=False)
    except TimeoutError:
        raise StepError("torch.export did not finish within the time limit") from None
    except Exception as error:
        raise StepError(f"torch.export cannot trace this model: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What went wrong, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Interrupt the body after some seconds, where signals can do that (the main thread of a POSIX process)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, remaining, interval)  # another alarm of the process goes on
        signal.signal(signal.SIGALRM, before)


@dataclass
class _Walk:
    """One pass over the exported graph: couples axes, then finishes them into the frozen graph."""

    program: torch.export.ExportedProgram
    model: nn.Module
    known: dict[fx.Node, Any] = field(default_factory=dict)
    calls: dict[str, Call] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    tied: dict[int, list[Axis]] = field(default_factory=dict)
    """The axes of each tensor of the model, by its id."""
    read: set[int] = field(default_factory=set)
    """The tensors that some operator reads."""

    def graph(self, training: torch.export.ExportedProgram | None = None) -> ModelGraph:
        """The graph of the program; what only the training program reads is cut along with what it reads there."""
        self.couple()
        if training is not None:
            self._couple_training(training)
        for axis in (axis for tensor, axes in self.tied.items() if tensor not in self.read for axis in axes):
            freeze(axis, "no operator reads it")
        return self._finish()

    def _couple_training(self, program: torch.export.ExportedProgram) -> None:
        """Cut what only training reads along with what feeds it; what is no part of the deployed graph stays."""
        _Walk(program, self.model, tied=self.tied, read=self.read).couple()
        deployed = {id(leaf) for node in self.known if node.op == "call_function" for leaf in self._leaves(node)}
        read = (axis for tensor, axes in self.tied.items() if tensor in self.read for axis in axes)
        for leaf in (leaf for axis in read for leaf in leaves(axis)):
            if id(leaf) not in deployed:
                freeze(leaf, "only training reads it")

    def _leaves(self, node: fx.Node) -> Iterator[Axis]:
        """The atoms of all that a node reads and makes."""
        tensors = (axes for source in (node, *node.all_input_nodes) for axes in self._tensors(source))
        return (leaf for axes in tensors for axis in axes for leaf in leaves(axis))

    def couple(self) -> None:
        """Unify the axes that the program's operators hold together."""
        self._placeholders()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.known[node] = self._couple(node)
        (output,) = (node for node in self.program.graph.nodes if node.op == "output")
        for axis in (axis for source in output.all_input_nodes for axis in self._tensors(source)[0]):
            freeze(axis, "it is an output of the model")

    def _placeholders(self) -> None:
        signature = self.program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs if hasattr(spec.arg, "name")}
        state = state_of(self.model)
        for node in self.program.graph.nodes:
            if node.op != "placeholder" or not (shapes := shapes_of(node)):
                continue
            spec = specs[node.name]
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.names[node.name] = str(spec.target)
                tensor = id(state[str(spec.target)])
                self.known[node] = self.tied.setdefault(tensor, [Axis(size) for size in shapes[0]])
                if node.users:
                    self.read.add(tensor)
            else:
                why = "it is an input of the model" if spec.kind is InputKind.USER_INPUT else "a constant in the code"
                self.known[node] = [frozen_axis(size, why) for size in shapes[0]]

    def _couple(self, node: fx.Node) -> Any:
        if getattr(node.target, "__name__", "") == "getitem":
            source = self.known.get(node.args[0], [])  # type: ignore[arg-type]
            return source[node.args[1]] if source else []
        if not shapes_of(node):
            return []
        call = Call(node, _arguments(node), self.known, f"{operator_name(node)} in {owner_path(node) or 'the model'}")
        self.calls[node.name] = call
        rule = RULES.get(operator_name(node))
        result = rule.couple(call) if rule else unknown(call)
        tensors = [result] if not result or isinstance(result[0], Axis) else result
        return result if [[axis.size for axis in axes] for axes in tensors] == shapes_of(node) else unknown(call)

    def _tensors(self, node: fx.Node) -> list[list[Axis]]:
        value = self.known.get(node, [])
        return [value] if not value or isinstance(value[0], Axis) else value

    def _finish(self) -> ModelGraph:
        finisher = Finisher()
        forms = {node: [tuple(map(finisher.form, axes)) for axes in self._tensors(node)] for node in self.known}
        for call in self.calls.values():
            call.extra = {name: finisher.form(axis) for name, axis in call.extra.items()}  # type: ignore[misc]
            call.known = forms
        tensors = [node for node in self.known if node.op == "call_function" and forms[node] != [()]]
        layers = [layer for node in tensors if (layer := self._layer(node, forms)) is not None]
        return ModelGraph(
            nodes=tuple(self._node(node, forms) for node in tensors),
            parameters=tuple(self._parameter(node, forms) for node in self.known if node.name in self.names),
            layers=tuple(layers),
            atom_sizes=tuple(finisher.sizes),
            atom_frozen=tuple(finisher.reasons),
            inputs=tuple(self._inputs()),
            exported=self.program,
            calls=self.calls,
        )

    def _inputs(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The dtype and the shape, without the batch axis, of each input of the model."""
        for node in self.known:
            if node.op == "placeholder" and node.name in self.program.graph_signature.user_inputs:
                yield str(node.meta["val"].dtype).removeprefix("torch."), tuple(shapes_of(node)[0][1:])

    def _parameter(self, node: fx.Node, forms: dict[fx.Node, list[tuple[Form, ...]]]) -> Parameter:
        return Parameter(self.names[node.name], tuple(shapes_of(node)[0]), forms[node][0] if forms[node] else ())

    def _node(self, node: fx.Node, forms: dict[fx.Node, list[tuple[Form, ...]]]) -> Node:
        inputs = tuple(self.names.get(source.name, source.name) for source in node.all_input_nodes)
        shape = shapes_of(node)[0] if shapes_of(node) else []
        return Node(node.name, operator_name(node), owner_path(node), inputs, (1, *shape[1:]), forms[node][0])

    def _layer(self, node: fx.Node, forms: dict[fx.Node, list[tuple[Form, ...]]]) -> Layer | None:
        if node.name not in self.calls:
            return None
        name, call, module = operator_name(node), self.calls[node.name], owner_path(node)
        if name == "scaled_dot_product_attention":
            heads = call.extra.get("heads")
            operator = _attention(call["query"], call["key"], call["value"])
            widths = forms[call["query"]][0][-1], forms[call["value"]][0][-1]
            return Layer(node.name, module, "", heads, heads, None, operator, False, widths) if heads else None  # type: ignore[arg-type]
        if name == "matmul" and (product := attended(node)) is not None and len(forms[node][0]) > 3:
            query, key, value = product.args[0], product.args[1], node.args[1]
            heads, widths = forms[node][0][-3], (forms[query][0][-1], forms[value][0][-1])  # type: ignore[assignment,index]
            return Layer(node.name, module, "", heads, heads, None, _attention(query, key, value, True), False, widths)  # type: ignore[arg-type]
        if name not in ("conv2d", "linear"):
            return None
        weight = call["weight"]
        shape = shapes_of(weight)[0]
        source = forms[call["input"]][0]
        if name == "conv2d" and len(source) != 4:
            return None
        if name == "linear":
            return Layer(
                node.name, module, self.names.get(weight.name, ""), source[-1], forms[weight][0][0], None,
                _linear(node, shape), self._standard(node, weight),
            )  # fmt: skip
        groups = call.extra.get("groups")
        return Layer(
            node.name, module, self.names.get(weight.name, ""), source[1], forms[weight][0][0],
            groups, _convolution(call, shape), self._standard(node, weight),  # type: ignore[arg-type]
        )  # fmt: skip

    @cached_property
    def _holders(self) -> Counter[int]:
        """How many nodes hold the same axes, by their id: several where a parameter is tied."""
        return Counter(map(id, self.known.values()))

    def _standard(self, node: fx.Node, weight: fx.Node) -> bool:
        """A plain Conv2d or Linear called once, whose weight is its own, so that another may take its place."""
        path = owner_path(node)
        owner = self.model.get_submodule(path) if path else self.model
        forward, padding = type(owner).forward, self.calls[node.name].arguments.get("padding")
        plain = forward in (nn.Conv2d.forward, nn.Linear.forward) and not getattr(owner, "_forward_hooks", None)
        zeros = getattr(owner, "padding_mode", "zeros") == "zeros" and not isinstance(padding, str)
        alone = len(weight.users) == 1 and self._holders[id(self.known[weight])] == 1
        return plain and zeros and alone and self.names.get(weight.name) == f"{path}.weight"


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under all their names: a tied tensor appears once for each."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def operator_name(node: fx.Node) -> str:
    """The table's name of an operator: `conv2d`, or `namespace::name` outside ATen."""
    schema = getattr(node.target, "_schema", None)
    full = schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))
    return full.removeprefix("aten::")


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return dict(enumerate(node.args))  # type: ignore[arg-type]
    given = {argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    return {argument.name: given.get(argument.name, argument.default_value) for argument in schema.arguments}


def owner_path(node: fx.Node) -> str:
    """Path of the innermost module whose code made the call."""
    paths = module_paths(node)
    return paths[-1] if paths else ""


def module_paths(node: fx.Node) -> list[str]:
    """Paths of the modules within which a call was made, from the outermost to the innermost."""
    stack = [entry for entry in node.meta.get("nn_module_stack", {}).values() if isinstance(entry, tuple)]
    return [str(path) for path, _ in stack if not str(path).startswith("_empty_nn")]


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _convolution(call: Call, weight: list[int]) -> Convolution:
    _, inputs, height, width = shapes_of(call["input"])[0]
    kernel = (weight[2], weight[3])
    stride, dilation, padding = _pair(call["stride"]), _pair(call["dilation"]), call["padding"]
    if isinstance(padding, str):
        total = [0, 0] if padding == "valid" else [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        low = [amount // 2 for amount in total]
        ends = (low[0], low[1], total[0] - low[0], total[1] - low[1])
    else:
        ends = (*_pair(padding), *_pair(padding))
    return Convolution(1, inputs, weight[0], height, width, kernel, stride, dilation, ends, int(call["groups"]))


def _linear(node: fx.Node, weight: list[int]) -> Linear:
    rows = 1
    for size in shapes_of(node)[0][1:-1]:
        rows *= size
    users = [operator_name(user) for user in node.users if user.op == "call_function"]
    activation = users[0].rstrip("_") if len(users) == 1 and users[0] in ACTIVATIONS else ""
    return Linear(rows, weight[1], weight[0], activation)


def attended(node: fx.Node) -> fx.Node | None:
    """The product of queries and keys whose softmax a product applies to values, where the code spells that out."""
    weights = node.args[0]
    while isinstance(weights, fx.Node) and operator_name(weights) in KEEPS_WEIGHTS:
        weights = weights.args[0]
    if not isinstance(weights, fx.Node) or operator_name(weights) not in ("softmax", "_softmax"):
        return None
    scores = weights.args[0]
    while isinstance(scores, fx.Node) and operator_name(scores) in KEEPS_SCORES:
        whole = [x for x in scores.all_input_nodes if shapes_of(x) == shapes_of(weights)]
        scores = whole[0] if len(whole) == 1 else None
    return scores if isinstance(scores, fx.Node) and operator_name(scores) == "matmul" else None


def _attention(query: Any, key: Any, value: Any, transposed: bool = False) -> Attention:
    """The operator for queries, keys and values [.., heads, tokens, width]; transposed keys are [.., width, tokens]."""
    queries, keys, values = (shapes_of(x)[0] for x in (query, key, value))
    *leading, heads, _, _ = [1, *max((queries, keys, values), key=lambda shape: (len(shape), *shape[:-2]))]
    batch = 1
    for size in leading[2:]:
        batch *= size
    return Attention(batch, heads, queries[-2], keys[-1 if transposed else -2], queries[-1], values[-1])
