"""The model reduced to what a picture needs: layers, the joins between them, and rows in which they can be read."""

from collections.abc import Sequence

import networkx

from graphprune.coupling.graph import ModelGraph

JOINS = {"add": "+", "sub": "−", "mul": "×", "cat": "‖", "stack": "‖"}
"""Symbols of operators that join several tensors; any other is a dot."""


def collapse(graph: ModelGraph) -> "networkx.DiGraph":
    """Layers and joins alone, in the order of the graph; every other operator stands for what it reads.

    A join is an operator, no layer, that reads two or more of them. Node attributes: `join` (its symbol, empty for a
    layer) and `title`.
    """
    view = graph.to_networkx()
    flow = networkx.DiGraph()
    stands_for: dict[str, str] = {}
    for node in graph.nodes:
        read = dict.fromkeys(stands_for[name] for name in view.predecessors(node.name) if name in stands_for)
        layer = node.name in graph.layer
        if not layer and len(read) < 2:
            stands_for.update((node.name, source) for source in read)
            continue
        symbol = "" if layer else JOINS.get(node.op.rstrip("_"), "•")
        flow.add_node(node.name, join=symbol, title=f"{node.op} in {node.module or 'the model'}")
        flow.add_edges_from((source, node.name) for source in read)
        stands_for[node.name] = node.name
    return flow


def segments(flow: "networkx.DiGraph") -> list[list[str]]:
    """The nodes in order, divided wherever a single tensor is alive: all that follows is computed from one node."""
    order = list(flow.nodes)
    position = {name: number for number, name in enumerate(order)}
    last_use = [max((position[target] for target in flow.successors(name)), default=-1) for name in order]
    found: list[list[str]] = [[]]
    furthest = -1  # the last use of anything made before the current node
    for number, name in enumerate(order):
        found[-1].append(name)
        if furthest <= number and number + 1 < len(order):
            found.append([])
        furthest = max(furthest, last_use[number])
    return [segment for segment in found if segment]


def rows(flow: "networkx.DiGraph", columns: int) -> list[list[str]]:
    """The nodes in rows of at most `columns` layers: whole segments, unless one alone is longer."""
    found: list[list[str]] = [[]]
    for segment in segments(flow):
        if found[-1] and _layers(flow, found[-1]) + _layers(flow, segment) > columns:
            found.append([])
        for name in segment:
            if _layers(flow, found[-1]) == columns and not flow.nodes[name]["join"]:
                found.append([])
            found[-1].append(name)
    return [row for row in found if row]


def _layers(flow: "networkx.DiGraph", names: Sequence[str]) -> int:
    return sum(not flow.nodes[name]["join"] for name in names)
