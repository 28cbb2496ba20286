"""The Gaussian process against its textbook formula."""

from itertools import product

import numpy as np
import pytest

from graphprune.agents.belief import FLOOR, LENGTHS, NOISES, POWERS, Belief
from tests.agents.toys import accuracy_of, feasible_plans, problem

MADE = problem(4)
PLANS = np.array(feasible_plans(MADE))
ACCURACY = np.array([accuracy_of(MADE, tuple(plan)) for plan in PLANS.tolist()])
SEEN = np.random.default_rng(0).permutation(len(PLANS))[:60]


def test_without_records_it_ranks_by_the_error_table() -> None:
    mean, deviation = Belief(MADE).predict(PLANS)
    assert (np.argsort(-mean) == np.argsort(MADE.error.batch(PLANS))).all()
    assert (deviation == 0).all()


def parts(plans: np.ndarray, unit: float) -> np.ndarray:
    return np.array([[factor(plan) for factor in MADE.error.factors] for plan in plans.tolist()]) / unit


@pytest.mark.parametrize("curved", [False, True])
def test_posterior_is_the_textbook_formula(curved: bool) -> None:
    belief, seen = Belief(MADE), PLANS[SEEN]
    unit = float(np.median([MADE.error(plan) for plan in seen.tolist()]))
    rewards = ACCURACY[SEEN]
    if curved:
        rewards = -np.log((parts(seen, unit) ** 0.5).sum(axis=1)) + 0.01 * rewards
    belief.learn(seen[:30], rewards[:30])
    belief.learn(seen[30:], rewards[30:])
    mean, deviation = belief.predict(PLANS[:50])

    def kernel(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
        return np.exp(-(a[:, None] != b[None]).mean(axis=2) / length) + parts(a, unit) @ parts(b, unit).T

    answers = []
    for power, length, noise in product(POWERS, LENGTHS, NOISES):
        sums = [-np.log((parts(plans, unit) ** power).sum(axis=1) + FLOOR) for plans in (seen, PLANS[:50])]
        slope, offset = np.polyfit(sums[0], rewards, 1)
        assert slope > 0
        rest = rewards - offset - slope * sums[0]
        matrix = rest.var() * (kernel(seen, seen, length) + noise * np.eye(60))
        evidence = -0.5 * rest @ np.linalg.solve(matrix, rest) - 0.5 * np.linalg.slogdet(matrix)[1]
        cross = rest.var() * kernel(PLANS[:50], seen, length) @ np.linalg.inv(matrix)
        variance = np.diag(
            rest.var() * kernel(PLANS[:50], PLANS[:50], length)
            - cross @ (rest.var() * kernel(seen, PLANS[:50], length))
        )
        answers.append((evidence, offset + slope * sums[1] + cross @ rest, np.sqrt(variance), power))
    _, expected, spread, power = max(answers, key=lambda answer: answer[0])
    assert belief.power == power
    assert not curved or power == 0.5
    assert mean == pytest.approx(expected, abs=1e-6)
    assert deviation == pytest.approx(spread, abs=1e-6)


def test_records_make_it_better_than_the_table() -> None:
    belief = Belief(MADE)
    unseen = np.setdiff1d(np.arange(len(PLANS)), SEEN)
    before = np.corrcoef(belief.predict(PLANS[unseen])[0], ACCURACY[unseen])[0, 1]
    belief.learn(PLANS[SEEN], ACCURACY[SEEN])
    after = np.corrcoef(belief.predict(PLANS[unseen])[0], ACCURACY[unseen])[0, 1]
    assert 1 - after < 0.5 * (1 - before)


def test_equal_rewards_teach_nothing() -> None:
    belief = Belief(MADE)
    before = belief.predict(PLANS[:5])[0]
    belief.learn(PLANS[:6], np.zeros(6))
    assert (belief.predict(PLANS[:5])[0] == before).all()


def test_supposing_what_is_believed_changes_no_mean_and_makes_neighbours_less_open() -> None:
    belief = Belief(MADE)
    belief.learn(PLANS[SEEN], ACCURACY[SEEN])
    unseen = np.setdiff1d(np.arange(len(PLANS)), SEEN)
    plan, others = PLANS[unseen[:1]], PLANS[unseen[1:]]
    supposed = belief.supposing(plan)
    assert supposed.predict(PLANS)[0] == pytest.approx(belief.predict(PLANS)[0], abs=1e-9)
    assert supposed.predict(plan)[1] < 0.5 * belief.predict(plan)[1]
    less = belief.predict(others)[1] - supposed.predict(others)[1]
    differing = (others != plan).sum(axis=1)
    assert (less > -1e-9).all()
    assert less[differing == 1].mean() > 3 * less[differing >= 4].mean() > 0
    belief.learn(plan, np.zeros(1))
    assert (supposed.predict(PLANS)[0] != belief.predict(PLANS)[0]).any()
