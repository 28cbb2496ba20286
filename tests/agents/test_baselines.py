"""Uniform, random and magnitude on problems small enough to work out."""

from dataclasses import replace

import numpy as np
import pytest

from graphprune.agents import create
from graphprune.agents.random_search import random_walk
from graphprune.agents.uniform import nearest, setting, uniform_plans
from graphprune.searching.problem import BudgetSpent, Problem
from tests.agents.toys import feasible_plans, problem


def with_kernels(limit: float) -> Problem:
    """Two kernel sites with rows and columns, two channel sites with the shares 1, 0.6 and 0.2."""
    made = problem(0, sizes=(3, 3, 3, 3), limit=limit, trials=50)
    bits = {1: (1, 1, 0) * 3, 2: (0, 1, 0) * 3}

    def shaped(site: int) -> tuple:
        options = made.decisions[site].options
        if made.decisions[site].kind != "kernel":
            return options
        return (options[0], *(replace(options[k], geometry=bits[k], kept_share=sum(bits[k]) / 9) for k in (1, 2)))

    made.decisions = tuple(replace(decision, options=shaped(i)) for i, decision in enumerate(made.decisions))
    return made


def test_uniform_takes_every_pair_of_geometry_and_share_that_meets_the_target() -> None:
    made = with_kernels(limit=0.5)
    same_everywhere = {plan for plan in feasible_plans(made) if plan[0] == plan[2] and plan[1] == plan[3]}
    plans = uniform_plans(made)
    assert set(plans) == same_everywhere
    assert 1 < len(plans) < 9
    assert [made.overrun(plan) for plan in plans] == sorted(map(made.overrun, plans), reverse=True)
    create("uniform").run(made, np.random.default_rng(0))
    assert [record.plan for record in made.records] == [made.plan(plan) for plan in plans]


def test_uniform_takes_the_nearest_share_where_a_setting_is_missing() -> None:
    made = with_kernels(limit=0.5)
    kernel, channels = made.decisions[:2]
    assert setting(kernel.options[2]) == (0, 1, 0) * 3
    assert [nearest(kernel, wanted) for wanted in ((1,) * 9, (1, 1, 0) * 3, (0, 1, 1) * 3, (1, *[0] * 8))] == [
        0,
        1,
        1,
        2,
    ]
    assert [nearest(channels, wanted) for wanted in (1.0, 0.6, 0.45, 0.1)] == [0, 1, 1, 2]


def test_random_draws_each_legal_option_equally_often() -> None:
    made = problem(0, sizes=(3, 3), limit=0.75, trials=3000)
    create("random").run(made, np.random.default_rng(0))
    firsts = np.flatnonzero(made.mask(()))
    plans = [made.plan((first, second)) for first in range(3) for second in range(3)]
    share = {plan: sum(record.plan == plan for record in made.records) / 3000 for plan in plans}
    for first in range(3):
        seconds = np.flatnonzero(made.mask((first,))) if first in firsts else []
        for second in range(3):
            expected = 1 / len(firsts) / len(seconds) if first in firsts and second in seconds else 0
            assert share[plans[3 * first + second]] == pytest.approx(expected, abs=0.04)


def test_random_spends_every_trial() -> None:
    made = problem(0, sizes=(2,), limit=1.0, trials=7)
    create("random").run(made, np.random.default_rng(0))
    assert made.remaining == 0
    with pytest.raises(BudgetSpent):
        made.evaluate((0,))


def test_magnitude_takes_the_cheapest_error_per_saving_first() -> None:
    """Worked out with additive costs: the ratio of a step does not depend on the other sites."""
    made = problem(6, sizes=(4, 4, 4), limit=0.6, pairs=False, trials=1)
    choices = [0, 0, 0]
    while made.costs["latency"](choices) > 0.6:
        ratios = {}
        for site in range(3):
            errors, costs = made.error.factors[site].table, made.costs["latency"].factors[site].table
            for option in range(choices[site] + 1, 4):
                saved = costs[choices[site]] - costs[option]
                ratios[(errors[option] - errors[choices[site]]) / saved] = (site, option)
        site, option = ratios[min(ratios)]
        choices[site] = option
    create("magnitude").run(made, np.random.default_rng(0))
    assert [record.plan for record in made.records] == [made.plan(choices)]


def test_random_walks_stay_within_the_mask_and_reach_every_plan() -> None:
    made = problem(seed=3, sizes=(2, 3, 2), limit=0.7)
    walks = [random_walk(made, np.random.default_rng(seed)) for seed in range(300)]
    assert set(walks) == set(feasible_plans(made))
