"""Whole vectors under the action wall, against a walk through every prefix."""

from itertools import product

import numpy as np
import pytest

from graphprune.agents.wall import OPEN, passes, repaired
from graphprune.searching.problem import Choices, Factor, Problem, Sum
from tests.agents.toys import problem, with_branch


def short_sighted() -> Problem:
    """A problem whose greedy completions miss what is cheapest, so that the wall forbids plans that meet the target."""
    made = problem(sizes=(2, 3, 2), limit=0.66, pairs=False)
    ties = np.array([[0.5, 0.45], [0.4, 0.4], [0.45, 0.15]])
    made.costs = {"latency": Sum(0.0, (Factor((0,), np.array([0.5, 0.1])), Factor((1, 2), ties)))}
    made.error = Sum(0.0, (Factor((0,), np.array([0.0, 9.0])), *made.error.factors[1:]))
    assert made.allows((0, 2, 1))
    return made


TOYS = [
    problem(1, sizes=(4, 3, 5, 2), limit=0.45),
    problem(2, sizes=(3, 3, 3), limit=0.3, pairs=False),
    with_branch(1),
    short_sighted(),
]


def every(made: Problem) -> list[Choices]:
    """All choice vectors, legal or not."""
    return list(product(*(range(len(decision.options)) for decision in made.decisions)))


def walked(made: Problem) -> set[Choices]:
    """What is found by following every option that a mask leaves open."""
    prefixes: set[Choices] = {()}
    for _ in made.decisions:
        prefixes = {(*prefix, int(option)) for prefix in prefixes for option in np.flatnonzero(made.mask(prefix))}
    return prefixes


@pytest.mark.parametrize("made", TOYS)
def test_what_passes_is_what_a_walk_along_the_masks_finds(made: Problem) -> None:
    legal = walked(made)
    assert 1 < len(legal) < len(every(made))
    assert {choices for choices in every(made) if passes(made, choices)} == legal


@pytest.mark.parametrize("made", TOYS)
def test_repair_keeps_what_is_legal_and_makes_the_rest_legal(made: Problem) -> None:
    legal, rng = walked(made), np.random.default_rng(0)
    for wanted in every(made):
        executed = repaired(made, wanted, rng)
        assert executed in legal
        assert executed == wanted or wanted not in legal


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.7])
def test_a_forbidden_option_gives_way_to_the_legal_one_of_the_nearest_cost(limit: float) -> None:
    made = problem(3, sizes=(5, 5, 5), limit=limit, pairs=False)
    shuffled = [np.random.default_rng(site).permutation(factor.table) for site, factor in enumerate(costs(made))]
    made.costs = {"latency": Sum(0.0, tuple(Factor((site,), table) for site, table in enumerate(shuffled)))}
    replaced = 0
    for wanted in every(made):
        executed = repaired(made, wanted, np.random.default_rng(0))
        for site, (table, option, taken) in enumerate(zip(shuffled, wanted, executed, strict=True)):
            legal = np.flatnonzero(made.mask(executed[:site]))
            replaced += option not in legal
            assert abs(table[taken] - table[option]) == min(abs(table[legal] - table[option]))
    assert replaced > 10


def costs(made: Problem) -> tuple[Factor, ...]:
    """The factors of the latency."""
    return made.costs["latency"].factors


def test_of_options_that_cost_the_same_the_one_with_the_least_error_is_taken() -> None:
    made = problem(sizes=(4,), limit=0.5, pairs=False)
    made.costs = {"latency": Sum(0.0, (Factor((0,), np.array([1.0, 0.4, 0.4, 0.4])),))}
    made.error = Sum(0.0, (Factor((0,), np.array([0.0, 0.3, 0.1, 0.2])),))
    assert repaired(made, (0,), np.random.default_rng(0)) == (2,)


def test_open_sites_are_drawn_uniformly_from_the_legal_options() -> None:
    made = problem(0, sizes=(3, 4), limit=0.75)
    rng = np.random.default_rng(0)
    drawn = [repaired(made, (OPEN, 3), rng) for _ in range(1000)]
    legal = np.flatnonzero(made.mask(()))
    assert len(legal) > 1
    assert {second for _, second in drawn} == {3}
    for option in range(3):
        share = np.mean([first == option for first, _ in drawn])
        assert share == pytest.approx(1 / len(legal) if option in legal else 0, abs=0.05)


def test_options_that_exclude_each_other() -> None:
    made = problem(0, sizes=(2, 3), limit=0.8, pairs=False)
    made.costs = {"latency": Sum(0.0, (Factor((0, 1), np.array([[1.0, 0.7, 0.6], [0.5, np.inf, np.inf]])),))}
    assert repaired(made, (1, 2), np.random.default_rng(0)) == (1, 0)
    assert repaired(made, (0, 0), np.random.default_rng(0)) == (0, 1)
