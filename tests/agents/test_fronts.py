"""Ratios and the options they stand for, on tables small enough to work out."""

import numpy as np
import pytest

from graphprune.agents.fronts import Fronts, front
from graphprune.searching.problem import Factor, Problem, Sum
from tests.agents.toys import problem


def one_site(costs: list[float], errors: list[float], limit: float = 1.0) -> Problem:
    """A problem of one site with these costs and errors."""
    made = problem(sizes=(len(costs),), limit=limit, pairs=False)
    made.costs = {"latency": Sum(0.0, (Factor((0,), np.array(costs)),))}
    made.error = Sum(0.0, (Factor((0,), np.array(errors)),))
    return made


def test_front_keeps_what_nothing_beats() -> None:
    rng = np.random.default_rng(0)
    costs, errors = rng.integers(0, 12, 60).astype(float), rng.integers(0, 12, 60).astype(float)
    kept = front(costs, errors)
    pairs = set(zip(costs, errors, strict=True))
    unbeaten = {(c, e) for c, e in pairs if not any((x <= c and y <= e and (x, y) != (c, e)) for x, y in pairs)}
    assert {(costs[i], errors[i]) for i in kept} == unbeaten
    assert len(kept) == len(unbeaten)
    assert (np.diff(costs[kept]) > 0).all()


def test_a_ratio_is_the_share_of_the_largest_saving() -> None:
    made = one_site([1.0, 0.9, 0.8, 0.5, 1.2], [0.0, 0.1, 0.05, 0.4, 0.0])
    ratios = Fronts(made).ratios[0]
    assert np.allclose(ratios, [0.0, np.nan, 0.4, 1.0, np.nan], equal_nan=True)  # 1 is beaten by 2, 4 by dense


@pytest.mark.parametrize(("ratio", "option"), [(0.0, 0), (0.19, 0), (0.21, 2), (0.69, 2), (0.71, 3), (1.0, 3)])
def test_the_nearest_option_of_the_front(ratio: float, option: int) -> None:
    fronts = Fronts(one_site([1.0, 0.9, 0.8, 0.5, 1.2], [0.0, 0.1, 0.05, 0.4, 0.0]))
    assert fronts.nearest(0, ratio, np.ones(5, dtype=bool)) == option
    assert fronts.nearest(0, ratio, np.array([True, True, False, False, False])) == 0


def test_where_the_wall_leaves_none_of_the_front_the_cheapest_legal_one_is_taken() -> None:
    fronts = Fronts(one_site([1.0, 0.9, 0.8, 0.5, 0.85], [0.0, 0.1, 0.05, 0.4, 0.3]))
    assert fronts.nearest(0, 0.0, np.array([False, True, False, False, True])) == 4
    assert fronts.executed((4,))[0] == pytest.approx(0.3)


def test_plans_keep_to_the_wall_and_their_ratios_come_back() -> None:
    made = problem(sizes=(3, 4, 1, 2), limit=0.6)
    fronts, rng = Fronts(made), np.random.default_rng(0)
    for _ in range(50):
        choices = fronts.plan(rng.random(4).tolist())
        assert made.allows(choices)
        assert fronts.plan(fronts.executed(choices).tolist()) == choices


def test_a_site_that_saves_nothing_stays_dense() -> None:
    made = one_site([1.0, 1.0, 1.1], [0.0, 0.1, 0.2])
    assert Fronts(made).plan([1.0]) == (0,)
