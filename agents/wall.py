"""The action wall for agents that propose whole choice vectors instead of walking the sites."""

from collections.abc import Sequence

import numpy as np

from graphprune.searching.problem import Choices, Problem

OPEN = -1
"""Stands in a wanted vector for a site where nothing is wanted."""


def passes(problem: Problem, choices: Sequence[int]) -> bool:
    """Whether `problem.mask` allows every option of a whole choice vector that meets the target."""
    return problem.allows(choices) and all(problem.mask(choices[:site])[option] for site, option in enumerate(choices))


def repaired(problem: Problem, wanted: Sequence[int], rng: np.random.Generator) -> Choices:
    """The legal choice vector that follows `wanted` [sites] as far as the wall lets it, decided in the sites' order.

    An option that the wall forbids gives way to the nearest legal one; an open site is drawn uniformly from the legal
    options. A vector that is legal already comes back as it is.
    """
    choices: Choices = ()
    for site, option in enumerate(wanted):
        legal = np.flatnonzero(problem.mask(choices))
        if option == OPEN:
            taken = int(rng.choice(legal))
        else:
            taken = option if option in legal else nearest(problem, site, option, legal.tolist())
        choices = (*choices, taken)
    return choices


def nearest(problem: Problem, site: int, option: int, legal: Sequence[int]) -> int:
    """The legal option of a site that costs most nearly what `option` costs, the other sites dense; least error first
    among equals.
    """
    costs, errors = problem.alone(site)
    return min(legal, key=lambda other: (abs(costs[other] - costs[option]), errors[other]))


def only_plan(problem: Problem) -> Choices | None:
    """The plan that is left when the action wall leaves one option everywhere (or nothing is feasible), else None."""
    choices: Choices = ()
    for _ in problem.decisions:
        (open_options,) = np.nonzero(problem.mask(choices))
        if len(open_options) > 1:
            return None
        choices = (*choices, int(open_options[0]))
    return choices
