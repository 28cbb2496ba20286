"""The model as a picture: layers as boxes in reading order, coloured by the patterns chosen, residuals as arcs.

Only the geometry is computed here, in pixels; the report's template writes the SVG.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import networkx

from graphprune.coupling.graph import Layer, ModelGraph
from graphprune.coupling.operators import Absent, Attention, Convolution, Masked, Mixture, Operator
from graphprune.cutting.cuts import resolve
from graphprune.plan import Choice, Plan
from graphprune.registry import pattern
from graphprune.reporting.flow import collapse, rows
from graphprune.reporting.tables import shortened

COLUMNS = 7
"""Layers in a row: what fits a page and still can be read."""
WIDTH = 140
LINE = 14
"""Height of a line of text; a box holds the layer's name, its operator, and a line for each choice."""
RADIUS = 10
"""Of a join."""
GAP = 24
MARGIN = 34
SIZE = {"width": WIDTH, "line": LINE, "radius": RADIUS}
"""What the template has to know of them."""
ARC = 9
"""How much higher an arc is than those below it."""
NAME, TEXT = 18, 22
"""Characters that fit into a box."""


@dataclass(frozen=True)
class Box:
    """A layer: `patterns` were chosen here, `reads` names those that cut what it reads."""

    x: float
    y: float
    title: str
    lines: tuple[str, ...]
    patterns: tuple[str, ...]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Join:
    """Where tensors are added or concatenated: a circle around `x`, `y`."""

    x: float
    y: float
    title: str
    symbol: str


@dataclass(frozen=True)
class Drawing:
    """`arrows` lead to the next box, `arcs` over boxes, `turns` from row to row: SVG path data. Sizes in pixels."""

    boxes: tuple[Box, ...]
    joins: tuple[Join, ...]
    arrows: tuple[str, ...]
    arcs: tuple[str, ...]
    turns: tuple[str, ...]
    box_height: float
    width: float
    height: float


class Labels(Protocol):
    """What is written into the boxes; `height` is that of each box."""

    @property
    def height(self) -> float: ...

    def box(self, layer: Layer, x: float, y: float) -> Box: ...


def draw(graph: ModelGraph, labels: Labels) -> Drawing:
    """The picture of a graph."""
    flow = collapse(graph)
    height = labels.height
    boxes, joins, arrows, arcs, turns = [], [], [], [], []
    before: _Row | None = None
    bottom = 0.0
    for names in rows(flow, COLUMNS):
        row = _Row.place(flow, names, bottom, height)
        for name, left in zip(names, row.lefts, strict=True):
            if symbol := flow.nodes[name]["join"]:
                joins.append(Join(left + RADIUS, row.middle, flow.nodes[name]["title"], symbol))
            else:
                boxes.append(labels.box(graph.layer[name], left, row.top))
        if before is not None:
            turns.append(before.to_next(row))
        arrows += row.steps()
        arcs += [row.arc(*arc) for arc in row.arcs]
        before, bottom = row, row.top + height
    width = max((box.x + WIDTH for box in boxes), default=0) + 2 * MARGIN
    return Drawing(
        tuple(boxes), tuple(joins), tuple(arrows), tuple(arcs), tuple(turns), height, width, bottom + MARGIN / 2
    )


@dataclass(frozen=True)
class _Row:
    """A row of nodes. Positions count from 0; -1 is the point at its left where earlier rows come in."""

    lefts: tuple[float, ...]
    widths: tuple[float, ...]
    edges: tuple[tuple[int, int], ...]
    arcs: tuple[tuple[int, int, int], ...]
    top: float
    height: float

    @classmethod
    def place(cls, flow: "networkx.DiGraph", names: Sequence[str], above: float, height: float) -> "_Row":
        """Put nodes side by side, below `above`, with room for the arcs over them."""
        widths = [2 * RADIUS if flow.nodes[name]["join"] else WIDTH for name in names]
        lefts = [MARGIN + sum(widths[:number]) + number * GAP for number in range(len(names))]
        position = {name: number for number, name in enumerate(names)}
        edges = sorted({(position.get(a, -1), position[b]) for b in names for a in flow.predecessors(b)})
        arcs = _levels([(a, b) for a, b in edges if b - a > 1])
        top = above + 30 + ARC * max((level for *_, level in arcs), default=0)
        return cls(tuple(lefts), tuple(widths), tuple(edges), tuple(arcs), top, height)

    @property
    def middle(self) -> float:
        return self.top + self.height / 2

    def centre(self, position: int) -> float:
        return self.lefts[position] + self.widths[position] / 2 if position >= 0 else MARGIN - 18

    def right(self, position: int) -> float:
        return self.lefts[position] + self.widths[position] if position >= 0 else MARGIN - 18

    def steps(self) -> list[str]:
        """Arrows to the next node."""
        return [f"M{self.right(a):g} {self.middle:g}H{self.lefts[b] - 1:g}" for a, b in self.edges if b - a == 1]

    def arc(self, source: int, target: int, level: int) -> str:
        """An arrow over the boxes between two nodes; what arrives at a box and what leaves it are kept apart."""
        height = self.top - 8 - ARC * level
        start = self.centre(source) + (5 if source >= 0 else 0)
        end = self.centre(target) - 5
        foot = self.middle if source < 0 else self._head(source)
        return f"M{start:g} {foot:g}V{height + 5:g}q0 -5 5 -5H{end - 5:g}q5 0 5 5V{self._head(target) - 1:g}"

    def _head(self, position: int) -> float:
        """The upper edge of a node, near its centre."""
        return self.top if self.widths[position] > 2 * RADIUS else self.middle - RADIUS + 1

    def to_next(self, row: "_Row") -> str:
        """The line from the end of this row to the point where the next one begins."""
        start, edge, entry = self.right(len(self.lefts) - 1), self.top + self.height + 10, row.centre(-1)
        return (
            f"M{start:g} {self.middle:g}h7q5 0 5 5V{edge - 5:g}q0 5 -5 5"
            f"H{entry + 5:g}q-5 0 -5 5V{row.middle - 5:g}q0 5 5 5"
        )


