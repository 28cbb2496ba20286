"""Residual branches that go as a whole: an attention, an MLP, what a convolutional block adds to its input."""

from typing import ClassVar

from graphprune.coupling.graph import Site
from graphprune.cutting.cuts import Cuts
from graphprune.pattern import Level, Pattern
from graphprune.repairing.calibration import Statistics


class Block(Pattern):
    """Drops a branch with all its layers, norms and scales, so that only its skip is left.

    Depth is what a network has most of: Veit, Wilber and Belongie (NeurIPS 2016, arXiv 1605.06431) find that a
    residual network loses little with a single branch.
    """

    name: ClassVar[str] = "block"
    kinds: ClassVar[frozenset[str]] = frozenset({"block"})

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """All or nothing."""
        return (Level("removed", 0),)

    def rewrite(self, site: Site, keep: tuple[int, ...]) -> Cuts:
        """Drop the branch unless its only unit is kept."""
        return Cuts() if keep or site.branch is None else Cuts(dropped=(site.branch,))

    def error(self, site: Site, keep: tuple[int, ...], statistics: Statistics) -> float | None:
        """The energy of what the branch adds, as a share of that of the sum: E|branch|^2 / E|skip + branch|^2."""
        if keep or site.branch is None:
            return 0.0
        return statistics.branches.get(site.branch.node, 1.0)
