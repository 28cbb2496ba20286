"""A convolution or linear layer in groups: each filter reads only the half or quarter of the channels it needs most.

A block-diagonal weight, as grouped convolutions have it (Krizhevsky et al. 2012; Xie et al., CVPR 2017, arXiv
1611.05431). The channels stay where they are; the filters are put in order, so that those of one group stand together,
and every consumer takes over that order, so no gather remains. The outputs of a linear layer are its filters, its
inputs are its channels.
"""

from typing import ClassVar

import numpy as np

from graphprune.coupling.graph import Patch, Site, group_patches
from graphprune.cutting.cuts import Cuts
from graphprune.errors import InputError
from graphprune.pattern import Level, Pattern, Scores, shared_equally

PARTS = 4
"""The finest division; a unit is one of so many parts of the channels, for one filter: filter * PARTS + part."""
_LEVELS = {"2 groups": 2, "4 groups": 4}


class Groups(Pattern):
    """Shares the filters of a layer equally among 2 or 4 groups, each filter where it loses least."""

    name: ClassVar[str] = "groups"
    kinds: ClassVar[frozenset[str]] = frozenset({"kernel"})

    def units(self, site: Site) -> int:
        """A unit is one part of the channels, for one filter."""
        return site.filters * PARTS

    def patches(self, site: Site) -> tuple[Patch, ...]:
        """The channels of every group of every level."""
        return tuple(
            patch for groups in _LEVELS.values() for patch in group_patches(site.kernel, site.channels, groups)
        )

    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """Those that give each group whole blocks of channels and filters, where filters may stand in any order."""
        return tuple(
            Level(name, site.filters * PARTS // groups)
            for name, groups in _LEVELS.items()
            if site.order >= 0 and site.channels % (groups * block) == site.filters % (groups * block) == 0
        )

    def choose(self, site: Site, level: Level, scores: Scores) -> tuple[int, ...]:
        """The assignment of filters to groups with the highest total of `scores` [filters, patches]."""
        groups = _LEVELS[level.name]
        patches = self.patches(site)
        columns = [patches.index(patch) for patch in group_patches(site.kernel, site.channels, groups)]
        kept = np.zeros((site.filters, groups, PARTS // groups), dtype=bool)
        kept[np.arange(site.filters), shared_equally(scores, columns)] = True
        return tuple(np.flatnonzero(kept).tolist())

    def rewrite(self, site: Site, keep: tuple[int, ...]) -> Cuts:
        """Divide the layer. Raises InputError unless each filter keeps one group, and each group as many."""
        kept = np.zeros((site.filters, PARTS), dtype=bool)
        kept.reshape(-1)[list(keep)] = True
        if kept.all():
            return Cuts()
        groups = PARTS // max(1, int(kept[0].sum()))
        own = kept.argmax(1) * groups // PARTS
        whole = np.arange(PARTS) * groups // PARTS == own[:, None]
        if site.order < 0 or (kept != whole).any() or len(set(np.bincount(own, minlength=groups))) > 1:
            raise InputError(f"{site.name!r} needs filters in free order, equally many of which keep each group")
        return Cuts(groups={site.node: tuple(own.tolist())}, order={site.order: np.argsort(own, kind="stable")})
