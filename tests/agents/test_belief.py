"""The Gaussian process against its textbook formula."""

from itertools import product

import numpy as np
import pytest

from graphprune.agents.belief import DOUBT, FLOOR, LENGTHS, MOST_DOUBT, NOISES, POWER, SPREADS, Belief
from tests.agents.toys import accuracy_of, feasible_plans, problem

MADE = problem(4)
PLANS = np.array(feasible_plans(MADE))
ACCURACY = np.array([accuracy_of(MADE, tuple(plan)) for plan in PLANS.tolist()])
SEEN = np.random.default_rng(0).permutation(len(PLANS))[:60]


def test_without_records_it_ranks_by_the_error_table() -> None:
    mean, deviation = Belief(MADE).predict(PLANS)
    assert (np.argsort(-mean) == np.argsort((parts(PLANS) ** POWER).sum(axis=1))).all()
    assert (deviation == 0).all()


def parts(plans: np.ndarray) -> np.ndarray:
    return np.array([[factor(plan) for factor in MADE.error.factors] for plan in plans.tolist()])


def shares(plans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The layers' shares of the sum, and minus its logarithm."""
    powered = parts(plans) ** POWER
    unit = (parts(np.array([MADE.cheapest])) ** POWER).sum()
    sums = powered.sum(axis=1)
    return powered / (sums[:, None] + FLOOR * unit), -np.log(sums / unit + FLOOR)


@pytest.mark.parametrize("worth", [0.0, 3.0])
def test_posterior_is_the_textbook_formula(worth: float) -> None:
    belief, seen, others = Belief(MADE), PLANS[SEEN], PLANS[:50]
    (own, sums), (other, others_sums) = shares(seen), shares(others)
    rewards = ACCURACY[SEEN] + worth * own[:, 0]
    belief.learn(seen[:30], rewards[:30])
    belief.learn(seen[30:], rewards[30:])
    mean, deviation = belief.predict(others)
    slope, offset = np.polyfit(sums, rewards, 1)
    slope = max(slope, 0.0)
    rest = rewards - slope * sums
    offset, rest = rest.mean(), rest - rest.mean()

    every, every_share = np.concatenate([seen, others]), np.concatenate([own, other])
    differing, alike = (every[:, None] != every[None]).mean(axis=2), every_share @ every_share.T
    answers = []
    for length, spread, noise in product(LENGTHS, SPREADS, NOISES):
        kernel = rest.var() * (np.exp(-differing / length) + spread**2 * alike)
        matrix = kernel[:60, :60] + rest.var() * noise * np.eye(60)
        evidence = -0.5 * rest @ np.linalg.solve(matrix, rest) - 0.5 * np.linalg.slogdet(matrix)[1]
        cross = kernel[60:, :60] @ np.linalg.inv(matrix)
        variance = np.diag(kernel[60:, 60:] - cross @ kernel[:60, 60:])
        answers.append((evidence, offset + slope * others_sums + cross @ rest, np.sqrt(variance)))
    _, expected, spread_expected = max(answers, key=lambda answer: answer[0])
    assert mean == pytest.approx(expected, abs=1e-6)
    assert deviation == pytest.approx(spread_expected, abs=1e-6)


def test_weights_are_drawn_as_they_are_believed() -> None:
    """Before there are records around the table; then as Bayesian linear regression on the shares has them."""
    belief, rng, count = Belief(MADE), np.random.default_rng(0), len(MADE.error.factors)

    def logarithms(noise: np.ndarray) -> np.ndarray:
        drawn = belief.errors(noise)
        pairs = zip(drawn.factors, MADE.error.factors, strict=True)
        return np.array([np.log(a.table[1:] / b.table[1:] ** POWER).mean() for a, b in pairs])

    noise = rng.normal(size=count)
    assert logarithms(noise) == pytest.approx(np.clip(DOUBT * noise, -MOST_DOUBT, MOST_DOUBT))
    own, sums = shares(PLANS[SEEN])
    worth = np.where(np.arange(count) == 2, -0.5, 0.0)
    belief.learn(PLANS[SEEN], sums + own @ worth)
    mean = logarithms(np.zeros(count))
    assert 0.25 < mean[2] - np.delete(mean, 2).mean() < 0.6
    assert np.abs(np.delete(mean, 2) - np.delete(mean, 2).mean()).max() < 0.15
    draws = np.array([logarithms(rng.normal(size=count)) for _ in range(300)])
    assert draws.mean(axis=0) == pytest.approx(mean, abs=0.1)
    assert (draws.std(axis=0) < DOUBT).all(), "records leave less open"


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
