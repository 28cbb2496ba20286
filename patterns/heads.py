"""Attention heads: their rows in the projections, and the slice of the output projection that reads them.

Where values are projected apart from queries and keys, the width of the values in every head as well.
"""

from typing import ClassVar

from graphprune.graph import Site
from graphprune.pattern import GroupPattern, Level, shares


class Heads(GroupPattern):
    """Keeps some heads of an attention layer, or the same columns of the values in each of its heads.

    The scale stays the dense one. With many heads, only a few levels.
    """

    name: ClassVar[str] = "heads"
    kinds: ClassVar[frozenset[str]] = frozenset({"heads", "value"})

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Every number of heads for up to four of them, else eighths; quarters of the values' width."""
        if site.kind == "value":
            return shares(site, block, (0.75, 0.5, 0.25))
        step = max(1, site.size // 8) if site.size > 4 else 1
        return tuple(Level(f"{count} of {site.size}", count) for count in range(site.size - step, 0, -step))
