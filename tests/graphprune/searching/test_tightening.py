"""A plan is cut more or less: as much as was asked for, as cheap in error as the best such plans or nearly so."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from graphprune.searching.problem import ROUNDING, Sum
from graphprune.searching.tightening import loosened, tightened
from tests.agents.toys import problem as toy


@pytest.mark.parametrize("seed", range(20))
def test_it_saves_what_was_asked_for_at_nearly_the_least_error(seed: int) -> None:
    made = toy(seed=seed, sizes=(3, 4, 3, 4), limit=0.9)
    start = made.dense
    plans = np.array(list(product(range(3), range(4), range(3), range(4))))
    errors, overruns = made.error.batch(plans), made.overruns(plans)
    for overrun in np.linspace(overruns.min(), made.overrun(start), 7):
        found = tightened(made, start, overrun)
        assert found is not None
        assert made.overrun(found) <= overrun + ROUNDING
        assert made.error(found) <= 3 * errors[overruns <= overrun + ROUNDING].min() + 1e-12


def test_what_cannot_be_saved_is_none() -> None:
    made = toy(seed=0, sizes=(3, 4), limit=0.9)
    assert tightened(made, made.dense, made.overrun(made.cheapest) - 0.01) is None
    assert tightened(made, made.cheapest, made.overrun(made.cheapest)) == made.cheapest


@pytest.mark.parametrize("seed", range(20))
def test_room_is_used_until_no_change_fits(seed: int) -> None:
    made = toy(seed=seed, sizes=(3, 4, 3, 4), limit=0.9)
    start = made.cheapest
    errors = made.error.batch(np.array(list(product(range(3), range(4), range(3), range(4)))))
    assert loosened(made, start, made.overrun(made.dense)) in (None, made.dense)
    for overrun in np.linspace(made.overrun(start), made.overrun(made.dense), 7):
        found = loosened(made, start, overrun) or start
        assert made.overrun(found) <= overrun + ROUNDING
        assert errors.min() <= made.error(found) <= made.error(start)
        others = made.singles(found)
        better = made.error.batch(others) < made.error(found)
        assert not (better & (made.overruns(others) <= overrun)).any()


class Above(Sum):
    """A sum that is a little larger for one choice vector than for the same one among others."""

    def __call__(self, choices: Sequence[int]) -> float:
        return super().__call__(choices) * (1 + 1e-15)


def test_plans_that_only_rounding_tells_apart_are_alike() -> None:
    made = toy(seed=0, sizes=(3, 4), limit=0.9)
    level = made.error.weighted([0.0] * len(made.error.factors))
    assert loosened(replace(made, error=Above(1.0, level.factors)), made.cheapest, 10.0) is None


def test_where_there_is_no_room_nothing_is_loosened() -> None:
    made = toy(seed=0, sizes=(3, 4), limit=0.9)
    assert loosened(made, made.cheapest, made.overrun(made.cheapest) - 0.01) is None
    assert loosened(made, made.dense, 10.0) is None
