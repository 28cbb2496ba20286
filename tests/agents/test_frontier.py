"""The least error within a budget, against enumeration, and orders that keep frontiers narrow."""

from math import prod

import numpy as np
import pytest

from graphprune.agents import frontier
from graphprune.agents.frontier import Programme, Step, steps, weighted
from graphprune.searching.problem import Factor, Sum

SLACK = 0.01


def tables(rng: np.random.Generator, sizes: tuple[int, ...], scopes: list[tuple[int, ...]], low: float = 0.0) -> Sum:
    """Random factors over some sites each."""
    shapes = ((scope, tuple(sizes[site] for site in scope)) for scope in scopes)
    return Sum(0.1, tuple(Factor(scope, rng.uniform(low, 1, shape)) for scope, shape in shapes))


def chain(length: int) -> list[tuple[int, ...]]:
    """Tables over neighbours."""
    return [(site, site + 1) for site in range(length - 1)]


def star(length: int) -> list[tuple[int, ...]]:
    """Tables that all depend on the first site, and on two neighbours."""
    return [(site + 1, 0, site) for site in range(1, length - 1)]


SHAPES = {"chain": chain, "star": star, "apart": lambda length: [(site,) for site in range(length)]}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_it_finds_what_enumeration_finds(shape: str, seed: int) -> None:
    rng, sizes = np.random.default_rng(seed), (3, 2, 4, 3, 2, 3)
    error = tables(rng, sizes, [*SHAPES[shape](6), (0,), (3,)], low=-1)
    cost = tables(rng, sizes, SHAPES[shape](6))
    every = np.array(list(np.ndindex(sizes)))
    costs, errors = cost.batch(every), error.batch(every)
    for limit in np.quantile(costs, [0.01, 0.2, 0.6]):
        found = Programme(error, cost, sizes).least(error, limit)
        assert found is not None
        assert cost(found.tolist()) <= limit
        assert error(found.tolist()) <= errors[costs <= limit * (1 - SLACK)].min(initial=np.inf) + 1e-9
    assert Programme(error, cost, sizes).least(error, costs.min() - 1e-6) is None
    most = Programme(error, cost, sizes).least(error, costs.max() + 1)
    assert most is not None
    assert error(most.tolist()) == pytest.approx(errors.min())


def test_a_limit_that_only_the_cheapest_meets_is_met() -> None:
    for seed in range(20):
        rng, sizes = np.random.default_rng(seed), (4,) * 6
        error, cost = (
            tables(rng, sizes, [(site,) for site in range(6)]),
            tables(rng, sizes, [(0, 1), (2,), (3,), (4, 5)]),
        )
        every = np.array(list(np.ndindex(sizes)))
        found = Programme(error, cost, sizes).least(error, cost.batch(every).min() + 1e-9)
        assert found is not None
        assert cost(found.tolist()) <= cost.batch(every).min() + 1e-9


@pytest.mark.parametrize(("shape", "widest"), [("apart", 25), ("chain", 25 * 5), ("star", 2 * 25 * 5)])
def test_frontiers_are_narrow_and_each_table_counts_once(shape: str, widest: int) -> None:
    rng, sizes, scopes = np.random.default_rng(0), tuple([2, 25, 5] * 20), SHAPES[shape](60)
    made = steps(60, tables(rng, sizes, scopes).factors, tables(rng, sizes, scopes).factors)
    assert [step.sites[-1] for step in made] == list(range(60))
    assert sorted(site for step in made for site in step.done) == list(range(60))
    for numbers in ([step.errors for step in made], [step.costs for step in made]):
        assert sorted(number for own in numbers for number in own) == list(range(len(scopes)))
    for step in made:
        assert all(set(scopes[number]) <= set(step.sites) for number in (*step.errors, *step.costs))
    assert max(prod(sizes[site] for site in step.sites) for step in made) == widest


@pytest.mark.parametrize("refused", [False, True])
def test_sites_are_held_where_the_frontier_would_be_too_wide(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, sizes = np.random.default_rng(0), (5,) * 7
    alone = [(site,) for site in range(7)]
    error, cost = tables(rng, sizes, alone), tables(rng, sizes, [*alone, tuple(range(7))])
    if refused:  # an option that the engine cannot run
        cost.factors[2].table[3] = np.inf
    assert not Programme(error, cost, (5,) * 5 + (1, 1)).held
    monkeypatch.setattr(frontier, "WIDEST", 200)
    made = Programme(error, cost, sizes)
    assert 0 < len(made.held) < 7
    every = np.array(list(np.ndindex(sizes)))
    costs, errors = cost.batch(every), error.batch(every)
    for limit in np.quantile(costs[np.isfinite(costs)], [0.05, 0.3, 0.7]):
        found = made.least(error, limit)
        assert found is not None
        assert cost(found.tolist()) <= limit
        assert (errors[costs <= limit] < error(found.tolist())).mean() < 0.01
    assert made.least(error, costs.min() - 1e-6) is None


def test_errors_are_raised_and_weighted_with_their_sign() -> None:
    error = Sum(0.5, (Factor((0,), np.array([-4.0, 0.0, 9.0])), Factor((1,), np.array([1.0, 16.0]))))
    found = weighted(error, 0.5, [2.0, 10.0])
    assert [factor.table.tolist() for factor in found.factors] == [[-4.0, 0.0, 6.0], [10.0, 40.0]]
    assert [factor.sites for factor in found.factors] == [(0,), (1,)]


def test_without_tables_every_site_is_decided_all_the_same() -> None:
    assert steps(2, (), ()) == [Step((0,), (), (), (0,)), Step((1,), (), (), (1,))]
