"""What the comparisons of agents publish of their searches, on curves that can be worked out by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
from convergence import curve, plot, reached, sooner, table
from tradeoff import BUDGETS, MARGIN, areas


def search(agent: str, accuracy: list[float | None], trials: int = 6) -> dict[str, Any]:
    return {"model": "some", "agent": agent, "seed": 0, "trials": trials, "accuracy": accuracy}


def test_a_curve_rises_with_plans_that_meet_the_target_and_stays_after_an_early_end():
    first, *rest = curve(search("dp", [None, 0.5, None, 0.4, 0.7]))
    assert math.isnan(first)
    assert rest == [0.5, 0.5, 0.5, 0.7, 0.7]


@pytest.mark.parametrize(("goal", "trial"), [(0.0, 1), (0.3, 1), (0.31, 2), (0.5, 2), (0.6, None)])
def test_a_goal_is_reached_at_the_first_trial_that_is_no_lower(goal: float, trial: int | None):
    assert reached([0.3, 0.5, 0.5], goal) == trial


def test_history_is_judged_by_the_mean_curve_against_what_scratch_ends_with():
    lines = [
        search("amc", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]),
        search("amc", [0.1, 0.2, 0.3, 0.4, 0.8, 0.8]),  # together they end with 0.7, which they reach at the last trial
        search("amc:transfer", [0.1, 0.6, 0.6]),
        search("amc:transfer", [0.1, 0.8, 0.8]),
        search("amc:boosted", [0.6]),
    ]
    rows = {row.split()[1]: row for row in sooner(lines).splitlines()}
    assert list(rows) == ["amc", "amc:transfer", "amc:boosted"]
    assert rows["amc"].endswith("70.0% after   6 trials, 1.00 times as fast")
    assert rows["amc:transfer"].endswith("70.0% after   2 trials, 3.00 times as fast")
    assert rows["amc:boosted"].endswith("never")


def test_the_area_is_the_mean_over_budgets_of_the_best_plan_within_each():
    least, most = BUDGETS[-1] * MARGIN, BUDGETS[0] * MARGIN
    row = {"tried": [(most, 0.9), (least, 0.5), (least, None), (most, 0.8), (1.0, 1.0)]}
    one_budget = 0.9 / len(BUDGETS)
    all_budgets = (0.9 + 0.5 * (len(BUDGETS) - 1)) / len(BUDGETS)
    assert areas(row) == pytest.approx([one_budget, *[all_budgets] * 4])


def test_only_searches_on_the_same_tables_are_put_together():
    figures = {"earlier": [0.5], "3f": [0.7, 0.9]}
    lines = [
        search("dp", [accuracy] * 10, 10) | {"tables": shared, "latency": [0.5, 0.5, 0.5]}
        for shared, own in figures.items()
        for accuracy in own
    ]
    first, second = table(lines).splitlines()[1:]
    assert first.split()[:4] == ["some", "earlier", "dp", "50.0%"]
    assert second.split()[:4] == ["some", "3f", "dp", "80.0%"]


@pytest.mark.parametrize("agents", [["dp"], ["amc:transfer"], ["dp", "amc", "amc:transfer"]])
def test_one_agent_alone_is_drawn_too(agents: list[str], tmp_path: Path):
    plot([search(agent, [None, 0.5, 0.6]) for agent in agents], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
