"""Output channels of convolutions, in whole engine blocks, with everything that is coupled to them."""

from typing import ClassVar

from graphprune.coupling.graph import Site
from graphprune.pattern import GroupPattern, Level, shares


class Filter(GroupPattern):
    """Keeps 3/4, 1/2 or 1/4 of a channel group, rounded to whole vector blocks.

    A convolution that computes blocks of 16 channels is no faster with 15 than with 16, often slower; so no level
    lies between blocks, and a group of a single block has none.
    """

    name: ClassVar[str] = "filter"
    kinds: ClassVar[frozenset[str]] = frozenset({"channels"})

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Whole blocks of channels."""
        return shares(site, block)
