"""The tables that people read: what is cut together, and where which pattern may be used."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, overload

from graphprune.cuts import Cuts
from graphprune.graph import Group, ModelGraph, Site
from graphprune.pattern import Level, Pattern
from graphprune.profile import MOST_GAIN, Profile
from graphprune.registry import patterns

WIDTH = 120
"""Columns of a terminal that a table fits in."""

NAME = 36
"""Columns of a name; of a longer one the end is shown, which tells more than its beginning."""

BLOCK = 16
"""Rows of a vector block where no profile was made."""

OBVIOUS = ("a convolution slides over it", "it is an input of the model", "spatial")
"""Reasons that nobody needs to be told: groups frozen by nothing else are left out of the printed table."""


class GroupTable(Sequence[Group]):
    """All groups of a graph, in its order. Prints as a table of those that can be cut, or could be expected to be."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | Sequence[Group]:
        return self.graph.all_groups[index]

    def __len__(self) -> int:
        return len(self.graph.all_groups)

    def __str__(self) -> str:
        shown = [group for group in self if not _obvious(group)]
        rows = [
            (group.name, group.kind, str(group.size), str(group.unit), _members(group), _status(group))
            for group in shown
        ]
        lines = _layout(("group", "kind", "size", "unit", "parameters", "may it be cut?"), rows, numbers=(2, 3))
        if len(shown) < len(self):
            lines.append(f"not shown: {len(self) - len(shown)} frozen for an obvious reason (inputs, kernel positions)")
        cut = {group.atom for group in self if not group.frozen and _patterns(group.kind)}
        nodes = {
            layer.node
            for layer in self.graph.layers
            if cut & (layer.inputs.atoms() | layer.outputs.atoms() | (layer.groups.atoms() if layer.groups else set()))
        }
        lines.append(f"groups that can be cut reach {_reach(self.graph, nodes)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class SiteLevel:
    """A level of a pattern at a site: `count` units stay; `gain` is dense time / cut time, None where not measured."""

    pattern: str
    level: str
    count: int
    gain: float | None


@dataclass(frozen=True)
class SiteRow:
    """A site and all that may be done there."""

    name: str
    kind: str
    size: int
    levels: tuple[SiteLevel, ...]


class SiteTable(Sequence[SiteRow]):
    """All sites of a graph with the levels that are legal.

    With a profile these are the levels that gain beyond its noise, with their gains (times that are not known yet are
    measured); without one, all that the structure allows at a vector block of `BLOCK` rows.
    """

    def __init__(self, graph: ModelGraph, profile: Profile | None = None) -> None:
        self.graph = graph
        self.profile = profile

    @cached_property
    def rows(self) -> tuple[SiteRow, ...]:
        """The rows, in the order of the graph."""
        if self.profile is not None:
            self.profile.fill(self._operators(self.profile.block))
        return tuple(
            SiteRow(site.name, site.kind, site.size, tuple(self._levels(site))) for site in self.graph.all_sites
        )

    @overload
    def __getitem__(self, index: int) -> SiteRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SiteRow]: ...
    def __getitem__(self, index: int | slice) -> SiteRow | Sequence[SiteRow]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.graph.all_sites)

    def to_dict(self) -> dict[str, Any]:
        """The table for JSON: `engine`, `block`, and under `sites` the rows."""
        engine = self.profile.engine.identity if self.profile else None
        block = self.profile.block if self.profile else BLOCK
        return {"engine": engine, "block": block, "sites": [asdict(row) for row in self]}

    def __str__(self) -> str:
        heading = "levels: dense time / time" if self.profile else f"possible levels (not measured; blocks of {BLOCK})"
        rows = []
        for row in self:
            cells = (row.name, row.kind, str(row.size))
            found = [(name, _summary(levels)) for name, levels in groupby(row.levels, lambda level: level.pattern)]
            rows += [(*cells, name, levels) for name, levels in found or [("-", self._why_none(row))]]
        lines = _layout(("site", "kind", "size", "pattern", heading), rows, numbers=(2,))
        nodes = {node for row in self if row.levels for node in self.graph.site[row.name].layers}
        lines.append(f"sites with a choice reach {_reach(self.graph, nodes)}")
        return "\n".join(lines)

    def _why_none(self, row: SiteRow) -> str:
        site = self.graph.site[row.name]
        block = self.profile.block if self.profile else BLOCK
        if not _patterns(site.kind):
            return "no pattern cuts it"
        possible = any(pattern.levels(site, block) for pattern in _patterns(site.kind))
        return "nothing gains beyond noise" if possible else f"too small for a level (blocks of {block})"

    def _levels(self, site: Site) -> Iterator[SiteLevel]:
        for pattern in _patterns(site.kind):
            if self.profile is None:
                yield from (SiteLevel(pattern.name, x.name, x.count, None) for x in pattern.levels(site, BLOCK))
                continue
            for level in pattern.legal(self.graph, site, self.profile):
                layers = [self.graph.layer[node] for node in site.layers]
                cuts = _cuts(pattern, site, level)
                gain = self.profile.gain((x.operator for x in layers), (cuts.operator(x) for x in layers))
                yield SiteLevel(pattern.name, level.name, level.count, gain)

    def _operators(self, block: int) -> Iterator[Any]:
        """All operators that the table asks for, so that they are measured together."""
        for site in self.graph.all_sites:
            layers = [self.graph.layer[node] for node in site.layers]
            for pattern in _patterns(site.kind):
                for level in pattern.levels(site, block):
                    cuts = _cuts(pattern, site, level)
                    yield from (operator for x in layers for operator in (x.operator, cuts.operator(x)))


