"""The Gaussian process against its textbook formula."""

import numpy as np
import pytest

from graphprune.agents.belief import LENGTHS, NOISES, Belief
from tests.agents.toys import accuracy_of, feasible_plans, problem

MADE = problem(4)
PLANS = np.array(feasible_plans(MADE))
ACCURACY = np.array([accuracy_of(MADE, tuple(plan)) for plan in PLANS.tolist()])
SEEN = np.random.default_rng(0).permutation(len(PLANS))[:60]


def test_without_records_it_ranks_by_the_error_table() -> None:
    mean, deviation = Belief(MADE).predict(PLANS)
    assert (np.argsort(-mean) == np.argsort(MADE.error.batch(PLANS))).all()
    assert (deviation == 0).all()


def test_posterior_is_the_textbook_formula() -> None:
    belief = Belief(MADE)
    belief.learn(PLANS[SEEN[:30]], ACCURACY[SEEN[:30]])
    belief.learn(PLANS[SEEN[30:]], ACCURACY[SEEN[30:]])
    mean, deviation = belief.predict(PLANS[:50])

    seen, rewards = PLANS[SEEN], ACCURACY[SEEN]
    floor = 1e-3 * MADE.error(MADE.cheapest)

    def unit(plans: np.ndarray) -> np.ndarray:
        tables = [[factor(plan) for factor in MADE.error.factors] for plan in plans.tolist()]
        return np.array(tables) / np.median([MADE.error(plan) for plan in seen.tolist()])

    def line(plans: np.ndarray) -> np.ndarray:
        return -np.log(np.array([MADE.error(plan) for plan in plans.tolist()]) + floor)

    slope, offset = np.polyfit(line(seen), rewards, 1)
    assert slope > 0
    rest = rewards - offset - slope * line(seen)
    answers = []
    for length in LENGTHS:
        for noise in NOISES:

            def kernel(a: np.ndarray, b: np.ndarray, length: float = length) -> np.ndarray:
                return np.exp(-(a[:, None] != b[None]).mean(axis=2) / length) + unit(a) @ unit(b).T

            matrix = kernel(seen, seen) + noise * np.eye(60)
            scaled = rest / rest.std()
            evidence = -0.5 * scaled @ np.linalg.solve(matrix, scaled) - 0.5 * np.linalg.slogdet(matrix)[1]
            cross = kernel(PLANS[:50], seen) @ np.linalg.inv(matrix)
            variance = np.diag(kernel(PLANS[:50], PLANS[:50]) - cross @ kernel(seen, PLANS[:50]))
            answers.append((evidence, offset + slope * line(PLANS[:50]) + cross @ rest, rest.std() * np.sqrt(variance)))
    _, expected, spread = max(answers, key=lambda answer: answer[0])
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
