"""What every agent must do. A new agent joins with its line in `graphprune.agents.AGENTS`."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from graphprune.agents import AGENTS, create
from graphprune.record import Record
from graphprune.searching.problem import BudgetSpent, Choices, Problem, Sum
from tests.agents.toys import problem, watched, with_branch

EVERY = sorted(AGENTS)


def search(agent: str, made: Problem, seed: int = 0) -> list[Choices]:
    """Run an agent; returns the choice vectors that reached the evaluator."""
    asked = watched(made)
    try:
        create(agent).run(made, np.random.default_rng(seed))
    except BudgetSpent:
        assert made.remaining == 0
    return asked


def small(trials: int = 12, limit: float = 0.45) -> Problem:
    """Sites of different widths, one of them with nothing to choose."""
    return problem(seed=3, sizes=(3, 4, 1, 2), limit=limit, trials=trials)


@pytest.mark.parametrize("agent", EVERY)
def test_name_is_the_key(agent: str) -> None:
    assert create(agent).name == agent


@pytest.mark.parametrize("agent", EVERY)
def test_only_legal_and_feasible_plans_within_the_trials(agent: str) -> None:
    made = small()
    asked = search(agent, made)
    assert 1 <= len(made.records) <= 12
    for choices in asked:
        assert len(choices) == 4
        assert all(made.mask(choices[:site])[option] for site, option in enumerate(choices))
        assert made.costs["latency"](choices) <= 0.45 + 1e-9


@pytest.mark.parametrize("agent", EVERY)
def test_every_cost_counts(agent: str) -> None:
    made = small(limit=0.6)
    tables = tuple(replace(factor, table=factor.table**2) for factor in made.costs["latency"].factors)
    made.costs = {**made.costs, "flops": Sum(0.1, tables)}
    made.limits = {**made.limits, "flops": 0.35}
    for choices in search(agent, made):
        assert made.costs["latency"](choices) <= 0.6 + 1e-9
        assert made.costs["flops"](choices) <= 0.35 + 1e-9


@pytest.mark.parametrize("agent", EVERY)
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_decided_inside_a_branch_that_is_gone(agent: str, seed: int) -> None:
    made, given = with_branch(seed), []
    evaluate = made.evaluate
    made.evaluate = lambda choices: (given.append(tuple(choices)), evaluate(choices))[1]  # type: ignore[method-assign, func-returns-value]
    search(agent, made)
    assert given
    assert all(made.allows(choices) for choices in given)
    if agent != "random":  # which draws with repetition
        assert len(set(given)) == len(given)


@pytest.mark.parametrize("agent", EVERY)
def test_same_seed_same_plans_whatever_the_global_generators_hold(agent: str) -> None:
    first = search(agent, small(), seed=5)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 (the point of the test)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert search(agent, small(), seed=5) == first
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # noqa: NPY002


@pytest.mark.parametrize("agent", EVERY)
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_failed_records_do_not_stop_it(agent: str, share: float) -> None:
    made = small()
    good = made.evaluator

    def sometimes(choices: Choices) -> Record:
        if sum(choices) % 4 < 4 * share:
            return Record(made.plan(choices), error="did not build")
        return good(choices)

    made.evaluator = sometimes
    alone = search(agent, small())
    asked = search(agent, made)
    assert len(asked) >= min(len(alone), 2)
    if share == 1.0:
        assert all(record.error == "did not build" for record in made.records)


@pytest.mark.parametrize("agent", EVERY)
def test_one_plan_only(agent: str) -> None:
    made = problem(sizes=(1, 1, 1), limit=1.0, trials=3)
    assert search(agent, made) == [(0, 0, 0)]


@pytest.mark.parametrize("agent", EVERY)
def test_nothing_feasible_gives_the_cheapest(agent: str) -> None:
    made = small(trials=2, limit=0.01)
    assert search(agent, made) == [made.cheapest]
    assert made.cheapest == (2, 3, 0, 1)


@pytest.mark.parametrize("agent", EVERY)
def test_no_site_at_all(agent: str) -> None:
    made = Problem((), problem().graph, {"latency": Sum(1.0, ())}, {"latency": 0.5}, Sum(0.0, ()), None, 1)  # type: ignore[arg-type]
    made.evaluator = lambda choices: Record(made.plan(choices), accuracy=0.5)
    assert search(agent, made) == [()]
