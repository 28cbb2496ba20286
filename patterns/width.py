"""The embedding width of a transformer or of one of its stages: the residual stream and all that reads or writes it."""

from typing import ClassVar

from graphprune.coupling.graph import Site
from graphprune.pattern import GroupPattern, Level, shares


class Width(GroupPattern):
    """Keeps 3/4 or 1/2 of a residual stream in whole blocks; norms run over what is left of it.

    Position embeddings, class tokens, norms, heads and every block on the stream become narrower together.
    """

    name: ClassVar[str] = "width"
    kinds: ClassVar[frozenset[str]] = frozenset({"width"})

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Three quarters and a half, in whole blocks."""
        return shares(site, block, (0.75, 0.5))
