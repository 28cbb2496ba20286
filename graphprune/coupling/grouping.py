"""Groups and sites of a traced graph: which atoms of its axes can be cut, and what they are to an engineer."""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

from graphprune.coupling.graph import Branch, Group, Layer, Member, ModelGraph, Site
from graphprune.coupling.operators import Attention, Convolution, Linear, Weighted
from graphprune.coupling.rule import shapes_of

NORMS = frozenset({"batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"})

Named = TypeVar("Named", Group, Branch)


def find_groups(graph: ModelGraph) -> tuple[Group, ...]:
    """Every atom that a parameter runs through, as a group."""
    members: dict[int, list[Member]] = {}
    for parameter in graph.parameters:
        for axis, form in enumerate(parameter.axes):
            for atom in form.atoms():
                rows = form.size - form.kept_size({atom: graph.atom_sizes[atom] - 1})
                members.setdefault(atom, []).append(Member(parameter.name, axis, rows))
    streams = _Streams(_added(graph), _normalised(graph))
    groups = [_group(graph, streams, atom, found) for atom, found in members.items() if graph.atom_sizes[atom] > 1]
    return tuple(unique(sorted(groups, key=lambda group: _order(graph, group)), lambda group: (group.name, group.kind)))


@dataclass(frozen=True)
class _Streams:
    """Atoms that run through a residual addition, and those that run through the weights of a norm."""

    added: set[int]
    normalised: set[int]


def _added(graph: ModelGraph) -> set[int]:
    """Atoms of sums of two computed tensors of one shape."""
    found: set[int] = set()
    for node in graph.nodes:
        if node.op not in ("add", "add_") or node.name not in graph.calls:
            continue
        sources = graph.calls[node.name].node.all_input_nodes
        if len(sources) == 2 and all(x.op == "call_function" for x in sources):
            one, other = map(shapes_of, sources)
            found |= set().union(*(form.atoms() for form in node.axes)) if one == other else set()
    return found


def _normalised(graph: ModelGraph) -> set[int]:
    norms = {name for node in graph.nodes if node.op in NORMS for name in node.inputs}
    axes = (form for parameter in graph.parameters if parameter.name in norms for form in parameter.axes)
    return {atom for form in axes for atom in form.atoms()}


def _group(graph: ModelGraph, streams: _Streams, atom: int, members: list[Member]) -> Group:
    attentions = [x for x in graph.layers if isinstance(x.operator, Attention) and atom in x.inputs.atoms()]
    weighted = [layer for layer in graph.layers if not isinstance(layer.operator, Attention)]
    producers = [layer for layer in weighted if atom in layer.outputs.atoms()]
    consumers = [layer for layer in weighted if atom in layer.inputs.atoms()]
    weights = {layer.weight for layer in weighted}
    unit = min((member.rows for member in members if member.parameter in weights), default=1)
    kind = "heads" if attentions else _kind(graph, streams, atom, producers, consumers)
    if kind == "hidden" and unit > 1:
        kind = "other"  # a width within heads that no known attention runs over
    first = attentions or producers or consumers
    name = first[0].module or first[0].node if first else members[0].parameter
    return Group(
        atom, name, kind, graph.atom_sizes[atom], tuple(members),
        tuple(layer.node for layer in producers), tuple(layer.node for layer in consumers), graph.atom_frozen[atom],
        unit,
    )  # fmt: skip


def _within_heads(graph: ModelGraph, atom: int) -> str:
    """What an atom is that an attention product runs over within each head; empty if none does."""
    widths = [layer.widths for layer in graph.layers if layer.widths]
    if any(atom in queries.atoms() for queries, _ in widths):
        return "head-width"
    return "value" if any(atom in values.atoms() for _, values in widths) else ""


def _kind(graph: ModelGraph, streams: _Streams, atom: int, producers: list[Layer], consumers: list[Layer]) -> str:
    """What an atom is that does not count heads; `narrow` where it is all that its consumers read."""
    narrow = all(layer.inputs.size == graph.atom_sizes[atom] for layer in consumers)
    if producers and all(isinstance(layer.operator, Convolution) for layer in producers):
        return "channels"
    if within := "" if atom in streams.added else _within_heads(graph, atom):
        return within
    if not producers or not consumers:
        return "other"
    if atom in streams.added:
        return "width"
    if _is_hidden(producers, consumers):
        return "hidden"
    many = len(producers) > 1 and len(consumers) > 1
    return "width" if narrow and (many or atom in streams.normalised) else "other"


