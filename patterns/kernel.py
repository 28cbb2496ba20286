"""One smaller geometry for all kernels of a convolution, rewritten into a convolution with that smaller kernel."""

from itertools import product
from typing import ClassVar

import numpy as np

from graphprune.coupling.graph import Site
from graphprune.cutting.cuts import Cuts
from graphprune.errors import InputError
from graphprune.pattern import Level, Pattern

_PLACES: dict[int, tuple[str, ...]] = {1: ("top", "middle", "bottom"), 2: ("top", "bottom"), 3: ()}
_SIDES: dict[int, tuple[str, ...]] = {1: ("left", "centre", "right"), 2: ("left", "right"), 3: ()}


class Kernel(Pattern):
    """Every smaller rectangle of a 3x3 kernel; the middle row, column and 3x3 of larger ones.

    The window keeps its place: one-sided padding makes it read what it read inside the whole kernel. A one-wide
    window away from the centre also needs a crop, and is timed with it.
    """

    name: ClassVar[str] = "kernel"
    kinds: ClassVar[frozenset[str]] = frozenset({"kernel"})

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Every window of a 3x3 kernel, and the centred windows of odd larger kernels."""
        if site.kernel == (3, 3):
            return _small_windows()
        if all(side % 2 and side > 3 for side in site.kernel):
            return _centred_windows(*site.kernel)
        return ()

    def rewrite(self, site: Site, keep: tuple[int, ...]) -> Cuts:
        """Keep a rectangle of kernel positions."""
        if len(keep) == site.size:
            return Cuts()
        rows, columns = np.divmod(np.asarray(keep), site.kernel[1])
        window = ((int(rows.min()), int(rows.max()) + 1), (int(columns.min()), int(columns.max()) + 1))
        if (window[0][1] - window[0][0]) * (window[1][1] - window[1][0]) != len(keep):
            raise InputError(f"the kept positions of {site.name!r} are not a rectangle")
        return Cuts(windows={site.node: window})


def _small_windows() -> tuple[Level, ...]:
    levels = []
    for height, width in ((3, 2), (2, 3), (2, 2), (3, 1), (1, 3), (1, 1)):
        for row, column in product(range(4 - height), range(4 - width)):
            place = " ".join(_PLACES[height][row : row + 1] + _SIDES[width][column : column + 1])
            name = f"{height}x{width} {place}".replace("middle centre", "centre")
            levels.append(_level(name, 3, (row, row + height), (column, column + width)))
    return tuple(levels)


def _centred_windows(height: int, width: int) -> tuple[Level, ...]:
    row, column = height // 2, width // 2
    return (
        _level("3x3 centre", width, (row - 1, row + 2), (column - 1, column + 2)),
        _level(f"{height}x1 centre", width, (0, height), (column, column + 1)),
        _level(f"1x{width} middle", width, (row, row + 1), (0, width)),
    )


def _level(name: str, width: int, rows: tuple[int, int], columns: tuple[int, int]) -> Level:
    keep = tuple(row * width + column for row in range(*rows) for column in range(*columns))
    return Level(name, len(keep), keep)
