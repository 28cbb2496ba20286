"""What every pattern declares: where it is legal, at which levels, which units it keeps, and what that cuts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from graphprune.coupling.graph import ModelGraph, Patch, Site
from graphprune.cutting.cuts import Cuts
from graphprune.engines.base import Engine
from graphprune.repairing.calibration import Statistics
from graphprune.timing.profile import Profile

Scores = NDArray[np.float64]

SWEEPS = 4
"""How often each column's price is set by those of the others; that decides how long an assignment takes, not which."""


@dataclass(frozen=True)
class Level:
    """How much a pattern cuts: `count` units stay (none of a branch); `keep` names them where the geometry does."""

    name: str
    count: int
    keep: tuple[int, ...] = ()


class Pattern(ABC):
    """A regular shape of sparsity that can be rewritten into smaller dense operators.

    An agent's action mask is `legal`: structure decides in `levels`, the measured profile decides the rest.
    """

    name: ClassVar[str]
    kinds: ClassVar[frozenset[str]]
    """The kinds of site (`Site.kind`) at which it may be used."""

    @abstractmethod
    def levels(self, site: Site, block: int) -> tuple[Level, ...]:
        """The structurally possible levels at a site; `block` is the engine's vector block in channels."""

    @abstractmethod
    def rewrite(self, site: Site, keep: tuple[int, ...]) -> Cuts:
        """What is cut when the site keeps these units. Raises InputError where they do not form this pattern."""

    def units(self, site: Site) -> int:
        """How many units the pattern chooses from at a site."""
        return site.size

    def patches(self, site: Site) -> tuple[Patch, ...]:
        """What a filter may keep, for `choose` to have it scored for each; none if it wants the site's units scored."""
        return ()

    def kept(self, site: Site, keep: tuple[int, ...]) -> tuple[int, int]:
        """How many stay, and of how many: units, unless the pattern counts something else."""
        return len(keep), self.units(site)

    def scored(self, site: Site) -> tuple[int, ...]:
        """The shape of the scores that `choose` wants."""
        patches = len(self.patches(site))
        return (site.filters, patches) if patches else (site.size,)

    def sample(self, site: Site, level: Level) -> tuple[int, ...]:
        """Some units that the level could keep: which ones does not matter to the time."""
        return self.choose(site, level, np.zeros(self.scored(site)))

    def choose(self, site: Site, level: Level, scores: Scores) -> tuple[int, ...]:
        """The units that stay at a level: those fixed by the geometry, else the highest `scores`.

        `scores` are as `scored` says: [site.size], or [site.filters, patches] for a pattern with `patches`, or at a
        kernel without patches of its own those of all weights, [site.filters, site.channels].
        """
        if level.keep:
            return level.keep
        best = np.argsort(-scores, kind="stable")[: level.count]
        return tuple(sorted(int(index) for index in best))

    def error(self, site: Site, keep: tuple[int, ...], statistics: Statistics) -> float | None:
        """A relative error of the pattern's own; None where the layers that read what is cut tell all of it.

        It counts by the weight of the branch's sum, or of the site's layer (`graphprune.repairing.sensitivity`).
        """
        return None

    def refusal(self, engine: Engine | None) -> str:
        """Why the pattern gains nothing on an engine, whatever is measured; empty where it may. None is any engine."""
        return ""

    def legal(self, graph: ModelGraph, site: Site, profile: Profile) -> tuple[Level, ...]:
        """The levels whose measured gain on the site's layers exceeds the noise."""
        if site.kind not in self.kinds or self.refusal(profile.engine):
            return ()
        layers = [graph.layer[node] for node in site.layers]
        dense = [layer.operator for layer in layers]
        legal = []
        for level in self.levels(site, profile.block):
            cut = self.rewrite(site, self.sample(site, level))
            if profile.beyond_noise(dense, [cut.operator(layer) for layer in layers]):
                legal.append(level)
        return tuple(legal)


class GroupPattern(Pattern):
    """A pattern that keeps some units of a group and cuts the others everywhere the group reaches."""

    def rewrite(self, site: Site, keep: tuple[int, ...]) -> Cuts:
        """Keep the given units of the site's group."""
        return Cuts(keep={site.atom: np.asarray(keep, dtype=np.int64)})


def shares(site: Site, block: int, fractions: tuple[float, ...] = (0.75, 0.5, 0.25)) -> tuple[Level, ...]:
    """Levels at fractions of a site, each rounded to whole blocks of rows, without repeats, never all or nothing."""
    step = block // gcd(block, site.unit)
    counts = {max(step, round(fraction * site.size / step) * step) for fraction in fractions}
    return tuple(Level(f"{count} of {site.size}", count) for count in sorted(counts, reverse=True) if count < site.size)


def shared_equally(scores: Scores, columns: Sequence[int]) -> NDArray[np.int64]:
    """The number of the column that each filter gets when all get as many, at the highest total of `scores`.

    `scores` are [filters, patches]; `columns` are some of the patches, of which one may occur more than once.
    """
    share = len(scores) // len(columns)
    if not np.ptp(scores):  # all are the same, and thousands take a while
        return np.arange(len(scores)) // share
    offered = np.repeat(_priced(scores[:, list(columns)], share), share, axis=1)
    _, taken = linear_sum_assignment(offered, maximize=True)
    numbers: NDArray[np.int64] = taken // share
    return numbers


def _priced(scores: Scores, share: int) -> Scores:
    """Scores less a price for each column, at which about `share` filters like it best.

    What is best stays best, since as many filters get each column; but it is found in a fifth of a second and not in
    eleven for 3,072 filters of which most like the same quarter.
    """
    for _ in range(SWEEPS):
        for column, own in enumerate(scores.T):
            more = own - np.delete(scores, column, 1).max(1)
            scores[:, column] -= np.partition(more, -share)[-share]
    return scores