def _is_hidden(producers: list[Layer], consumers: list[Layer]) -> bool:
    """Whether linear layers write and others read it, as inside an MLP; a gate makes it two writers.

    Depthwise convolutions may lie between them.
    """
    layers = producers + consumers
    between = {layer.node for layer in producers} & {layer.node for layer in consumers}
    linear = all(isinstance(layer.operator, Linear) for layer in layers if layer.node not in between)
    depthwise = all(layer.groups is not None for layer in layers if layer.node in between)
    return linear and depthwise and 0 < len(producers) - len(between) <= 2 and len(consumers) > len(between)


def _order(graph: ModelGraph, group: Group) -> tuple[int, int]:
    position = {layer.node: number for number, layer in enumerate(graph.layers)}
    return min((position[node] for node in group.producers + group.consumers), default=len(position)), group.atom


def unique(found: Iterable[Named], key: Callable[[Named], Hashable]) -> list[Named]:
    """Number, in their names, the groups or branches that share a key."""
    listed = list(found)
    shared, seen = Counter(map(key, listed)), Counter[Hashable]()
    result = []
    for one in listed:
        seen[key(one)] += 1
        result.append(replace(one, name=f"{one.name}#{seen[key(one)]}") if shared[key(one)] > 1 else one)
    return result


def find_sites(graph: ModelGraph) -> tuple[Site, ...]:
    """A site for each group that may be cut, each layer whose weights may be, and each residual branch.

    A branch comes before all that is inside it.
    """
    position = {node.name: number for number, node in enumerate(graph.nodes)}
    sites = [_group_site(graph, group) for group in graph.all_groups if not group.frozen]
    sites += [_kernel_site(graph, layer) for layer in graph.layers if _has_kernel(layer)]
    sites += [_branch_site(graph, branch) for branch in graph.branches]
    return tuple(sorted(sites, key=lambda site: (position[site.node], site.kind, -len(site.layers))))


def _group_site(graph: ModelGraph, group: Group) -> Site:
    touched = [layer.node for layer in graph.layers if group.atom in _atoms(layer)]
    readers = (node.name for node in graph.nodes if {member.parameter for member in group.members} & {*node.inputs})
    node = (group.producers or group.consumers or (*touched, *readers))[0]
    return Site(
        f"{group.name}/{group.kind}", group.kind, group.size, tuple(touched), node, atom=group.atom, unit=group.unit
    )


def _branch_site(graph: ModelGraph, branch: Branch) -> Site:
    layers = tuple(layer.node for layer in graph.layers if layer.node in branch.inside)
    return Site(f"{branch.name}/block", "block", 1, layers, layers[0], branch=branch)


def _atoms(layer: Layer) -> set[int]:
    return set().union(
        *(form.atoms() for form in (layer.inputs, layer.outputs, layer.groups, *(layer.widths or ())) if form)
    )


def _has_kernel(layer: Layer) -> bool:
    """Whether a layer's weights may be cut by themselves: within the kernel, by division into groups, or by a mask."""
    operator = layer.operator
    return isinstance(operator, Weighted) and layer.standard and (max(operator.kernel) > 1 or layer.groups is None)


def _kernel_site(graph: ModelGraph, layer: Layer) -> Site:
    operator = layer.operator
    assert isinstance(operator, Weighted)
    rows, columns = operator.kernel
    return Site(
        f"{layer.module}/kernel", "kernel", rows * columns, (layer.node,), layer.node, kernel=(rows, columns),
        order=_free_order(graph, layer), filters=operator.outputs, channels=operator.inputs // operator.groups,
    )  # fmt: skip


def _free_order(graph: ModelGraph, layer: Layer) -> int:
    """The group of a layer's filters if nothing else makes its outputs, so that any order will do; else -1."""
    atom = layer.outputs.atom
    if atom < 0 or layer.groups is not None or graph.atom_frozen[atom]:
        return -1
    makers = [other.node for other in graph.layers if other.weight and atom in other.outputs.atoms()]
    return atom if makers == [layer.node] else -1
