"""The dynamic programme against enumeration."""

import numpy as np
import pytest

from graphprune.agents.dp import DynamicProgramming, Solver
from graphprune.searching.problem import BudgetSpent
from tests.agents.toys import feasible_plans, problem

SLACK = 0.01
"""Share of the budget that the dynamic programme may leave, since it counts in steps."""


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("limit", [0.2, 0.4, 0.8])
def test_solves_the_tables_like_enumeration(seed: int, limit: float) -> None:
    made = problem(seed, sizes=(4, 3, 5, 2, 4), limit=limit)
    plan = Solver(made).solve()
    assert plan is not None
    assert made.feasible(plan)
    made.limits = {"latency": limit * (1 - SLACK)}
    assert made.error(plan) <= min(made.error(best) for best in feasible_plans(made)) + 1e-12


def test_exponents_and_weights_change_the_sum_that_is_minimised() -> None:
    made = problem(1, sizes=(4, 3, 5), limit=0.5, pairs=False)
    weights = np.array([3.0, 0.2, 1.0])
    plan = Solver(made).solve(1.0, 2.0, weights)

    def weighted(choices: tuple[int, ...]) -> float:
        return float(sum(w * factor(choices) ** 2 for w, factor in zip(weights, made.error.factors, strict=True)))

    assert plan is not None
    made.limits = {"latency": 0.5 * (1 - SLACK)}
    assert weighted(plan) <= min(map(weighted, feasible_plans(made))) + 1e-12


def test_trials_go_to_new_plans_only() -> None:
    made = problem(4, sizes=(4,) * 6, trials=10)
    with pytest.raises(BudgetSpent):
        DynamicProgramming().run(made, np.random.default_rng(0))
    plans = [record.plan for record in made.records]
    assert len(set(plans)) == len(plans) == 10
