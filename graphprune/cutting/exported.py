"""Cutting the exported graph: its parameters are sliced and its literals rewritten by the rule table."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from graphprune.coupling.axes import Form
from graphprune.coupling.branches import gone_parameters, outermost
from graphprune.coupling.graph import Branch, ModelGraph
from graphprune.coupling.rules import RULES
from graphprune.coupling.tracing import operator_name, owner_path, state_of
from graphprune.cutting.cuts import Cuts
from graphprune.cutting.division import block_diagonal, grouped_linear
from graphprune.cutting.masked import MaskedConv2d, MaskedLinear, zeroed
from graphprune.cutting.parts import Part
from graphprune.cutting.window import mixed, padded_conv2d, window_padding

_SPLITS = {"split", "chunk", "unsafe_chunk", "tensor_split"}


def literal_changes(graph: ModelGraph, cuts: Cuts) -> Iterator[tuple[str, str, Any, Any]]:
    """(owning module, argument, value before, value after) for each literal that a cut changes."""
    for node, name, before, after in _changes(graph, cuts):
        yield owner_path(node), name, before, after


def _changes(graph: ModelGraph, cuts: Cuts) -> Iterator[tuple[fx.Node, str, Any, Any]]:
    sizes = cuts.sizes

    def size(form: Form) -> int:
        return form.kept_size(sizes)

    vanished = {name for branch in cuts.dropped for name in branch.inside}
    for call in graph.calls.values():
        if call.node.name in vanished:
            continue
        rule = RULES.get(operator_name(call.node))
        if rule is None or rule.literals is None:
            continue
        out = call.known[call.node]
        tensors = out if operator_name(call.node) in (*_SPLITS, "split_with_sizes") else out[0]
        before, after = (rule.literals(call, tensors, measure) for measure in (_dense_size, size))
        for name in after if before != after else ():
            if after[name] != call.arguments.get(name):
                yield call.node, name, before[name], after[name]


def _dense_size(form: Form) -> int:
    return form.size


def cut_program(graph: ModelGraph, cuts: Cuts, model: nn.Module) -> fx.GraphModule:
    """The exported graph with the cuts made, as a module with the weights of `model`."""
    module = plain_module(graph.exported)
    _cut_nodes(module, {node.name: node for node in module.graph.nodes}, graph, cuts, model)
    _drop(module, cuts.dropped)
    module.graph.lint()
    module.recompile()
    for name in gone_parameters(graph, cuts.dropped):
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
    return module.eval()


def cut_part(part: Part, graph: ModelGraph, cuts: Cuts, model: nn.Module) -> fx.GraphModule:
    """The exported graph of a part with the cuts made, with the weights that it has in `model`."""
    module = plain_module(part.program)
    own = {node.name: node for node in module.graph.nodes}
    _cut_nodes(module, {name: own[there] for name, there in part.nodes.items()}, graph, cuts, model, f"{part.path}.")
    module.graph.lint()
    module.recompile()
    return module.eval()


def _cut_nodes(
    module: fx.GraphModule,
    nodes: Mapping[str, fx.Node],
    graph: ModelGraph,
    cuts: Cuts,
    model: nn.Module,
    prefix: str = "",
) -> None:
    """Make the cuts at some nodes, given by their name in the whole graph, and in tensors of the prefix."""
    for node, name, _, after in _changes(graph, cuts):
        if node.name in nodes:
            _rewrite(nodes[node.name], name, after)
    for name in cuts.windows.keys() & nodes.keys():
        _shrink_kernel(nodes[name], graph.calls[name], cuts.windows[name])
    _load_cut(module, graph, cuts, model, prefix)
    for name in cuts.mixes.keys() & nodes.keys():
        path = graph.layer[name].weight.rpartition(".")[0].removeprefix(prefix)
        _mix_kernels(module, nodes[name], graph, cuts, name, path)
    for name in cuts.masks.keys() & nodes.keys():
        path = graph.layer[name].weight.rpartition(".")[0].removeprefix(prefix)
        _hold_zeros(module, nodes[name], graph, name, path)
    for name in cuts.groups.keys() & nodes.keys():
        _divide(nodes[name], cuts.group_count(graph.layer[name]))


def _drop(module: fx.GraphModule, branches: Sequence[Branch]) -> None:
    """Put each branch's skip in the place of the sum, and erase the branch, operators in place included."""
    nodes = {node.name: node for node in module.graph.nodes}
    position = {name: number for number, name in enumerate(nodes)}
    for branch in sorted(outermost(branches), key=lambda branch: -position[branch.node]):
        addition, kept = nodes[branch.node], nodes[branch.skip]
        if any(user.name not in branch.inside and user is not addition for user in kept.users):
            with module.graph.inserting_before(addition):  # the sum was a tensor of its own, to be written to
                kept = module.graph.call_function(torch.ops.aten.clone.default, (kept,))
        addition.replace_all_uses_with(kept)
    vanished = {name for branch in branches for name in (branch.node, *branch.inside)}
    for node in reversed(list(module.graph.nodes)):
        if node.name in vanished or (vanished and node.op == "get_attr" and not node.users):
            module.graph.erase_node(node)


