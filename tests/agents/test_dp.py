"""The dynamic programme against enumeration."""

from itertools import product

import numpy as np
import pytest

from graphprune.agents.dp import DynamicProgramming, Solver, components, knapsack, sweep_multipliers
from graphprune.problem import BudgetSpent, Factor, Sum
from tests.agents.toys import feasible_plans, problem


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [0.2, 0.4, 0.8])
def test_solves_the_tables_like_enumeration(seed: int, limit: float) -> None:
    made = problem(seed, sizes=(4, 3, 5, 2, 4), limit=limit)
    solver = Solver(made)
    plan = solver.solve(1.0, 1.0, np.ones(len(solver.components)))
    assert plan is not None
    assert made.feasible(plan)
    slack = 1 - len(solver.components) / 2000
    made.limits = {"latency": limit * slack}
    assert made.error(plan) <= min(made.error(best) for best in feasible_plans(made)) + 1e-12


def test_exponents_and_weights_change_the_sum_that_is_minimised() -> None:
    made = problem(1, sizes=(4, 3, 5), limit=0.5, pairs=False)
    weights = np.array([3.0, 0.2, 1.0])
    plan = Solver(made).solve(1.0, 2.0, weights)

    def weighted(choices: tuple[int, ...]) -> float:
        return float(sum(w * factor(choices) ** 2 for w, factor in zip(weights, made.error.factors, strict=True)))

    assert plan is not None
    made.limits = {"latency": 0.5 * (1 - 3 / 2000)}
    assert weighted(plan) <= min(map(weighted, feasible_plans(made))) + 1e-12


def test_components_are_what_factors_tie_together() -> None:
    made = problem(0, sizes=(2, 3, 2, 3, 2))
    found = components(made, "latency")
    assert [part.sites for part in found] == [(0, 1), (2, 3), (4,)]
    assert [len(part.settings) for part in found] == [6, 6, 2]
    dense = made.costs["latency"](made.dense)
    assert dense == pytest.approx(sum(part.costs[(part.settings == 0).all(axis=1)][0] for part in found))


@pytest.mark.parametrize("seed", range(5))
def test_knapsack_is_enumeration_when_costs_are_whole_bins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs = [np.r_[0.0, rng.integers(0, 900, 4)] for _ in range(4)]
    errors = [rng.uniform(-1, 1, 5) for _ in range(4)]
    picks = knapsack(costs, errors, 2000.0)
    assert picks is not None

    def total(tables: list[np.ndarray], chosen: tuple[int, ...]) -> float:
        return float(sum(table[index] for table, index in zip(tables, chosen, strict=True)))

    fitting = [chosen for chosen in product(range(5), repeat=4) if total(costs, chosen) <= 2000]
    assert total(costs, tuple(picks)) <= 2000
    assert total(errors, tuple(picks)) == pytest.approx(min(total(errors, chosen) for chosen in fitting))
    assert knapsack([cost + 501 for cost in costs], errors, 2000.0) is None


def test_multiplier_sweeps_find_the_hull_of_a_separable_front() -> None:
    """Without interactions, each multiplier's minimum is exact, so every vertex of the convex hull must turn up."""
    made = problem(3, sizes=(4, 4, 3), pairs=False)
    cost, error = made.costs["latency"], made.error
    found = sweep_multipliers(cost, error, (4, 4, 3))
    every = np.array(list(np.ndindex(4, 4, 3)))
    for multiplier in np.geomspace(0.1, 30, 40):
        least = (error.batch(every) + multiplier * cost.batch(every)).min()
        assert (error.batch(found) + multiplier * cost.batch(found)).min() <= least * 1.02 + 1e-9


def test_a_component_too_large_to_enumerate_is_still_solved_well() -> None:
    made = problem(0, sizes=(5,) * 7, limit=0.4, pairs=False)
    shared = Factor(tuple(range(7)), np.zeros((5,) * 7))
    made.error = Sum(0.0, (*made.error.factors, shared))
    solver = Solver(made)
    assert [part.sites for part in solver.components] == [tuple(range(7))]
    assert len(solver.components[0].settings) < 500
    plan = solver.solve(1.0, 1.0, np.ones(1))
    assert plan is not None
    assert made.error(plan) <= 1.15 * min(made.error(best) for best in feasible_plans(made))


def test_trials_go_to_new_plans_only() -> None:
    made = problem(4, sizes=(4,) * 6, trials=10)
    with pytest.raises(BudgetSpent):
        DynamicProgramming().run(made, np.random.default_rng(0))
    plans = [record.plan for record in made.records]
    assert len(set(plans)) == len(plans) == 10