def _cuts(pattern: Pattern, site: Site, level: Level) -> Cuts:
    return pattern.rewrite(site, level.keep or tuple(range(level.count)))


def _patterns(kind: str) -> list[Pattern]:
    return [pattern for pattern in patterns().values() if kind in pattern.kinds]


def _obvious(group: Group) -> bool:
    return bool(group.frozen) and all(reason.startswith(OBVIOUS) for reason in group.frozen)


def _members(group: Group) -> str:
    names = list(dict.fromkeys(member.parameter for member in group.members))
    return names[0] if len(names) == 1 else f"{shortened(names[0], NAME - 12)} and {len(names) - 1} more"


def _status(group: Group) -> str:
    if group.frozen:
        return f"no: {'; '.join(group.frozen)}"
    names = [pattern.name for pattern in _patterns(group.kind)]
    return f"yes: {', '.join(names)}" if names else "no pattern cuts it"


def _summary(levels: Iterable[SiteLevel]) -> str:
    """Levels in short: those of one shape in different places (`3x1 left`, `3x1 right`) are told once."""
    parts = []
    for (shape, _), same in groupby(levels, lambda level: (level.level.split()[0], level.count)):
        members = list(same)
        name = members[0].level if len(members) == 1 else shape
        gains = sorted(level.gain for level in members if level.gain is not None)
        ends = list(dict.fromkeys(map(_factor, (*gains[:1], *gains[-1:]))))
        parts.append(f"{name}: {'-'.join(ends)}x" if ends else name)
    return ", ".join(parts)


def _factor(gain: float) -> str:
    return f"{gain:.2f}" if gain < MOST_GAIN else f"over {MOST_GAIN:.0f}"


def _reach(graph: ModelGraph, nodes: set[str]) -> str:
    touched = [layer.operator for layer in graph.layers if layer.node in nodes]
    flops = sum(operator.flops for operator in touched) / max(1, graph.flops)
    parameters = sum(operator.parameters for operator in touched) / max(1, graph.parameter_count)
    return f"layers with {flops:.0%} of the FLOPs and {parameters:.0%} of the weights"


def shortened(text: str, width: int) -> str:
    """The end of a text that is longer than `width` characters."""
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _layout(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    """Aligned lines of at most `WIDTH` columns; the last column takes what is left, and wraps."""
    cells = [[shortened(cell, NAME) for cell in row[:-1]] for row in (headings, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    left = WIDTH - sum(widths) - 2 * len(widths)
    lines: list[str] = []
    for short, row in zip(cells, (headings, *rows), strict=True):
        padded = [
            cell.rjust(width) if number in numbers else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(short, widths, strict=True))
        ]
        first, *rest = textwrap.wrap(row[-1], max(20, left)) or [""]
        indent = " " * (sum(widths) + 2 * len(widths))
        lines += ["  ".join([*padded, first]).rstrip(), *(indent + line for line in rest)]
    return lines
