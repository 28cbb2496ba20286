"""Residual branches: what is added to a stream, computed from that stream alone, and used nowhere else."""

from collections.abc import Iterator, Sequence
from itertools import takewhile

import torch
from torch import fx

from graphprune.coupling.graph import Branch, ModelGraph
from graphprune.coupling.grouping import unique
from graphprune.coupling.rule import shapes_of
from graphprune.coupling.tracing import operator_name, owner_path

_VIEWS = frozenset(
    """
    alias chunk contiguous detach dropout expand flatten getitem permute reshape select slice split split_with_sizes
    squeeze to transpose unbind unflatten unsqueeze view
    """.split()  # noqa: SIM905 - words that read better than a list of strings
)
"""Operators whose output may share memory with their first input."""


def find_branches(graph: ModelGraph) -> tuple[Branch, ...]:
    """Every residual branch with a layer in it, in the order of the additions."""
    if graph.exported is None:
        return ()
    nodes = list(graph.exported.graph.nodes)
    varying = _varying(graph.exported, nodes)
    found = []
    for number, node in enumerate(nodes):
        for skip, branch in _operands(node):
            inside = _inside(nodes[:number], branch, node)
            layers = [layer.module for layer in graph.layers if layer.node in {x.name for x in inside}]
            if layers and _reads_only(inside, skip, varying) and not any(_writes_outside(x, inside) for x in inside):
                names = frozenset(x.name for x in inside)
                found.append(Branch(_name(layers, node), node.name, skip.name, names, _modules(nodes, names)))
    return tuple(unique(found, lambda branch: branch.name))


def outermost(branches: Sequence[Branch]) -> list[Branch]:
    """The branches that lie in no other one of them."""
    return [branch for branch in branches if not any(branch.node in other.inside for other in branches)]


def gone_parameters(graph: ModelGraph, dropped: Sequence[Branch]) -> frozenset[str]:
    """Parameters and buffers that nothing reads once these branches are dropped."""
    if not dropped:
        return frozenset()
    signature = graph.exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    vanished = {name for branch in dropped for name in branch.inside}
    owners = tuple(f"{path}." for branch in dropped for path in branch.modules)
    readers = {
        names[node.name]: {user.name for user in node.users}
        for node in graph.exported.graph.nodes
        if node.name in names
    }
    return frozenset(
        name for name, users in readers.items() if users <= vanished and (users or name.startswith(owners))
    )


def _varying(program: torch.export.ExportedProgram, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Tensors that depend on an input of the model."""
    inputs = set(program.graph_signature.user_inputs)
    found: set[fx.Node] = set()
    for node in nodes:
        if (node.op == "placeholder" and node.name in inputs) or found & {*node.all_input_nodes}:
            found.add(node)
    return {node for node in found if not isinstance(node.meta.get("val"), (torch.SymInt, int))}


def _operands(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(skip, branch), both ways round, of an addition of two tensors of one shape and type."""
    if operator_name(node) not in ("add", "add_") or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return
    one, other = node.args
    if not all(isinstance(x, fx.Node) and x.op == "call_function" for x in (one, other)) or one is other:
        return
    kinds = {_kind(x) for x in (one, other, node)}  # type: ignore[arg-type]
    if len(kinds) == 1 and None not in kinds:
        yield from ((one, other), (other, one))  # type: ignore[misc]


def _kind(node: fx.Node) -> tuple[str, str] | None:
    value = node.meta.get("val")
    return (str(shapes_of(node)), str(value.dtype)) if isinstance(value, torch.Tensor) else None


def _inside(before: Sequence[fx.Node], branch: fx.Node, addition: fx.Node) -> set[fx.Node]:
    """The nodes that only this branch needs."""
    inside: set[fx.Node] = set()
    if set(branch.users) != {addition}:
        return inside
    for node in reversed(before):
        if node.op == "call_function" and (node is branch or (node.users and inside.issuperset(node.users))):
            inside.add(node)
    return inside


def _reads_only(inside: set[fx.Node], skip: fx.Node, varying: set[fx.Node]) -> bool:
    """Whether all that varies with the model's inputs, sizes apart, comes in through `skip`."""
    sources = {source for node in inside if shapes_of(node) for source in node.all_input_nodes} - inside
    return sources & varying == {skip}


def _writes_outside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether an operator in place changes a tensor that outlives the branch."""
    if not operator_name(node).endswith("_"):
        return False
    target = node.args[0]
    while target in inside and operator_name(target) in _VIEWS:  # type: ignore[arg-type, operator]
        target = target.args[0]  # type: ignore[union-attr]
    return target not in inside


def _name(layers: Sequence[str], addition: fx.Node) -> str:
    """The path of the module that holds the branch's layers, else that of the addition or of the first layer."""
    steps = zip(*(path.split(".") for path in layers), strict=False)
    common = ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))
    return common or owner_path(addition) or layers[0] or addition.name


def _modules(nodes: Sequence[fx.Node], inside: frozenset[str]) -> tuple[str, ...]:
    """The largest modules all of whose operators are inside."""
    calls: dict[str, list[str]] = {}
    for node in nodes:
        for path in _paths(node) if node.op == "call_function" and shapes_of(node) else ():
            calls.setdefault(path, []).append(node.name)
    whole = {path for path, names in calls.items() if inside.issuperset(names)}
    return tuple(path for path in calls if path in whole and not any(path.startswith(f"{x}.") for x in whole))


def _paths(node: fx.Node) -> list[str]:
    """The paths of all modules in whose code the call was made, but for the model itself."""
    stack = [entry[0] for entry in node.meta.get("nn_module_stack", {}).values() if isinstance(entry, tuple)]
    return [str(path).partition("@")[0] for path in stack if path and not str(path).startswith("_empty_nn")]
