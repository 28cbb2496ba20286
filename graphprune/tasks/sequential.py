"""When to stop judging a candidate: a sequential test on images that are seen in random order.

What is left of the validation slice is drawn without replacement, so the number of right answers among the images seen
is hypergeometric, and whether a bar is still within reach can be told exactly, without an approximation.
"""

import heapq
from dataclasses import dataclass, field
from math import ceil

from scipy.stats import hypergeom

LEVEL = 1e-4
"""Chance that a candidate which would just reach the bar is given up at one look."""
KEPT = 10
"""So many of the best candidates are judged on every image."""


@dataclass(frozen=True)
class Judgement:
    """An accuracy in [0, 1] over the first `images` of `total`; all of them unless the candidate was given up."""

    accuracy: float
    images: int
    total: int

    @property
    def complete(self) -> bool:
        """Whether every image was seen."""
        return self.images == self.total


def hopeless(correct: int, seen: int, total: int, bar: float) -> bool:
    """Whether `correct` of `seen` images make it improbable that at least the share `bar` of all `total` are right.

    `bar` is an accuracy in [0, 1]; the images seen are a random sample of all.
    """
    if bar > 1:
        return True
    needed = ceil(bar * total - 1e-9)
    if correct + total - seen < needed:
        return True
    return bool(hypergeom.cdf(correct, total, needed, seen) < LEVEL)


@dataclass
class Bar:
    """What a candidate must reach to be among the `KEPT` best so far; 0 while there are fewer."""

    _best: list[float] = field(default_factory=list)

    @property
    def height(self) -> float:
        """The accuracy of the last of the best."""
        return self._best[0] if len(self._best) == KEPT else 0.0

    def raise_by(self, accuracy: float) -> None:
        """A candidate was judged on every image."""
        if len(self._best) < KEPT:
            heapq.heappush(self._best, accuracy)
        else:
            heapq.heappushpop(self._best, accuracy)
