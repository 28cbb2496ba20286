"""A kernel geometry for each filter: filters sorted by geometry, one small convolution per geometry, concatenated.

The granularity of AutoSculpt (Jing et al. 2024, arXiv 2412.18091): zero, one row or column, two rows or columns, or
dense, one for each filter. Here it becomes dense operators: every consumer of the channels takes over their new order,
so no gather remains. Zero filters are the pattern `filter`. Ours: centred rows and columns (an off-centre one-wide
window costs a crop), and levels that give each geometry whole vector blocks of filters.
"""

from typing import ClassVar

import numpy as np

from graphprune.coupling.graph import Patch, Site, Window
from graphprune.cutting.cuts import Cuts
from graphprune.errors import InputError
from graphprune.pattern import Level, Pattern, Scores, shared_equally

_WHOLE, _FIRST, _MIDDLE, _LAST = (0, 3), (0, 2), (1, 2), (1, 3)
_GEOMETRY: dict[str, Window] = {
    "3x3": (_WHOLE, _WHOLE),
    "3x2 left": (_WHOLE, _FIRST),
    "3x2 right": (_WHOLE, _LAST),
    "2x3 top": (_FIRST, _WHOLE),
    "2x3 bottom": (_LAST, _WHOLE),
    "2x2 top left": (_FIRST, _FIRST),
    "2x2 top right": (_FIRST, _LAST),
    "2x2 bottom left": (_LAST, _FIRST),
    "2x2 bottom right": (_LAST, _LAST),
    "3x1": (_WHOLE, _MIDDLE),
    "1x3": (_MIDDLE, _WHOLE),
}
_WINDOWS = tuple(_GEOMETRY.values())
_LEVELS: dict[str, tuple[str, ...]] = {
    "3x3 3x3 3x1 1x3": ("3x3", "3x3", "3x1", "1x3"),
    "3x2 2x3 each side": ("3x2 left", "3x2 right", "2x3 top", "2x3 bottom"),
    "2x2 each corner": ("2x2 top left", "2x2 top right", "2x2 bottom left", "2x2 bottom right"),
    "3x1 1x3": ("3x1", "1x3"),
}
"""Geometries that share the filters equally."""


class KernelMix(Pattern):
    """Shares the filters of a 3x3 convolution equally among some geometries, each filter where it loses least."""

    name: ClassVar[str] = "kernel-mix"
    kinds: ClassVar[frozenset[str]] = frozenset({"kernel"})

    def units(self, site: Site) -> int:
        """A unit is one position of one filter: filter * positions + position."""
        return site.filters * site.size

    def patches(self, site: Site) -> tuple[Patch, ...]:
        """All geometries of the levels, with all channels."""
        return tuple((*window, (0, site.channels)) for window in _WINDOWS)

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Those that give each geometry whole blocks, where the filters may stand in any order."""
        if site.kernel != (3, 3) or site.order < 0:
            return ()
        return tuple(
            Level(name, sum(_area(_GEOMETRY[part]) for part in parts) * site.filters // len(parts))
            for name, parts in _LEVELS.items()
            if site.filters % (len(parts) * block) == 0
        )

    def choose(self, site: Site, level: Level, scores: Scores) -> tuple[int, ...]:
        """The assignment of filters to geometries with the highest total of `scores` [filters, geometries]."""
        names = list(_GEOMETRY)
        parts = [names.index(part) for part in _LEVELS[level.name]]
        positions = np.arange(site.size).reshape(site.kernel)
        keep = [
            filter_ * site.size + positions[slice(*rows), slice(*columns)].reshape(-1)
            for filter_, part in enumerate(shared_equally(scores, parts))
            for rows, columns in (_WINDOWS[parts[part]],)
        ]
        return tuple(int(unit) for unit in np.concatenate(keep))

    def rewrite(self, site: Site, keep: tuple[int, ...]) -> Cuts:
        """Keep a rectangle of each filter. Raises InputError unless every filter keeps one."""
        kept = np.zeros((site.filters, *site.kernel), dtype=bool)
        kept.reshape(-1)[list(keep)] = True
        if site.order < 0 or not kept.any((1, 2)).all():
            raise InputError(f"{site.name!r} needs filters in free order that each keep some position")
        windows = [_window(filter_) for filter_ in kept]
        if sum(map(_area, windows)) != len(keep):
            raise InputError(f"the kept positions of a filter of {site.name!r} are not a rectangle")
        kinds = sorted(set(windows))
        if len(kinds) == 1:
            return Cuts(windows={site.node: kinds[0]} if len(keep) < kept.size else {})
        order = np.argsort([kinds.index(window) for window in windows], kind="stable")
        return Cuts(mixes={site.node: tuple(windows)}, order={site.order: order})


def _window(kept: np.ndarray) -> Window:
    rows, columns = (np.flatnonzero(kept.any(axis)) for axis in (1, 0))
    return (int(rows[0]), int(rows[-1]) + 1), (int(columns[0]), int(columns[-1]) + 1)


def _area(window: Window) -> int:
    (top, bottom), (left, right) = window
    return (bottom - top) * (right - left)
