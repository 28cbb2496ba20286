"""Attention heads: their rows in the projections, and the slice of the output projection that reads them.

The width of all heads as well: that of queries and keys, and that of values; together where one layer makes all three.
"""

from typing import ClassVar

from graphprune.coupling.graph import Site
from graphprune.pattern import GroupPattern, Level, shares


class Heads(GroupPattern):
    """Keeps some heads of an attention layer, or the same columns in each of its heads.

    The scale stays the dense one. With many heads, only a few levels.
    """

    name: ClassVar[str] = "heads"
    kinds: ClassVar[frozenset[str]] = frozenset({"heads", "head-width", "value"})

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Every number of heads for up to four of them, else eighths; quarters of a width."""
        if site.kind != "heads":
            return shares(site, block, (0.75, 0.5, 0.25))
        step = max(1, site.size // 8) if site.size > 4 else 1
        return tuple(Level(f"{count} of {site.size}", count) for count in range(site.size - step, 0, -step))
