"""The dense network as ONNX in which everything that a cut changes is found: where surgery on ONNX starts.

The graph that was traced is exported with a mark on each of its calls, so that every value of the file is known to be
the result of some call, and with it the forms of its axes. Sizes that a cut may change are then written as constants of
their own (`Literal`), never folded into others: while the file is simplified they, and the weights, are inputs, and no
size that may change is known. What is left is right for any cut once these constants and the weights are put in.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from graphprune.coupling.axes import Form
from graphprune.coupling.graph import ModelGraph
from graphprune.coupling.rules import RULES, shapes_of
from graphprune.coupling.tracing import first_line, operator_name
from graphprune.cutting.exported import plain_module
from graphprune.cutting.surgery import example_inputs
from graphprune.errors import StepError
from graphprune.onnx_files.exporters import ATTENTION, forget_source, prepare, tidy, translated

MARK = "traced_call"
VIEWS = frozenset({"view", "_unsafe_view", "reshape", "expand"})
SPLITS = frozenset({"split", "split_with_sizes", "chunk"})
CONVOLUTIONS = frozenset({f"{name}{n}d" for name in ("conv", "conv_transpose") for n in (1, 2, 3)})
SIZELESS = frozenset({"layer_norm", "rms_norm", "scaled_dot_product_attention"})
"""Operators whose sizes ONNX takes from their inputs."""

Forms = tuple[Form, ...]


@dataclass(frozen=True)
class Literal:
    """A constant of sizes, by its name in the file: a form for each size that may change, else the number."""

    name: str
    sizes: tuple[Form | int, ...]


@dataclass(frozen=True)
class Template:
    """The dense ONNX model and what is known of it; calls are named as in the traced graph.

    `origin`: value -> the call it belongs to; `result`: call -> the value that is its (first) output; `groups`:
    convolution -> the number of its groups, where it has several; `fixed`: atom -> the call for which it cannot be cut
    here.
    """

    model: ir.Model
    origin: Mapping[str, str]
    result: Mapping[str, str]
    literals: tuple[Literal, ...]
    groups: Mapping[str, Form]
    fixed: Mapping[int, str]


def make_template(graph: ModelGraph) -> Template:
    """Export a traced graph with its dense weights. Raises StepError where torch cannot."""
    module = plain_module(graph.exported).eval()
    for node in module.graph.nodes:
        node.meta["custom"] = {MARK: node.name}
    try:
        request = prepare(module, example_inputs(graph.inputs), True, None)
        with _Spelled():
            program = translated(replace(request, input_names=(), output_names=()))
        return _Builder(graph, program).template(request.input_names, request.output_names)
    except Exception as error:  # exporters raise anything, from TypeError to errors of their own
        raise StepError(f"the network cannot be exported for surgery: {first_line(error)}") from error


class _Spelled(TorchFunctionMode):
    """Attention as products and softmax, whose sizes need no literals; elsewhere its scale is written out.

    Both factors of the scores are scaled by the root, as torch's exporters do it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in ATTENTION:
            return func(*args, **(kwargs or {}))
        names = [argument.name for argument in torch.ops.aten.scaled_dot_product_attention.default._schema.arguments]
        given = dict(zip(names, args, strict=False)) | (kwargs or {})
        query, key, value, mask = (given.get(name) for name in (*names[:3], "attn_mask"))
        scale = query.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]  # type: ignore[union-attr]
        boolean = mask is not None and mask.dtype == torch.bool
        if boolean or given.get("is_causal") or given.get("enable_gqa"):
            return func(**given | {"scale": scale})
        scores = (query * scale**0.5) @ (key.transpose(-2, -1) * scale**0.5)  # type: ignore[operator, union-attr]
        return (scores if mask is None else scores + mask).softmax(-1) @ value  # type: ignore[operator]


