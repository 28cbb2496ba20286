"""The vectorised tables against one choice vector at a time, and the counting of trials."""

from itertools import product

import numpy as np
import pytest

from graphprune.searching.problem import BudgetSpent, Factor, Sum
from tests.agents.toys import feasible_plans, problem, with_branch

MADE = problem(5, sizes=(3, 4, 2, 5), limit=0.5, trials=2)
SOME = np.stack([np.random.default_rng(0).integers(0, size, 20) for size in (3, 4, 2, 5)], axis=1)


def test_batches_are_many_single_values() -> None:
    assert MADE.error.batch(SOME) == pytest.approx([MADE.error(row) for row in SOME.tolist()])
    assert MADE.overruns(SOME) == pytest.approx([MADE.overrun(row) for row in SOME.tolist()])


@pytest.mark.parametrize("site", range(4))
def test_sweeps_replace_one_site(site: int) -> None:
    rows = [
        [*row[:site], option, *row[site + 1 :]] for row in SOME.tolist() for option in range(SOME[:, site].max() + 1)
    ]
    options = len(rows) // len(SOME)
    assert options == len(MADE.decisions[site].options)
    assert MADE.error.sweep(SOME, site, options).ravel() == pytest.approx([MADE.error(row) for row in rows])
    assert MADE.sweep_overruns(SOME, site).ravel() == pytest.approx([MADE.overrun(row) for row in rows])


def test_masks_are_many_single_masks() -> None:
    for decided in range(4):
        prefixes = SOME[:, :decided]
        assert MADE.masks(prefixes).tolist() == [MADE.mask(prefix).tolist() for prefix in prefixes.tolist()]


def test_the_wall_allows_the_feasible_plans_and_no_others() -> None:
    every = list(np.ndindex(3, 4, 2, 5))
    allowed = [p for p in every if all(MADE.mask(p[:site])[option] for site, option in enumerate(p))]
    assert allowed == feasible_plans(MADE) == [plan for plan in every if MADE.allows(plan)]
    assert 10 < len(allowed) < 100


def test_where_options_exclude_each_other_feasible_plans_stay_reachable() -> None:
    """A chain in which no two neighbours may both be cut: what is cheapest depends on what was decided before."""
    made = problem(2, sizes=(3,) * 5, limit=0.75, pairs=False)
    excluded = np.where(np.outer([0, 1, 1], [0, 1, 1]), np.inf, 0.0)
    pairs = tuple(Factor((site, site + 1), excluded) for site in range(4))
    made.costs = {"latency": Sum(0.0, made.costs["latency"].factors + pairs)}
    plans = feasible_plans(made)
    least = min(map(made.overrun, np.ndindex(*[3] * 5)))
    assert made.overrun(made.cheapest) == pytest.approx(least)
    assert len(made.completions) > 1
    walked = [p for p in plans if all(made.mask(p[:site])[option] for site, option in enumerate(p))]
    assert len(walked) == len(plans) > 5
    assert all(made.allows(plan) for plan in plans)
    for prefix in np.ndindex(3, 3):
        assert made.mask(prefix).any()


def test_the_order_of_a_sum_does_not_decide_a_target() -> None:
    made = problem(5, sizes=(3, 4, 2, 5), trials=1)
    for row in SOME.tolist():
        made.limits = {"latency": made.costs["latency"](row)}
        made.__dict__.pop("completions", None)
        assert made.allows(row)


def test_every_evaluation_counts_but_the_evaluator_is_asked_once() -> None:
    made = problem(5, sizes=(3, 4, 2, 5), trials=3)
    asked, inner = [], made.evaluator
    made.evaluator = lambda choices: (asked.append(choices), inner(choices))[1]
    first, again = made.evaluate((1, 1, 1, 1)), made.evaluate([1, 1, 1, 1])
    made.evaluate((2, 3, 1, 4))
    assert first is again
    assert asked == [(1, 1, 1, 1), (2, 3, 1, 4)]
    assert (len(made.records), made.remaining) == (3, 0)
    with pytest.raises(BudgetSpent):
        made.evaluate((0, 0, 0, 0))


def test_plans_that_differ_inside_a_branch_that_is_gone_are_one() -> None:
    made = with_branch(trials=9)
    assert made.canonical((1, 3, 2)) == (1, 0, 2)
    assert made.canonical((0, 3, 2)) == (0, 3, 2)
    assert made.plan((1, 3, 2)) == made.plan((1, 0, 2)) != made.plan((0, 3, 2))
    assert made.mask((1,)).tolist() == [True, False, False, False]
    assert made.mask((0,)).sum() > 1
    assert made.masks(np.array([[0], [1]]))[1].tolist() == made.mask((1,)).tolist()
    first = made.evaluate((1, 3, 2))
    assert made.evaluate((1, 1, 2)) is first
    assert [choices for choices in np.ndindex(2, 4, 3) if made.allows(choices)] == [
        choices for choices in feasible_plans(made) if made.canonical(choices) == choices
    ]


def test_sums_of_many_plans_are_those_of_their_tables() -> None:
    random = np.random.default_rng(0)
    sizes = (2, 3, 4, 3)
    chosen = ((0,), (2, 0), (3, 1, 2), (), (1, 3))
    factors = tuple(Factor(sites, random.random([sizes[site] for site in sites])) for sites in chosen)
    factors[1].table[3, 1] = np.inf
    total = Sum(0.5, factors)
    plans = np.array(list(product(*map(range, sizes))))
    expected = np.array([[factor(plan) for factor in factors] for plan in plans.tolist()])
    assert np.array_equal(total.parts(plans), expected)
    assert total.batch(plans) == pytest.approx(0.5 + expected.sum(axis=1), rel=1e-12)
    assert [total(plan) for plan in plans.tolist()] == total.batch(plans).tolist()
    for site, size in enumerate(sizes):
        swept = total.sweep(plans, site, size)
        for option in range(size):
            changed = plans.copy()
            changed[:, site] = option
            assert swept[:, option] == pytest.approx(total.batch(changed), rel=1e-12)


def test_a_sum_without_sites() -> None:
    nothing = np.zeros((3, 0), dtype=np.int64)
    assert Sum(0.25, ()).batch(nothing).tolist() == [0.25] * 3
    assert Sum(0.25, ())(()) == 0.25
