"""Surgery on the dense ONNX graph: a candidate's file in milliseconds, without exporting the candidate.

The third route to a pruned network, beside cutting the module and cutting its exported graph; all three compute the
same. The dense network is exported once (`onnx_template`). A cut then takes the weights that stay, writes the sizes
that change, shrinks, parts or groups convolutions, parts linear layers, leaves dropped branches out, and folds batch
norms into the convolutions before them, as torch's exporters do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from graphprune.coupling.branches import outermost
from graphprune.coupling.graph import Branch, Layer, ModelGraph, Parameter, Window
from graphprune.coupling.operators import Convolution, Linear
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.division import block_diagonal
from graphprune.cutting.exported import cut_program, plain_module
from graphprune.cutting.surgery import example_inputs, varied
from graphprune.cutting.window import window_padding
from graphprune.engines.onnxruntime import OnnxRuntimeEngine
from graphprune.errors import InputError, StepError
from graphprune.onnx_files.exporters import outputs_of
from graphprune.onnx_files.fold import crop, initializer
from graphprune.onnx_files.spread import fold_norm, spread
from graphprune.onnx_files.template import Template, make_template, sized

Array = NDArray[Any]
State = Mapping[str, torch.Tensor]
TOLERANCE = 1e-4
"""How far a cut file may be from the cut module, as a share of the largest output."""


class OnnxSurgeon:
    """Cuts the ONNX graph of one traced model, which is exported once, with a free batch axis.

    Raises StepError where torch cannot export it.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.template = make_template(graph)
        self.parameters = {parameter.name: parameter for parameter in graph.parameters}

    @property
    def input_name(self) -> str:
        """The name of the first input in the files."""
        return self.template.model.graph.inputs[0].name or ""

    def cut(self, cuts: Cuts, state: State | None = None) -> bytes:
        """The network with the cuts made, as ONNX.

        `state` is the state dict of the pruned module, repaired or not; without one the dense weights are sliced.
        Equal arguments give equal bytes. Raises StepError for a cut that cannot be made here, or another module's
        state.
        """
        self._refuse(cuts)
        model = self.template.model.clone()
        _Operation(self, model, cuts, state or {}).run()
        data: bytes = ir.to_proto(model).SerializeToString(deterministic=True)
        return data

    def check(self, cuts: Cuts) -> None:
        """Raise StepError unless the file computes, in ONNX Runtime, what the cut exported graph does.

        For a cut of everything that will ever be cut: what holds for all of it holds for its parts.
        """
        program = cut_program(self.graph, cuts, varied(plain_module(self.graph.exported)))
        inputs = example_inputs(self.graph.inputs)
        expected = outputs_of(program, inputs)
        names = [value.name or "" for value in self.template.model.graph.inputs]
        feeds = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        try:
            found = OnnxRuntimeEngine().run(self.cut(cuts, program.state_dict()), feeds)
        except InputError as error:
            raise StepError(f"the cut ONNX graph does not run: {error}") from error
        if not all(_close(got, wanted.numpy()) for got, wanted in zip(found, expected, strict=True)):
            raise StepError("the cut ONNX graph does not compute what the cut module does")

    def _refuse(self, cuts: Cuts) -> None:
        for atom in cuts.kept:
            if atom in self.template.fixed:
                raise StepError(f"the sizes in {self.template.fixed[atom]!r} cannot be changed in the ONNX graph")