@dataclass
class _Builder:
    """One pass over torch's exported program, then over the file it became."""

    graph: ModelGraph
    program: torch.onnx.ONNXProgram
    forms: dict[str, Forms] = field(default_factory=dict)
    """The forms of values, where they are known."""
    values: dict[str, ir.Value] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    literals: dict[tuple[Form | int, ...], ir.Value] = field(default_factory=dict)
    groups: dict[str, Form] = field(default_factory=dict)
    fixed: dict[int, str] = field(default_factory=dict)

    @property
    def nodes(self) -> list[fx.Node]:
        """The calls of the program that was translated."""
        program = self.program.exported_program
        assert program is not None
        return [node for node in program.graph.nodes if node.op == "call_function"]

    def template(self, inputs: Sequence[str], outputs: Sequence[str]) -> Template:
        """Simplify the file, and tell what is what; inputs and outputs get these names."""
        model = self.program.model
        self.values = {value.name: value for node in model.graph for value in node.outputs if value.name}
        self._find_forms()
        self.origin, result = self._origins(model.graph), self._results()
        for node in self.nodes:
            self._open(node)
        dense = self._close(model.graph)
        tidy(model)
        self._fill(model.graph, dense)
        forget_source(model)
        renamed = _rename(model.graph, inputs, outputs)
        return Template(
            model,
            {renamed.get(name, name): call for name, call in self.origin.items()},
            {call: renamed.get(name, name) for call, name in result.items()},
            self._named_literals(), self.groups, self.fixed,
        )  # fmt: skip

    # --- what belongs to what -------------------------------------------------------------------------------------

    def _find_forms(self) -> None:
        known = {node.name: tensors for call in self.graph.calls.values() for node, tensors in call.known.items()}
        last = {_mark(node): node.name for node in self.nodes if operator_name(node) != "getitem"}
        for node in self.nodes:
            call = self.graph.calls.get(_mark(node))
            if call is None or not shapes_of(node):
                continue
            own = list(known[call.node.name])
            around = [known[source.name][0] for source in call.node.all_input_nodes if known.get(source.name)]
            if operator_name(node) == "getitem" and len(own) > 1:
                own, around = [own[node.args[1]]], []  # type: ignore[index]
            first = own[:1] if last[_mark(node)] == node.name else []
            for candidates in (first, [*own, *around]):
                fitting = {forms for forms in candidates if [form.size for form in forms] == shapes_of(node)[0]}
                if len(fitting) == 1 and node.name not in self.forms:
                    self.forms[node.name] = fitting.pop()

    def _origins(self, graph: ir.Graph) -> dict[str, str]:
        marks = {node.name: _mark(node) for node in self.nodes}
        origin = {}
        for node in graph:
            text = re.match(r"%(\w+)", node.metadata_props.get("pkg.torch.onnx.fx_node", ""))
            for value in node.outputs if text else ():
                origin[value.name or ""] = marks.get(text[1], "")  # type: ignore[index]
        return origin

    def _results(self) -> dict[str, str]:
        """The value that each traced call became: of its last call, or of the first part of a tuple."""
        found: dict[str, str] = {}
        for node in self.nodes:
            if node.name in self.values and not (operator_name(node) == "getitem" and node.args[1]):
                found[_mark(node)] = node.name
        return found

    # --- sizes ----------------------------------------------------------------------------------------------------

    def _open(self, node: fx.Node) -> None:
        """Make constants of the sizes that a call holds and a cut may change."""
        name = operator_name(node)
        rule = RULES.get(name)
        if node.name not in self.values and name not in SPLITS:
            return
        if name in self._openers:
            self._openers[name](node)
        elif rule is not None and rule.literals is not None and name not in SIZELESS:
            self._fix(node)

    @property
    def _openers(self) -> dict[str, Callable[[fx.Node], None]]:
        return {
            **dict.fromkeys(SPLITS, self._open_split),
            **dict.fromkeys(VIEWS, self._open_view),
            **dict.fromkeys(CONVOLUTIONS, self._open_convolution),
            "slice": self._open_slice,
            "group_norm": self._open_group_norm,
            "mean": self._pool,
        }

    def _open_view(self, node: fx.Node) -> None:
        maker, forms = self.values[node.name].producer(), self.forms.get(node.name)
        sizes: Sequence[Any] = node.args[1]  # type: ignore[assignment]
        if forms is None or maker is None or maker.op_type not in ("Reshape", "Expand"):
            self._fix(node)
            return
        if maker.op_type == "Expand":
            self._open_expansion(node, maker, forms)
            return
        known = [isinstance(size, int) for size in node.meta["val"].shape]
        told = [-1 if isinstance(size, fx.Node) else size for size in sizes]
        if told.count(-1) > 1:  # one was written in the code, and its size is known
            told = [form.size if k and size == -1 else size for k, size, form in zip(known, told, forms, strict=True)]
        moves = [size > 1 and self._movable(form) for size, form in zip(told, forms, strict=True)]
        if not any(moves):
            return
        if told.count(-1) > 1:
            self._fix(node)
            return
        wanted = [form if move else size for size, form, move in zip(told, forms, moves, strict=True)]
        maker.replace_input_with(1, self._literal(node.name, wanted))

    def _open_expansion(self, node: fx.Node, maker: ir.Node, forms: Forms) -> None:
        """A size that may change is that of the source, for which ONNX takes a 1; all others stay."""
        sizes: Sequence[Any] = node.args[1]  # type: ignore[assignment]
        moves = [self._movable(form) and size not in (1, -1) for size, form in zip(sizes, forms, strict=True)]
        pieces = maker.inputs[1].producer() if maker.inputs[1] is not None else None
        if not any(moves):
            return
        if all(isinstance(size, int) for size in sizes):
            ones = [1 if move or size == -1 else size for size, move in zip(sizes, moves, strict=True)]
            maker.replace_input_with(1, self._literal(node.name, ones))
        elif pieces is not None and pieces.op_type == "Concat" and len(pieces.inputs) == len(sizes):
            one = self._literal(node.name, [1])
            for number in np.flatnonzero(moves):
                pieces.replace_input_with(int(number), one)
        else:
            self._fix(node)

    def _open_slice(self, node: fx.Node) -> None:
        given = dict(zip(("source", "dim", "start", "end"), node.args, strict=False))
        source, axis = self.forms.get(given["source"].name), int(given.get("dim", 0))  # type: ignore[union-attr, arg-type]
        if source is None or not self._movable(source[axis]) or self.forms.get(node.name) == source:
            return
        call, maker = self.graph.calls.get(_mark(node)), self.values[node.name].producer()
        if call is None or "middle" not in call.extra or maker is None or maker.op_type != "Slice":
            self._fix(node)
            return
        before, middle = call.extra["before"], call.extra["middle"]
        until = Form(before.size + middle.size, kind="sum", parts=(before, middle))  # type: ignore[arg-type]
        maker.replace_input_with(1, self._literal(f"{node.name}_start", [before]))  # type: ignore[list-item]
        maker.replace_input_with(2, self._literal(f"{node.name}_end", [until]))

    def _open_split(self, node: fx.Node) -> None:
        """Write a sequence of parts as a Split with its sizes."""
        parts = {user.args[1]: self.values[user.name] for user in node.users if user.name in self.values}
        call = self.graph.calls.get(_mark(node))
        tensors = call.known[call.node] if call is not None else []
        axis = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        sizes = [forms[axis] for forms in tensors]  # type: ignore[index]
        if not any(map(self._movable, sizes)):
            return
        maker = next((self._maker(value) for value in parts.values()), None)
        if maker is None or len(sizes) != len(shapes_of(node)):
            self._fix(node)
            return
        rank = len(tensors[0])
        made = ir.node(
            "Split",
            [maker.inputs[0], self._literal(node.name, sizes)],
            {"axis": int(axis) % rank},  # type: ignore[arg-type]
            num_outputs=len(sizes),
        )
        maker.graph.insert_before(maker, made)  # type: ignore[union-attr]
        for number, value in parts.items():
            self._take_over(value, made.outputs[number])  # type: ignore[index]

    @staticmethod
    def _maker(value: ir.Value) -> ir.Node | None:
        """The node that takes a tensor apart of which the value is a part."""
        maker = value.producer()
        if maker is not None and maker.op_type == "SequenceAt" and maker.inputs[0] is not None:
            maker = maker.inputs[0].producer()
        return maker if maker is not None and maker.op_type in ("Split", "SplitToSequence") else None

    def _open_convolution(self, node: fx.Node) -> None:
        """A convolution without a bias has none, where torch writes zeros as many as the filters."""
        maker, call = self.values[node.name].producer(), self.graph.calls.get(_mark(node))
        if maker is None or call is None or maker.op_type not in ("Conv", "ConvTranspose"):
            self._fix(node)
            return
        if len(node.args) < 3 or node.args[2] is None:
            maker.resize_inputs(2)
        if "groups" in call.extra:
            self.groups[call.node.name] = call.extra["groups"]  # type: ignore[assignment]

    def _open_group_norm(self, node: fx.Node) -> None:
        """The number of groups is the size of the instance norm's weights, and of the axis that it runs over."""
        call = self.graph.calls[_mark(node)]
        groups: Form = call.extra["groups"]  # type: ignore[assignment]
        if not self._movable(groups):
            return
        makers = [made for made in self.program.model.graph if made.op_type == "InstanceNormalization"]
        (norm,) = [made for made in makers if self.origin.get(made.outputs[0].name or "") == call.node.name] or [None]
        weight = norm.inputs[1].producer() if norm is not None and norm.inputs[1] is not None else None
        if weight is None or weight.op_type != "Expand" or weight.inputs[1] is None:
            self._fix(node)
        else:
            ir.convenience.replace_all_uses_with(weight.inputs[1], self._literal(node.name, [groups]))

    def _pool(self, node: fx.Node) -> None:
        """Global pooling, which torch writes as a mean: engines keep their blocked layout for it, not for a mean."""
        call, maker = self.graph.calls.get(_mark(node)), self.values[node.name].producer()
        pools = call is not None and operator_name(call.node).startswith("adaptive_avg_pool")
        if not pools or maker is None or maker.op_type != "ReduceMean":
            return
        if len(node.args[1]) == len(node.meta["val"].shape) - 2:  # type: ignore[arg-type]
            made = ir.node("GlobalAveragePool", maker.inputs[:1])
            maker.graph.insert_before(maker, made)  # type: ignore[union-attr]
            self._take_over(maker.outputs[0], made.outputs[0])

    def _take_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let a value take the name and the readers of another."""
        new.dtype, new.name, old.name = old.dtype, old.name, f"{old.name}_before"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.values[new.name or ""] = new

    def _literal(self, name: str, sizes: Sequence[Form | int]) -> ir.Value:
        """A constant of these sizes, the same for all calls that need it: what is computed twice alike is merged."""
        if tuple(sizes) not in self.literals:
            shape, kind = ir.Shape([len(sizes)]), ir.TensorType(ir.DataType.INT64)
            self.literals[tuple(sizes)] = ir.Value(name=f"{name}_sizes", shape=shape, type=kind)
        return self.literals[tuple(sizes)]

    def _movable(self, form: Form) -> bool:
        return any(not self.graph.atom_frozen[atom] for atom in form.atoms())

    def _fix(self, node: fx.Node) -> None:
        """Nothing that this call reads or makes can be cut here."""
        call = self.graph.calls.get(_mark(node))
        sources = (call.node, *call.node.all_input_nodes) if call is not None else ()
        tensors = [tensor for source in sources for tensor in call.known.get(source, [])]  # type: ignore[union-attr]
        for atom in {atom for tensor in tensors for form in tensor for atom in form.atoms()}:
            if not self.graph.atom_frozen[atom]:
                self.fixed.setdefault(atom, operator_name(node))

    # --- simplification -------------------------------------------------------------------------------------------

    def _close(self, graph: ir.Graph) -> dict[str, ir.TensorProtocol]:
        """Make inputs of weights and literals, and forget sizes that may change. Returns the dense weights."""
        parameters = {parameter.name: parameter.axes for parameter in self.graph.parameters}
        for value in self.values.values():
            if value.shape is not None:
                self._forget_sizes(value, self.forms.get(value.name or ""))
        dense = {}
        for name, axes in parameters.items():
            value = graph.initializers.get(name)  # type: ignore[assignment]
            if value is not None and value.dtype is not None and value.dtype.is_floating_point():
                dense[name] = graph.initializers.pop(name).const_value
                value.const_value = None
                self._forget_sizes(value, axes)
                graph.inputs.append(value)
        graph.inputs.extend(self.literals.values())
        return dense  # type: ignore[return-value]

    def _forget_sizes(self, value: ir.Value, forms: Forms | None) -> None:
        if forms is None or value.shape is None or len(forms) != len(value.shape):
            value.shape = None
            return
        value.shape = ir.Shape(
            [None if self._movable(form) else size for form, size in zip(forms, value.shape, strict=True)]
        )

    def _named_literals(self) -> tuple[Literal, ...]:
        return tuple(Literal(value.name or "", sizes) for sizes, value in self.literals.items())

    def _fill(self, graph: ir.Graph, dense: Mapping[str, ir.TensorProtocol]) -> None:
        """Put the dense weights and literals in again."""
        literals = {literal.name: literal for literal in self._named_literals()}
        for value in [value for value in graph.inputs if value.name in dense or value.name in literals]:
            name = value.name or ""
            graph.inputs.remove(value)
            tensor = dense[name] if name in dense else sized(literals[name], {})
            value.const_value, value.shape = tensor, ir.Shape(tensor.shape)  # type: ignore[arg-type]
            if value.uses():
                graph.register_initializer(value)
        for node in graph:
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None


def sized(literal: Literal, sizes: Mapping[int, int]) -> ir.TensorProtocol:
    """The constant when atom `a` keeps `sizes[a]` units."""
    numbers = [size if isinstance(size, int) else size.kept_size(sizes) for size in literal.sizes]
    return ir.tensor(np.array(numbers, np.int64), name=literal.name)


def _mark(node: fx.Node) -> str:
    """The call of the traced graph that a call of the translated program stems from."""
    return str(node.meta.get("custom", {}).get(MARK, ""))


def _rename(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, str]:
    renamed = {}
    for value, name in [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)]:
        renamed[value.name or ""] = name
        value.name = name
    return renamed
