"""Engines, threads and batches side by side: the measured shares of a delivered model, and what may be cut in it."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from graphprune.engines import settings_in
from graphprune.record import Share
from graphprune.reporting.grid import Cell
from graphprune.reporting.wording import latency, setting
from graphprune.timing.measure import verdict


@dataclass(frozen=True)
class Condition:
    """An engine with its threads and batch, as `share.engine` names it.

    `share` is the delivered model's latency there, `cells` is what each level of each pattern gains in the dense model
    there and whether it is offered; None where nobody asked.
    """

    share: Share
    cells: tuple[Cell, ...] | None = None

    @property
    def name(self) -> str:
        """Engine and version: "onnxruntime 1.32.0"."""
        return self.share.engine.partition(",")[0]

    @property
    def place(self) -> tuple[str, int, int]:
        """Where it stands in a table: by engine, threads and batch."""
        told = settings_in(self.share.engine)
        return self.name, told["threads"], told["batch"]


@dataclass(frozen=True)
class EngineRow:
    """A line of the table of engines. `own`: the condition that the run was searched for."""

    engine: str
    threads: int
    batch: int
    dense: str
    pruned: str
    share: str
    verdict: str
    own: bool


def engine_rows(conditions: Sequence[Condition], own: str) -> list[EngineRow]:
    """The measured shares, by engine, threads and batch; `own` is the identity of the run's engine."""
    return [_row(condition, own) for condition in sorted(conditions, key=lambda condition: condition.place)]


def _row(condition: Condition, own: str) -> EngineRow:
    one = condition.share
    dense, pruned = median(one.dense), median(one.candidate)
    told = f"{100 * one.value:.1f} % ({100 * one.low:.1f} to {100 * one.high:.1f})"
    times = latency(dense, dense), latency(pruned, dense)
    return EngineRow(*condition.place, *times, told, verdict(one), one.engine == own)


@dataclass(frozen=True)
class Difference:
    """A level that is offered under some conditions only, at `sites` sites of the same `layers`.

    `gains` are what it does under each condition, and whether it is offered there.
    """

    pattern: str
    layers: str
    sites: int
    level: str
    gains: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Offers:
    """What may be cut under each condition, side by side: `titles` are the columns, each an engine and its setting.

    `counts` tells, for each pattern, how many of its levels are offered, counted at every site.
    """

    titles: tuple[tuple[str, str], ...]
    counts: tuple[tuple[str, tuple[str, ...]], ...]
    differences: tuple[Difference, ...]


def offers(conditions: Sequence[Condition]) -> Offers | None:
    """The tables of what is offered; None where nothing is known of it."""
    asked = sorted((one for one in conditions if one.cells is not None), key=lambda one: one.place)
    if not asked:
        return None
    titles = tuple((one.name, setting(one.share.engine)) for one in asked)
    columns = [one.cells or () for one in asked]
    patterns = dict.fromkeys(cell.pattern for column in columns for cell in column)
    counts = tuple((pattern, tuple(_count(column, pattern) for column in columns)) for pattern in patterns)
    return Offers(titles, counts, tuple(_differences(columns)))


def _count(cells: Sequence[Cell], pattern: str) -> str:
    own = [cell for cell in cells if cell.pattern == pattern]
    return f"{sum(cell.sites for cell in own if not cell.reason)} of {sum(cell.sites for cell in own)}"


def _differences(columns: Sequence[Sequence[Cell]]) -> Iterator[Difference]:
    """The levels that are offered in some columns and not in others, in the order of the cells."""
    named = [{(cell.pattern, cell.shape, cell.level): cell for cell in column} for column in columns]
    cells = {name: cell for column in named for name, cell in column.items()}
    for name, first in cells.items():
        gains = tuple(_gain(column.get(name)) for column in named)
        if len({offered for _, offered in gains}) > 1:
            yield Difference(first.pattern, first.shape, first.sites, first.level, gains)


def _gain(cell: Cell | None) -> tuple[str, bool]:
    """What a level gains, in brackets where that is not enough, and whether it is offered."""
    if cell is None:
        return "not tried", False
    gain = f"{cell.speedup:.2f}×" if math.isfinite(cell.speedup) else ""
    if not cell.reason:
        return gain or "nothing left", True
    return (f"no ({gain})" if gain else f"no: {cell.reason}"), False
