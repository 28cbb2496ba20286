"""Groups and sites of a traced graph: which atoms of its axes can be cut, and what they are to an engineer."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from graphprune.graph import Group, Layer, Member, ModelGraph, Site
from graphprune.operators import Attention, Convolution, Linear


def find_groups(graph: ModelGraph) -> tuple[Group, ...]:
    """Every atom that a parameter runs through, as a group."""
    members: dict[int, list[Member]] = {}
    for parameter in graph.parameters:
        for axis, form in enumerate(parameter.axes):
            for atom in form.atoms():
                rows = form.size - form.kept_size({atom: graph.atom_sizes[atom] - 1})
                members.setdefault(atom, []).append(Member(parameter.name, axis, rows))
    groups = [_group(graph, atom, found) for atom, found in members.items() if graph.atom_sizes[atom] > 1]
    return tuple(_unique(sorted(groups, key=lambda group: _order(graph, group))))


def _group(graph: ModelGraph, atom: int, members: list[Member]) -> Group:
    attentions = [x for x in graph.layers if isinstance(x.operator, Attention) and atom in x.inputs.atoms()]
    weighted = [layer for layer in graph.layers if not isinstance(layer.operator, Attention)]
    producers = [layer for layer in weighted if atom in layer.outputs.atoms()]
    consumers = [layer for layer in weighted if atom in layer.inputs.atoms()]
    narrow = all(layer.inputs.size == graph.atom_sizes[atom] for layer in consumers)
    kind = _kind(producers, consumers, attentions)
    kind = "width" if kind == "hidden" and not narrow else kind
    first = attentions or producers or consumers
    name = first[0].module or first[0].node if first else members[0].parameter
    return Group(
        atom, name, kind, graph.atom_sizes[atom], tuple(members),
        tuple(layer.node for layer in producers), tuple(layer.node for layer in consumers), graph.atom_frozen[atom],
    )  # fmt: skip


def _kind(producers: list[Layer], consumers: list[Layer], attentions: list[Layer]) -> str:
    if attentions:
        return "heads"
    if producers and all(isinstance(layer.operator, Convolution) for layer in producers):
        return "channels"
    inner = producers and consumers and not {x.node for x in producers} & {x.node for x in consumers}
    one_step = len({layer.module.rpartition(".")[0] for layer in producers + consumers}) == 1
    linear = all(isinstance(layer.operator, Linear) for layer in producers + consumers)
    return "hidden" if inner and one_step and linear and len(producers) <= 2 else "width"


def _order(graph: ModelGraph, group: Group) -> tuple[int, int]:
    position = {layer.node: number for number, layer in enumerate(graph.layers)}
    return min((position[node] for node in group.producers + group.consumers), default=len(position)), group.atom


def _unique(groups: Iterable[Group]) -> list[Group]:
    """Number the groups that share a name and kind."""
    found = list(groups)
    shared = Counter((group.name, group.kind) for group in found)
    seen: Counter[tuple[str, str]] = Counter()
    result = []
    for group in found:
        key = (group.name, group.kind)
        seen[key] += 1
        result.append(replace(group, name=f"{group.name}#{seen[key]}") if shared[key] > 1 else group)
    return result


def find_sites(graph: ModelGraph) -> tuple[Site, ...]:
    """A site for each group that may be cut and for each convolution whose kernel may be cut, in graph order."""
    position = {node.name: number for number, node in enumerate(graph.nodes)}
    sites = [_group_site(graph, group) for group in graph.all_groups if not group.frozen]
    sites += [_kernel_site(graph, layer) for layer in graph.layers if _has_kernel(layer)]
    return tuple(sorted(sites, key=lambda site: (position[site.node], site.kind)))


def _group_site(graph: ModelGraph, group: Group) -> Site:
    touched = [layer.node for layer in graph.layers if group.atom in _atoms(layer)]
    readers = (node.name for node in graph.nodes if {member.parameter for member in group.members} & {*node.inputs})
    node = (group.producers or group.consumers or (*touched, *readers))[0]
    return Site(
        f"{group.name}/{group.kind}", group.kind, group.size, tuple(touched), node, atom=group.atom, unit=group.unit
    )


def _atoms(layer: Layer) -> set[int]:
    return set().union(*(form.atoms() for form in (layer.inputs, layer.outputs, layer.groups) if form))


def _has_kernel(layer: Layer) -> bool:
    operator = layer.operator
    return isinstance(operator, Convolution) and layer.standard and max(operator.kernel) > 1


def _kernel_site(graph: ModelGraph, layer: Layer) -> Site:
    assert isinstance(layer.operator, Convolution)
    rows, columns = layer.operator.kernel
    return Site(
        f"{layer.module}/kernel", "kernel", rows * columns, (layer.node,), layer.node, kernel=(rows, columns),
        order=_free_order(graph, layer), filters=layer.outputs.size,
    )  # fmt: skip


def _free_order(graph: ModelGraph, layer: Layer) -> int:
    """The group of a convolution's filters if nothing else makes its channels, so that any order will do; else -1."""
    atom = layer.outputs.atom
    if atom < 0 or layer.groups is not None or graph.atom_frozen[atom]:
        return -1
    makers = [other.node for other in graph.layers if other.weight and atom in other.outputs.atoms()]
    return atom if makers == [layer.node] else -1
