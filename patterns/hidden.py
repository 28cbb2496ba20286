"""Hidden units of an MLP, gated ones included: their halves are one group, so they stay aligned."""

from typing import ClassVar

from graphprune.coupling.graph import Site
from graphprune.pattern import GroupPattern, Level, shares


class Hidden(GroupPattern):
    """Keeps some hidden units. Matrix products show no sharp block, but whole blocks never hurt."""

    name: ClassVar[str] = "hidden"
    kinds: ClassVar[frozenset[str]] = frozenset({"hidden"})

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Quarters in whole blocks, and one eighth."""
        return shares(site, block, (0.75, 0.5, 0.25, 0.125))
