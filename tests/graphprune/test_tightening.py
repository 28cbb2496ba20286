"""A plan is made cheaper: as much as was asked for, as cheap in error as the best of all such plans or nearly so."""

from itertools import product

import numpy as np
import pytest

from graphprune.problem import ROUNDING
from graphprune.tightening import tightened
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