def plain_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program as an ordinary module: without input guards, with `train` and `eval`. Its tensors are the program's.

    Lifting the weights back in takes longer than cutting them, so that is done once for each program.
    """
    if program not in _UNLIFTED:
        _UNLIFTED[program] = program.module(check_guards=False)
        _UNLIFTED[program].graph._codegen = copy.copy(_UNLIFTED[program].graph._codegen)
    unlifted = _UNLIFTED[program]
    plain = fx.GraphModule(unlifted, copy.deepcopy(unlifted.graph))
    plain.meta.clear()
    for name in program.constants:  # what the code makes anew is no part of the model's state
        if name in plain._buffers:
            plain._non_persistent_buffers_set.add(name)
    _forget_caches(plain)
    return plain


_UNLIFTED: WeakKeyDictionary[torch.export.ExportedProgram, fx.GraphModule] = WeakKeyDictionary()


def _forget_caches(module: fx.GraphModule) -> None:
    """Erase writes to buffers that get another size by them: what the code keeps there for its next call."""
    writes = [x for x in module.graph.nodes if x.op == "call_function" and operator_name(x) == "copy_" and not x.users]
    for node in writes:
        buffer, value = node.args[:2]
        if buffer.op == "get_attr" and buffer.meta["val"].shape != value.meta["val"].shape:
            module.graph.erase_node(node)
            module.recompile()


def _rewrite(node: fx.Node, name: str, after: Any) -> None:
    if name == "split_sizes":
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        node.target = torch.ops.aten.split_with_sizes.default
        node.args, node.kwargs = (node.args[0], after, dim), {}
        return
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if isinstance(after, list) and position < len(node.args):
        given = node.args[position]
        after = [g if isinstance(a, fx.Node) else a for g, a in zip(given, after, strict=True)]  # type: ignore[arg-type]
    if position < len(node.args):
        node.update_arg(position, after)
    else:
        node.update_kwarg(name, after)


def _shrink_kernel(node: fx.Node, call: Any, window: Any) -> None:
    weight = call["weight"].meta["val"].shape
    pair = [_pair(call[name]) for name in ("stride", "padding", "dilation")]
    ends = window_padding((int(weight[2]), int(weight[3])), pair[1], pair[2], window)
    arguments = [*node.args[:3], *([None] * (3 - len(node.args[:3])))]
    groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    node.target = padded_conv2d
    node.args, node.kwargs = (*arguments, pair[0], ends, pair[2], groups), {}


def _divide(node: fx.Node, groups: int) -> None:
    """Divide a convolution, which has an argument for it, or a linear layer."""
    if operator_name(node) != "linear":
        _rewrite(node, "groups", groups)
        return
    source, weight, bias = (*node.args, None)[:3]
    node.target, node.args = grouped_linear, (source, weight, bias, groups)


def _mix_kernels(module: fx.GraphModule, node: fx.Node, graph: ModelGraph, cuts: Cuts, name: str, path: str) -> None:
    """Put a module with a convolution for each window in the place of one call, under the path of its parameters."""
    layer, call = graph.layer[name], graph.calls[name]
    held = module.get_submodule(path)
    weight: torch.Tensor = held.weight  # type: ignore[assignment]
    outputs, inputs, *kernel = weight.shape
    stride, padding, dilation = (_pair(call[name]) for name in ("stride", "padding", "dilation"))
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False, device="meta")  # type: ignore[arg-type]
    conv.weight, conv.bias = weight, getattr(held, "bias", None)  # type: ignore[assignment]
    _replace(module, node, path, mixed(conv, cuts.runs(layer)))


def _hold_zeros(module: fx.GraphModule, node: fx.Node, graph: ModelGraph, name: str, path: str) -> None:
    """Put a layer whose zeros stay in the place of a call with a masked weight, under the path of its parameters."""
    call, held = graph.calls[name], module.get_submodule(path)
    weight: torch.Tensor = held.weight  # type: ignore[assignment]
    made: nn.Module
    if weight.dim() == 2:
        made = MaskedLinear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    else:
        stride, padding = (_pair(call[name]) for name in ("stride", "padding"))
        made = MaskedConv2d(weight.shape[1], weight.shape[0], 1, stride, padding, bias=False, device="meta")
    made.weight, made.bias = weight, getattr(held, "bias", None)  # type: ignore[assignment]
    _replace(module, node, path, made)


def _replace(module: fx.GraphModule, node: fx.Node, path: str, made: nn.Module) -> None:
    """Call a module, put where the parameters of a call were, instead of the operator."""
    source, *attributes = node.all_input_nodes
    with module.graph.inserting_before(node):
        replacement = module.graph.call_module(path, (source,))
    node.replace_all_uses_with(replacement)
    own_name = node.name
    for unused in (node, *attributes):
        module.graph.erase_node(unused)
    replacement.name, replacement.meta = own_name, {**node.meta}
    module.set_submodule(path, made)


def _pair(value: Any) -> tuple[int, int]:
    values = [value] if isinstance(value, int) else list(value)
    return (values[0], values[-1])


def _load_cut(module: nn.Module, graph: ModelGraph, cuts: Cuts, model: nn.Module, prefix: str) -> None:
    windows = {graph.layer[node].weight: window for node, window in cuts.windows.items()}
    groups = {graph.layer[node].weight: cuts.group_count(graph.layer[node]) for node in cuts.groups}
    masks = {graph.layer[node].weight: mask for node, mask in cuts.masks.items()}
    state = state_of(model)
    tied: dict[int, torch.Tensor] = {}
    for parameter in graph.parameters:
        if not parameter.name.startswith(prefix):
            continue
        value = state[parameter.name]
        path, _, name = parameter.name.removeprefix(prefix).rpartition(".")
        if id(value) in tied:
            setattr(module.get_submodule(path), name, tied[id(value)])
            continue
        small = value.detach().clone()
        if parameter.name in masks:
            small = zeroed(small, masks[parameter.name])
        for axis, form in enumerate(parameter.axes):
            if form.atoms() & cuts.kept.keys():
                small = small.index_select(axis, torch.from_numpy(form.kept(cuts.kept)).to(value.device))
        if parameter.name in windows:
            (top, bottom), (left, right) = windows[parameter.name]
            small = small[:, :, top:bottom, left:right].clone()
        if parameter.name in groups:
            small = block_diagonal(small, groups[parameter.name])
        if isinstance(value, nn.Parameter):
            small = nn.Parameter(small, value.requires_grad)
        tied[id(value)] = small
        setattr(module.get_submodule(path), name, small)
