"""The same cut everywhere: what a user does without a search."""

from itertools import product

import numpy as np

from graphprune.searching.problem import Choices, Decision, Option, Problem

Setting = tuple[float, ...] | float
"""A kernel's geometry, or the kept share of channels, heads or hidden units."""


def setting(option: Option) -> Setting:
    """What has to be equal everywhere: the geometry where there is one, otherwise the kept share."""
    return option.geometry or round(option.kept_share, 3)


def nearest(decision: Decision, wanted: Setting) -> int:
    """The option with that setting or, where the site lacks it, the one with the nearest kept share.

    Among kernels only whole windows are near each other: where filters differ nothing is like it, and the site stays.
    """
    for index, option in enumerate(decision.options):
        if setting(option) == wanted:
            return index
    share = sum(wanted) / len(wanted) if isinstance(wanted, tuple) else wanted
    near = list(range(len(decision.options)))
    if isinstance(wanted, tuple):
        near = [index for index in near if {*wanted, *decision.options[index].geometry} <= {0, 1}] or [0]
    return min(near, key=lambda index: abs(decision.options[index].kept_share - share))


def uniform_plans(problem: Problem) -> list[Choices]:
    """Every combination of one setting per kind of site that meets the target, nearest to the budget first."""
    kinds = sorted({decision.kind for decision in problem.decisions})
    menus = [
        dict.fromkeys(
            setting(option) for decision in problem.decisions if decision.kind == kind for option in decision.options
        )
        for kind in kinds
    ]
    plans = []
    for wanted in product(*menus):
        by_kind = dict(zip(kinds, wanted, strict=True))
        plans.append(problem.canonical([nearest(decision, by_kind[decision.kind]) for decision in problem.decisions]))
    legal = [plan for plan in dict.fromkeys(plans) if problem.allows(plan)]
    return sorted(legal, key=problem.overrun, reverse=True)


class Uniform:
    """One kernel geometry, one channel share, one share of heads: each the same in the whole network."""

    name = "uniform"

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Evaluate the uniform plans that meet the target; the cheapest plan where none does."""
        for plan in uniform_plans(problem) or [problem.cheapest]:
            problem.evaluate(plan)
