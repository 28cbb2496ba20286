"""What whole models save, against what the times of their layers say: a few plans are measured before a search.

The profile knows layers alone. What else a model does, what the engine fuses, and that a search finds the plans whose
layers were timed too fast (the optimiser's curse: Smith and Winkler 2006) is in one factor.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite
from statistics import median

import numpy as np

from graphprune.searching.problem import Choices, Problem, Sum
from graphprune.searching.tightening import tightened

PROBES = 7
"""Plans near the target that are measured before the search."""
PROBE_SEED = 2412
"""Of the errors that these plans are drawn for."""
DOUBT = 0.5
"""Standard deviation of the logarithm of the weight that each layer's error gets in such a plan, at first."""
ATTEMPTS = 4
"""How many are drawn at most for each plan that is wanted, since they may be alike."""
LEAST_SAVED = 0.05
"""Plans that save less tell nothing about the factor."""


def likely_plans(problem: Problem, rng: np.random.Generator) -> list[Choices]:
    """`PROBES` plans as searches come to return them: just within the target, with little error, by errors drawn anew.

    Plans drawn without regard to their errors save much more than the target asks for, and at other layers. They are
    fewer where there are no others, and the cheapest plan where nothing is within the target by prediction.
    """
    found: dict[Choices, None] = {}
    for attempt in range(ATTEMPTS * PROBES):
        spread = DOUBT * (1 + attempt / PROBES)
        weights = np.exp(spread * rng.normal(size=len(problem.error.factors)))
        plan = tightened(replace(problem, error=problem.error.weighted(weights)), problem.dense, 1.0)
        found[problem.cheapest if plan is None else plan] = None
        if len(found) == PROBES:
            break
    return list(found)


def saving_factor(pairs: Sequence[tuple[float, float]]) -> float:
    """What whole models save / what their layers' sum says, the median over (predicted, measured) latency shares."""
    ratios = [(1 - measured) / (1 - predicted) for predicted, measured in pairs if 1 - predicted > LEAST_SAVED]
    return median(ratios or [1.0])


def corrected(cost: Sum, factor: float) -> Sum:
    """A cost share whose savings are multiplied by `factor`; the dense model stays at 1."""
    factor = factor if isfinite(factor) and factor > 0 else 1.0
    scaled = cost.weighted([factor] * len(cost.factors))
    return replace(scaled, constant=1 - factor + factor * cost.constant)
