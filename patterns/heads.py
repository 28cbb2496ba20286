"""Attention heads: their rows in the projections, and the slice of the output projection that reads them."""

from typing import ClassVar

from graphprune.graph import Site
from graphprune.pattern import GroupPattern, Level


class Heads(GroupPattern):
    """Keeps some heads of an attention layer; the scale stays the dense one. With many heads, only a few levels."""

    name: ClassVar[str] = "heads"
    kinds: ClassVar[frozenset[str]] = frozenset({"heads"})

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Every number of heads for up to four of them, else eighths."""
        step = max(1, site.size // 8) if site.size > 4 else 1
        return tuple(Level(f"{count} of {site.size}", count) for count in range(site.size - step, 0, -step))
