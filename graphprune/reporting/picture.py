"""The coupled graph as an SVG: every layer, coloured by the group that its output belongs to."""

import colorsys
from pathlib import Path

from graphprune.coupling.graph import Group, Layer, ModelGraph
from graphprune.files.atomic import write_text
from graphprune.reporting.drawing import LINE, NAME, SIZE, TEXT, Box, describe, draw
from graphprune.reporting.tables import shortened
from graphprune.reporting.templates import render

GOLDEN = 0.618
"""Steps of the hue: any number of neighbours stay apart."""


def write_picture(graph: ModelGraph, path: Path) -> Path:
    """Draw which layers are cut together and write it as an SVG file; returns the path.

    A box has the colour of the group that the layer writes, and a bar at its left edge for each group that it reads;
    what is frozen has none. Raises InputError when the file cannot be written.
    """
    labels = GroupLabels(graph)
    colours = {name: _colour(number) for number, name in enumerate(labels.names.values())}
    drawing = draw(graph, labels)
    return write_text(path, render("graph.svg.j2", {"drawing": drawing, "size": SIZE, "colours": colours}))


class GroupLabels:
    """The groups that each layer writes and reads."""

    height = 3.0 * LINE + 12

    def __init__(self, graph: ModelGraph) -> None:
        self.free = {group.atom: group for group in graph.all_groups if not group.frozen}
        self.names = {atom: f"{group.name}/{group.kind}" for atom, group in self.free.items()}

    def box(self, layer: Layer, x: float, y: float) -> Box:
        """A layer's box with its upper left corner at `x`, `y`."""
        name, operator = layer.module or layer.node, describe(layer.operator)
        writes, reads = self._groups(layer.outputs.atoms()), self._groups(layer.inputs.atoms())
        told = [f"writes {self._told(group)}" for group in writes] + [f"reads {self._told(group)}" for group in reads]
        line = f"{writes[0].size} {writes[0].kind}" if writes else "frozen"
        return Box(
            x, y, f"{name}: {operator}; {'; '.join(told) or 'frozen'}",
            (shortened(name, NAME), operator[:TEXT], line),
            tuple(self.names[group.atom] for group in writes), tuple(self.names[group.atom] for group in reads),
        )  # fmt: skip

    def _groups(self, atoms: set[int]) -> list[Group]:
        return [self.free[atom] for atom in sorted(atoms & self.free.keys())]

    def _told(self, group: Group) -> str:
        return f"{self.names[group.atom]} of {group.size}"


def _colour(number: int) -> str:
    red, green, blue = colorsys.hls_to_rgb(number * GOLDEN % 1, 0.5, 0.65)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