@dataclass
class _Operation:
    """One cut of one copy of the graph."""

    surgeon: OnnxSurgeon
    model: ir.Model
    cuts: Cuts
    state: State

    def __post_init__(self) -> None:
        self.graph = self.model.graph
        self.values = {value.name: value for node in self.graph for value in node.outputs}
        layers = self.surgeon.graph.layer
        self.windows = {layers[node].weight: window for node, window in self.cuts.windows.items()}
        self.masks = {layers[node].weight: mask for node, mask in self.cuts.masks.items()}
        self.divided = {layers[node].weight: self.cuts.group_count(layers[node]) for node in self.cuts.groups}
        self.gone = {call for branch in self.cuts.dropped for call in branch.inside}

    @property
    def template(self) -> Template:
        return self.surgeon.template

    def run(self) -> None:
        """Make the cut."""
        for branch in outermost(self.cuts.dropped):
            self._drop(branch)
        if self.cuts.dropped:
            RemoveUnusedNodesPass()(self.model)
        for literal in self.template.literals:
            if literal.name in self.graph.initializers:
                _set(self.graph.initializers[literal.name], sized(literal, self.cuts.sizes))
        self._group()
        layers = self.surgeon.graph.layer
        for name in self.cuts.mixes:
            self._mix(layers[name])
        self._load()
        for name in self.cuts.groups:
            if isinstance(layers[name].operator, Linear):
                self._divide(layers[name])
        for name, window in self.cuts.windows.items():
            if name not in self.gone:
                self._shrink(layers[name], self._convolution(name), window)
        _simplify(self.model)

    def _value(self, call: str) -> ir.Value:
        name = self.template.result.get(call)
        if name not in self.values:
            raise StepError(f"{call!r} is not found in the ONNX graph")
        return self.values[name]

    def _convolution(self, call: str) -> ir.Node:
        maker = self._value(call).producer()
        if maker is None or maker.op_type not in ("Conv", "ConvTranspose"):
            raise StepError(f"{call!r} is no convolution in the ONNX graph")
        return maker

    def _drop(self, branch: Branch) -> None:
        """Let the readers of a sum read its skip."""
        total = self._value(branch.node)
        maker = total.producer()
        operands = list(maker.inputs) if maker is not None and maker.op_type == "Add" else []
        skips = [x for x in operands if x is not None and self.template.origin.get(x.name or "") not in branch.inside]
        if len(operands) != 2 or len(skips) != 1:
            raise StepError(f"the sum of {branch.name!r} is not found in the ONNX graph")
        if total.is_graph_output():
            raise StepError(f"the sum of {branch.name!r} is an output of the network")
        ir.convenience.replace_all_uses_with(total, skips[0])

    def _group(self) -> None:
        counts = {name: form.kept_size(self.cuts.sizes) for name, form in self.template.groups.items()}
        layers = [self.surgeon.graph.layer[name] for name in self.cuts.groups]
        counts |= {x.node: self.cuts.group_count(x) for x in layers if isinstance(x.operator, Convolution)}
        for name, count in counts.items():
            if name not in self.gone:
                self._convolution(name).attributes["group"] = ir.AttrInt64("group", count)

    # --- weights --------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        for name, value in list(self.graph.initializers.items()):
            if name in self.surgeon.parameters and value.dtype is not None and value.dtype.is_floating_point():
                _set(value, ir.Tensor(self._weight(self.surgeon.parameters[name], value), name=name))

    def _weight(self, parameter: Parameter, value: ir.Value) -> Array:
        """A weight as it stays: of the state, or the dense one's part."""
        shape = [form.kept_size(self.cuts.sizes) for form in parameter.axes]
        if parameter.name in self.windows:
            shape[2:] = [stop - start for start, stop in self.windows[parameter.name]]
        if parameter.name in self.divided:
            shape[1] //= self.divided[parameter.name]
        if parameter.name in self.state:
            found: Array = self.state[parameter.name].detach().cpu().numpy()
        else:
            found = self._sliced(parameter, value)
            if parameter.name in self.windows:
                rows, columns = self.windows[parameter.name]
                found = found[:, :, slice(*rows), slice(*columns)]
            if parameter.name in self.divided:
                found = block_diagonal(torch.from_numpy(found), self.divided[parameter.name]).numpy()
        if list(found.shape) != shape:
            raise StepError(f"the state holds {parameter.name!r} of shape {found.shape}, the cut needs {shape}")
        return np.ascontiguousarray(found)

    def _sliced(self, parameter: Parameter, value: ir.Value) -> Array:
        assert value.const_value is not None
        array: Array = value.const_value.numpy()
        if parameter.name in self.masks:
            mask = self.masks[parameter.name]
            array = array * mask.reshape(*mask.shape, *[1] * (array.ndim - 2))
        for axis, form in enumerate(parameter.axes):
            if form.atoms() & self.cuts.kept.keys():
                array = array.take(form.kept(self.cuts.kept), axis)
        return array

    # --- convolutions ---------------------------------------------------------------------------------------------

    def _shrink(self, layer: Layer, conv: ir.Node, window: Window) -> None:
        """Give a convolution the window of its kernel, and the pads and crop with which it reads what it did."""
        pads, dilation = (conv.attributes.get_ints(name) for name in ("pads", "dilations"))
        kernel = conv.attributes.get_ints("kernel_shape")
        left, right, top, bottom = window_padding(tuple(kernel), tuple(pads[:2]), tuple(dilation), window)  # type: ignore[arg-type]
        ends = np.array([top, left, bottom, right])
        operator = layer.operator
        assert isinstance(operator, Convolution)
        if (-ends > 2 * (operator.height, operator.width)).any():
            raise StepError(f"the window of {layer.module!r} reads nothing but padding")
        conv.attributes["kernel_shape"] = ir.AttrInt64s("kernel_shape", [stop - start for start, stop in window])
        conv.attributes["pads"] = ir.AttrInt64s("pads", np.maximum(ends, 0).tolist())
        assert conv.inputs[0] is not None
        conv.replace_input_with(0, crop(self.graph, conv, conv.inputs[0], np.maximum(-ends, 0)))

    def _mix(self, layer: Layer) -> None:
        """Put a convolution for each window, side by side, in the place of one."""
        conv = self._convolution(layer.node)
        source, weight, *bias = conv.inputs
        assert source is not None
        assert weight is not None
        path, first, outputs = layer.weight.rpartition(".")[0], 0, []
        runs = self.cuts.runs(layer)
        whole = [self._sliced(self.surgeon.parameters[value.name or ""], value) for value in (weight, *bias) if value]
        for number, ((rows, columns), count) in enumerate(runs):
            part = slice(first, first := first + count)
            dense = [whole[0][part, :, slice(*rows), slice(*columns)], *(array[part] for array in whole[1:])]
            inputs = [source]
            for leaf, array in zip(("weight", "bias"), dense, strict=False):
                inputs.append(initializer(self.graph, *self._part(f"{path}.parts.{number}.{leaf}", array)))
            made = ir.node("Conv", inputs, dict(conv.attributes))
            self.graph.insert_before(conv, made)
            self._shrink(layer, made, (rows, columns))
            outputs.append(made.outputs[0])
        self._join(conv, outputs, 1)

    def _join(self, node: ir.Node, outputs: Sequence[ir.Value], axis: int) -> None:
        """Let values, one after the other, take the place of what a node makes."""
        joined = ir.node("Concat", outputs, {"axis": axis})
        self.graph.insert_before(node, joined)
        ir.convenience.replace_all_uses_with(node.outputs[0], joined.outputs[0], replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    # --- linear layers --------------------------------------------------------------------------------------------

    def _divide(self, layer: Layer) -> None:
        """Put a product for each group, of its part of the input, in the place of one."""
        product, turned = self._product(layer)
        groups = self.cuts.group_count(layer)
        source, _, *bias = product.inputs
        parts = ir.node("Split", [source, self._equal_parts(layer, groups)], {"axis": -1}, num_outputs=groups)
        self.graph.insert_before(product, parts)
        constants = {layer.weight: turned} | {value.name or "": False for value in bias if value is not None}
        outputs = []
        for number, part in enumerate(parts.outputs):
            own = [self._own(name, number, groups, other_way) for name, other_way in constants.items()]
            made = ir.node(product.op_type, [part, *own], dict(product.attributes))
            self.graph.insert_before(product, made)
            outputs.append(made.outputs[0])
        self._join(product, outputs, -1)

    def _equal_parts(self, layer: Layer, groups: int) -> ir.Value:
        sizes = np.full(groups, layer.inputs.size // groups, np.int64)
        return initializer(self.graph, f"{layer.node}_parts", sizes)

    def _own(self, name: str, number: int, groups: int, turned: bool) -> ir.Value:
        """A group's rows of a weight or bias that is loaded, as columns where it is `turned`."""
        whole = self.graph.initializers[name].const_value
        assert whole is not None
        own = np.split(whole.numpy(), groups)[number]
        return initializer(self.graph, f"{name}.{number}", np.ascontiguousarray(own.T if turned else own))

    def _product(self, layer: Layer) -> tuple[ir.Node, bool]:
        """The product with a linear layer's weight, and whether that is transposed before."""
        weight = self.graph.initializers.get(layer.weight)
        readers = [use.node for use in weight.uses()] if weight is not None else []
        turned = [node.op_type for node in readers] == ["Transpose"]
        if turned:
            readers = [use.node for use in readers[0].outputs[0].uses()]
        if [node.op_type for node in readers] not in (["MatMul"], ["Gemm"]):
            raise StepError(f"{layer.module!r} is no single product in the ONNX graph")
        return readers[0], turned

    def _part(self, name: str, dense: Array) -> tuple[str, Array]:
        found = self.state[name].detach().cpu().numpy() if name in self.state else dense
        if found.shape != dense.shape:
            raise StepError(f"the state holds {name!r} of shape {found.shape}, the cut needs {dense.shape}")
        return name, np.ascontiguousarray(found)


def _close(got: Array, expected: Array) -> bool:
    if got.shape != expected.shape:
        return False
    return not got.size or bool(np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max())


def _set(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.const_value, value.shape = tensor, ir.Shape(tensor.shape)  # type: ignore[arg-type]


def _simplify(model: ir.Model) -> None:
    """Fold batch norms into convolutions, and transpositions into weights, in place."""
    graph = model.graph
    spread(model)
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if source is None:
            continue
        if node.op_type == "Transpose" and source.const_value is not None:
            turned = np.ascontiguousarray(source.const_value.numpy().transpose(node.attributes.get_ints("perm")))
            made = initializer(graph, f"{source.name}_transposed", turned)
            ir.convenience.replace_all_uses_with(node.outputs[0], made)
            graph.remove(node, safe=True)
        elif node.op_type == "BatchNormalization" and (conv := source.producer()) is not None:
            alone = conv.op_type == "Conv" and len(source.uses()) == 1 and not source.is_graph_output()
            if alone:
                fold_norm(graph, node, [conv])
    for value in list(graph.initializers.values()):
        if not value.uses():
            del graph.initializers[value.name or ""]
