"""The tables that people read: what is cut together, and where which pattern may be used."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, overload

from graphprune.coupling.graph import Group, ModelGraph
from graphprune.engines.base import Engine
from graphprune.pattern import Pattern
from graphprune.registry import chosen_patterns, patterns
from graphprune.timing.cases import Case, cases, legal_cases, operators
from graphprune.timing.profile import MOST_GAIN, Profile

WIDTH = 120
"""Columns of a terminal that a table fits in."""

NAME = 36
"""Columns of a name; of a longer one the end is shown, which tells more than its beginning."""

BLOCK = 16
"""Rows of a vector block where no profile was made."""

SOLID = "\N{NO-BREAK SPACE}"
"""A space at which no line is broken."""

REPEATED = 40
"""A longer text is told once: rows with the same text name the first one of them."""

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
        headings = ("group", "kind", "size", "unit", "parameters", "may it be cut?")
        lines = layout(headings, _told_once(rows, (1, 2, 3)), numbers=(2, 3))
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
            self.profile.fill(operators(self.graph, chosen_patterns(None, self.profile.engine), self.profile.block))
        found = self._cases()
        return tuple(
            SiteRow(site.name, site.kind, site.size, tuple(map(self._level, found.get(site.name, ()))))
            for site in self.graph.all_sites
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
        return {"engine": engine, "block": self._block, "sites": [asdict(row) for row in self]}

    def __str__(self) -> str:
        heading = "levels: dense time / time" if self.profile else f"possible levels (not measured; blocks of {BLOCK})"
        rows: list[tuple[str, ...]] = []
        refused: dict[tuple[str, str], int] = {}
        for row in self:
            if not row.levels and (why := self._refusal(row)):
                refused[why] = refused.get(why, 0) + 1
                continue
            cells = (row.name, row.kind, str(row.size))
            found = [(name, _summary(levels)) for name, levels in groupby(row.levels, lambda level: level.pattern)]
            rows += [(*cells, name, levels) for name, levels in found or [("-", self._why_none(row))]]
        told = _told_once(rows, (1, 2, 3))
        lines = layout(("site", "kind", "size", "pattern", heading), told, numbers=(2,))
        lines += [f"not shown: {count} layers for {name}: {reason}" for (name, reason), count in refused.items()]
        nodes = {node for row in self if row.levels for node in self.graph.site[row.name].layers}
        lines.append(f"sites with a choice reach {_reach(self.graph, nodes)}")
        return "\n".join(lines)

    @property
    def _engine(self) -> Engine | None:
        return self.profile.engine if self.profile else None

    @property
    def _block(self) -> int:
        return self.profile.block if self.profile else BLOCK

    def _possible(self, row: SiteRow) -> list[Pattern]:
        """The patterns that the structure allows, whether they gain or not."""
        site = self.graph.site[row.name]
        return [pattern for pattern in _patterns(site.kind) if pattern.levels(site, self._block)]

    def _refusal(self, row: SiteRow) -> tuple[str, str] | None:
        """The only pattern that the structure allows, and why it gains nothing here; None where that is not so."""
        reasons = [(pattern.name, pattern.refusal(self._engine)) for pattern in self._possible(row)]
        return reasons[0] if len(reasons) == 1 and reasons[0][1] else None

    def _why_none(self, row: SiteRow) -> str:
        site, block = self.graph.site[row.name], self._block
        if not _patterns(site.kind):
            return "no pattern cuts it"
        if any(not pattern.refusal(self._engine) for pattern in self._possible(row)):
            return "nothing gains beyond noise"
        rows, columns = site.kernel
        if max(site.kernel) > 1:
            return f"no level for {rows}x{columns}"
        return f"too small for a level (blocks of {block})"

    def _cases(self) -> dict[str, list[Case]]:
        """What the table shows, by site."""
        found: Iterable[Case] = list(cases(self.graph, chosen_patterns(None, self._engine), self._block))
        if self.profile is not None:
            found = legal_cases(found, self.graph, self.profile)
        return {name: list(same) for name, same in groupby(found, lambda case: case.site.name)}

    def _level(self, case: Case) -> SiteLevel:
        gain = self.profile.gain(case.dense, case.cut) if self.profile else None
        return SiteLevel(case.pattern.name, case.level.name, case.level.count, gain)


def _patterns(kind: str) -> list[Pattern]:
    return [pattern for pattern in patterns().values() if kind in pattern.kinds]


def _obvious(group: Group) -> bool:
    return bool(group.frozen) and all(reason.startswith(OBVIOUS) for reason in group.frozen)


def _members(group: Group) -> str:
    names = list(dict.fromkeys(member.parameter for member in group.members))
    return names[0] if len(names) == 1 else f"{shortened(names[0], NAME - 12)} and {len(names) - 1} more"


def _status(group: Group) -> str:
    if group.frozen:
        return f"no: {'; '.join(_without_place(reason, group.name) for reason in group.frozen)}"
    names = [pattern.name for pattern in _patterns(group.kind)]
    return f"yes: {', '.join(names)}" if names else "no pattern cuts it"


def _without_place(reason: str, name: str) -> str:
    """The reason without `in MODULE`, where that is the module which the group is named after, or around it."""
    before, found, module = reason.removesuffix(")").rpartition(" in ")
    return f"{before})" if found and reason.endswith(")") and f"{name}.".startswith(f"{module}.") else reason


def _told_once(rows: Iterable[tuple[str, ...]], same: Sequence[int]) -> list[tuple[str, ...]]:
    """Rows whose last cell, if long, points to an earlier row that agrees in it and in the columns `same`."""
    first: dict[tuple[str, ...], str] = {}
    told = []
    for row in rows:
        text = row[-1]
        name = first.setdefault((*(row[column] for column in same), text), row[0])
        if name != row[0] and len(text) > REPEATED:
            text = f"{'no: ' if text.startswith('no: ') else ''}as {shortened(name, NAME)}"
        told.append((*row[:-1], text))
    return told


def _summary(levels: Iterable[SiteLevel]) -> str:
    """Levels in short: those of one shape in different places (`3x1 left`, `3x1 right`) are told once."""
    parts = []
    for (shape, _), same in groupby(levels, lambda level: (level.level.split()[0], level.count)):
        members = list(same)
        name = members[0].level if len(members) == 1 else shape
        gains = sorted(level.gain for level in members if level.gain is not None)
        ends = list(dict.fromkeys(map(_factor, (*gains[:1], *gains[-1:]))))
        parts.append((f"{name}: {'-'.join(ends)}x" if ends else name).replace(" ", SOLID))
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


def layout(headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
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
    return [line.replace(SOLID, " ") for line in lines]
