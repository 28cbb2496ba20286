"""When to stop judging a candidate: a sequential test on images that are seen in random order.

What is left of the validation slice is drawn without replacement, so the number of right answers among the images seen
is hypergeometric, and whether a bar is still within reach can be told exactly, without an approximation.
"""

from dataclasses import dataclass
from math import ceil

from scipy.stats import hypergeom

LEVEL = 1e-4
"""Chance that a candidate which would just reach the bar is given up at one look."""


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
    needed = ceil(bar * total - 1e-9)
    if correct + total - seen < needed:
        return True
    return bool(hypergeom.cdf(correct, total, min(needed, total), seen) < LEVEL)