def _levels(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Spans with the height of their arcs: shorter ones lower, none through another one."""
    placed: list[tuple[int, int, int]] = []
    for start, end in sorted(spans, key=lambda span: (span[1] - span[0], span)):
        under = [level for a, b, level in placed if a < end and start < b]
        placed.append((start, end, 1 + max(under, default=-1)))
    return placed


class PlanLabels:
    """What a plan does to each layer. Raises InputError for a plan of another model."""

    def __init__(self, graph: ModelGraph, plan: Plan) -> None:
        self.graph = graph
        self.cuts = resolve(graph, plan)
        self.choices = [
            (choice, pattern(choice.pattern).rewrite(graph.site[choice.site], choice.keep)) for choice in plan.choices
        ]

    @property
    def height(self) -> float:
        """Of a box: as many lines as the fullest one needs."""
        most = max((len(self._here(layer)) for layer in self.graph.layers), default=0)
        return LINE * (2 + max(1, most)) + 12

    def box(self, layer: Layer, x: float, y: float) -> Box:
        """A layer's box with its upper left corner at `x`, `y`."""
        here = self._here(layer)
        reads = [choice for choice, cuts in self.choices if layer.weight and cuts.keep.keys() & layer.inputs.atoms()]
        name, operator = layer.module or layer.node, describe(self.cuts.operator(layer))
        told = [f"{choice.pattern} {choice.level}" for choice in here]
        told += [f"reads fewer inputs ({choice.pattern} {choice.level} at {choice.site})" for choice in reads]
        change = f"{describe(layer.operator)} becomes {operator}; {'; '.join(told)}" if told else f"{operator}, dense"
        return Box(
            x,
            y,
            f"{name}: {change}",
            (shortened(name, NAME), operator[:TEXT], *(shortened(choice.level, TEXT) for choice in here)),
            tuple(dict.fromkeys(choice.pattern for choice in here)),
            tuple(dict.fromkeys(choice.pattern for choice in reads)),
        )

    def _here(self, layer: Layer) -> list[Choice]:
        """The choices that show at a layer: in its kernel, in what it puts out, in its heads, or in its absence."""
        return [
            choice
            for choice, cuts in self.choices
            if layer.node in {*cuts.windows, *cuts.mixes, *cuts.groups, *cuts.masks}
            or cuts.drops(layer)
            or cuts.keep.keys() & layer.outputs.atoms()
        ]


def describe(operator: Operator) -> str:
    if isinstance(operator, Absent):
        return "nothing"
    if isinstance(operator, Masked):
        return f"{describe(operator.dense)}, masked"
    if isinstance(operator, Convolution):
        kernel = "×".join(map(str, operator.kernel))
        stride = f" /{max(operator.stride)}" if max(operator.stride) > 1 else ""
        width = f"{operator.inputs}→{operator.outputs}" if operator.groups == 1 else f"{operator.groups} groups"
        return f"conv {kernel}{stride}, {width}"
    if isinstance(operator, Mixture):
        kernels = "+".join("×".join(map(str, part.kernel)) for part in operator.parts)
        return f"conv {kernels}, {operator.parts[0].inputs}→{sum(part.outputs for part in operator.parts)}"
    if isinstance(operator, Attention):
        return f"attention, {operator.heads} head{'s' * (operator.heads > 1)}"
    width = f"{operator.inputs}→{operator.outputs}" if operator.groups == 1 else f"{operator.groups} groups"
    return f"linear, {width}"
