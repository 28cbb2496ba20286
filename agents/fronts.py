"""From ratios to options: how agents that speak in numbers between 0 and 1 pick among what a site offers.

Of each site alone, the others dense, only the options count that no other beats in both cost and error: its front. A
ratio is the share of what the site can save that is saved: 0 is dense, 1 the cheapest option of the front.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from graphprune.searching.problem import Choices, Floats, Problem


def front(costs: Floats, errors: Floats) -> NDArray[np.int64]:
    """Indices of the settings that no other beats in both cost and error, by rising cost."""
    order = np.lexsort((errors, costs))
    best = np.minimum.accumulate(np.concatenate([[np.inf], errors[order][:-1]]))
    return order[errors[order] < best]


class Fronts:
    """The (cost, error) front of every site of a problem, and the ratio at which each option stands.

    `ratios` holds for each site an array [options] with the share of the site's largest saving that the option alone
    saves; NaN for options that are not on the front.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.ratios: tuple[Floats, ...] = tuple(map(self._site, range(len(problem.decisions))))

    def _site(self, site: int) -> Floats:
        costs, errors = self.problem.alone(site)
        kept = front(np.where(costs <= costs[0], costs, np.inf), errors)
        ratios = np.full(len(costs), np.nan)
        ratios[kept] = (costs[0] - costs[kept]) / max(float(costs[0] - costs[kept].min()), 1e-12)
        ratios[0] = 0.0
        return ratios

    def nearest(self, site: int, ratio: float, legal: NDArray[np.bool_]) -> int:
        """The legal option [options] whose place on the front is nearest to a ratio; where the action wall leaves none
        of the front, the legal option that costs least alone.
        """
        distance = np.where(legal, np.abs(self.ratios[site] - ratio), np.nan)
        if np.isnan(distance).all():
            return int(np.where(legal, self.problem.alone(site)[0], np.inf).argmin())
        return int(np.nanargmin(distance))

    def plan(self, ratios: Sequence[float]) -> Choices:
        """The choice vector nearest to a ratio for each site, decided in order under the action wall."""
        choices: Choices = ()
        for site, ratio in enumerate(ratios):
            choices = (*choices, self.nearest(site, ratio, self.problem.mask(choices)))
        return choices

    def executed(self, choices: Choices) -> Floats:
        """The ratios [sites] at which a plan really stands; what is not on a front counts by what it saves alone."""
        found = np.zeros(len(choices))
        for site, option in enumerate(choices):
            found[site] = self.ratios[site][option]
            if np.isnan(found[site]):
                costs, _ = self.problem.alone(site)
                span = costs[0] - costs[~np.isnan(self.ratios[site])].min()
                found[site] = np.clip((costs[0] - costs[option]) / max(float(span), 1e-12), 0.0, 1.0)
        return found
