"""What is measured before a search resembles what it finds, and corrects what it predicts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphprune.searching.past import read_past
from graphprune.searching.probing import PROBES, corrected, likely_plans, saving_factor
from graphprune.searching.problem import Factor, Sum
from tests.agents.toys import feasible_plans
from tests.agents.toys import problem as toy
from tests.graphprune.small_search import run, shared_cache  # noqa: F401 - fixture


@pytest.mark.parametrize("seed", range(5))
def test_likely_plans_use_up_the_target_with_little_error_and_differ(seed: int) -> None:
    made = toy(seed=seed, sizes=(4,) * 6, limit=0.6)
    plans, all_plans = np.array(likely_plans(made, np.random.default_rng(0))), np.array(feasible_plans(made))
    assert len(np.unique(plans, axis=0)) == PROBES
    assert (made.overruns(plans) <= 1).all()
    assert made.overruns(plans).mean() > 0.9 > made.overruns(all_plans).mean()
    assert np.median(made.error.batch(plans)) <= np.quantile(made.error.batch(all_plans), 0.05)


def test_likely_plans_are_as_many_as_there_are() -> None:
    made = toy(seed=3, sizes=(2, 2), limit=0.7)
    plans = likely_plans(made, np.random.default_rng(0))
    assert set(plans) <= set(feasible_plans(made))
    assert 1 <= len(plans) < PROBES


def test_where_nothing_meets_the_target_the_likely_plan_is_the_cheapest() -> None:
    made = toy(seed=0, sizes=(3, 4), limit=0.9)
    beyond = replace(made, limits={"latency": 0.9 * made.costs["latency"](made.cheapest)})
    assert likely_plans(beyond, np.random.default_rng(0)) == [beyond.cheapest]


def test_a_search_measures_likely_plans_first(tmp_path: Path) -> None:
    run(study=tmp_path / "study.db")
    (past,) = read_past(tmp_path / "study.db")
    shares = [record.predicted["latency"] for _, record in past.judged if record.agent == "probe"]
    assert 2 <= len(shares) <= PROBES
    assert np.mean(shares) > 0.9 * past.problem.limits["latency"]
    assert max(shares) <= past.problem.limits["latency"] * (1 + 1e-9)


def test_the_factor_is_the_median_of_what_was_saved_by_what_should_have_been() -> None:
    assert saving_factor([(0.5, 0.55), (0.5, 0.6), (0.5, 0.4)]) == pytest.approx(0.9)
    assert saving_factor([(0.99, 0.2)]) == 1, "who saves nothing tells nothing"
    assert saving_factor([]) == 1


def test_the_correction_scales_savings_and_leaves_the_dense_model_at_one() -> None:
    cost = Sum(0.25, (Factor((0,), np.array([0.5, 0.2])), Factor((1,), np.array([0.25, 0.05]))))
    for factor in (0.5, 1.3):
        scaled = corrected(cost, factor)
        for choices in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert 1 - scaled(choices) == pytest.approx(factor * (1 - cost(choices)))
    for nonsense in (float("nan"), float("inf"), 0.0, -2.0):
        assert corrected(cost, nonsense)((1, 1)) == pytest.approx(cost((1, 1)))
