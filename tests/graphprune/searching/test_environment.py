"""The environment against Gymnasium's own checker and against plain sums over the tables."""

import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from graphprune.record import Record, Share
from graphprune.searching.environment import Observer, Prices, PruningEnv, reward
from graphprune.searching.problem import Problem
from tests.agents.toys import problem


def play(env: PruningEnv, actions: tuple[int, ...]) -> tuple[float, bool, bool, dict[str, object]]:
    """One episode; returns what the last step returned, without its observation."""
    env.reset()
    for action in actions:
        _, value, terminated, truncated, info = env.step(np.int64(action))
    return value, terminated, truncated, info


def test_gymnasium_accepts_it() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(PruningEnv(problem(sizes=(3, 2, 4))), skip_render_check=True)


def test_an_episode_ends_with_the_accuracy_of_its_plan() -> None:
    made = problem(sizes=(3, 2, 4), limit=0.9, trials=2)
    env = PruningEnv(made)
    value, terminated, truncated, info = play(env, (1, 1, 2))
    assert info["record"] is made.records[0]
    assert value == made.records[0].accuracy
    assert (terminated, truncated) == (True, False)
    assert play(env, (1, 0, 3))[1:3] == (True, True)
    assert play(env, (1,)) == (0.0, False, True, {})
    assert len(made.records) == 2


def test_a_forbidden_action_ends_the_episode_and_spends_nothing() -> None:
    made = problem(sizes=(3, 2, 4), limit=0.2, trials=2, pairs=False)
    env = PruningEnv(made)
    env.reset()
    assert not env.action_masks()[0]
    assert play(env, (0,)) == (-1.0, True, False, {})
    assert play(env, (3,)) == (-1.0, True, False, {})
    assert made.records == []


def test_reward_withholds_the_accuracy_beyond_the_band() -> None:
    made = problem(sizes=(3, 2), limit=0.5)
    choices = (2, 1)
    cost = made.costs["latency"](choices)
    record = Record(made.plan(choices), accuracy=0.8)

    def at(limit: float, record: Record = record) -> float:
        return reward(replace(made, limits={"latency": limit}), record, choices)

    assert at(cost) == pytest.approx(0.8)
    assert at(cost * 2) == pytest.approx(0.8)
    assert at(cost / 1.04) == pytest.approx(0.76)
    assert at(cost / 1.2) == pytest.approx(-0.2)
    assert at(cost / 9) == -1
    assert at(cost, Record(made.plan(choices), error="no")) == -1
    slow = replace(record, measured=Share(cost * 1.3, cost, cost * 1.4, (1.0,), (1.0,), "fake"))
    assert at(cost, slow) == pytest.approx(-0.3)


def reachable(made: Problem, prefix: tuple[int, ...]) -> list[bool]:
    """Which options of the next site lead to some feasible plan, by enumeration."""
    sizes = [len(decision.options) for decision in made.decisions[len(prefix) :]]
    every = [(*prefix, *rest) for rest in product(*map(range, sizes))]
    return [any(made.feasible(plan) and plan[len(prefix)] == option for plan in every) for option in range(sizes[0])]


@pytest.mark.parametrize("seed", range(4))
def test_masks_leave_exactly_what_can_still_be_feasible(seed: int) -> None:
    made = problem(seed, sizes=(3, 4, 2, 3), limit=0.4)
    observer = Observer(made)
    for prefix in [(), (2,), (2, 1), (1, 3), (2, 3, 1)]:
        if prefix and not reachable(made, prefix[:-1])[prefix[-1]]:
            continue
        mask = observer.masks(np.array([prefix], dtype=np.int64).reshape(1, len(prefix)))[0]
        expected = reachable(made, prefix)
        assert mask.tolist() == expected + [False] * (4 - len(expected))


@pytest.mark.parametrize("seed", range(4))
def test_the_wall_at_any_open_site_keeps_to_what_is_decided_elsewhere(seed: int) -> None:
    """By enumeration of the other open sites; one that nothing can save has the cheapest option left."""
    made = problem(seed, sizes=(3, 4, 2, 3), limit=0.4)
    observer, checked = Observer(made), 0
    for decided in product((-1, 2), (-1, 1, 3), (-1, 1), (-1, 0, 2)):
        for site in np.flatnonzero(np.array(decided) < 0):
            others = [
                range(len(d.options)) if taken < 0 else [taken]
                for d, taken in zip(made.decisions, decided, strict=True)
            ]
            plans = [plan for plan in product(*others) if made.feasible(plan)]
            mask = observer.open_masks(np.array([decided], dtype=np.int64), int(site))[0]
            if plans:
                assert set(np.flatnonzero(mask)) == {plan[site] for plan in plans}
                checked += 1
            else:
                assert np.flatnonzero(mask).tolist() == [made.completions[0][site]]
    assert checked > 20


def test_observations_do_not_care_in_which_order_sites_were_decided() -> None:
    """With the last sites decided, what an option adds and saves is counted beside them."""
    made = problem(2, sizes=(3, 4, 2), limit=0.5)
    seen = Observer(made).observe(np.array([[-1, 2, 1]], dtype=np.int64), 0)
    scale, unit = made.error(made.cheapest) / 3, made.overrun(made.dense) / 3
    for option in range(3):
        added = (made.error((option, 2, 1)) - made.error((0, 2, 1))) / scale
        saved = (made.overrun((0, 2, 1)) - made.overrun((option, 2, 1))) / unit
        assert seen["options"][0, option, [0, 2]] == pytest.approx([added, saved], abs=1e-5)
    assert seen["state"][0, 1] == pytest.approx(made.overrun((0, 2, 1)), abs=1e-5)


def test_the_price_is_the_multiplier_at_which_enough_is_saved() -> None:
    """Against a fine sweep over multipliers: each site takes what minimises error + multiplier x cost."""
    made = problem(5, sizes=(5, 4, 6, 3), limit=0.5, pairs=False)
    errors, costs = ([f.table for f in total.factors] for total in (made.error, made.costs["latency"]))
    prices, multipliers = Prices(made), np.geomspace(1e-2, 1e2, 4001)
    for site in range(3):
        tables = list(zip(errors[site:], costs[site:], strict=True))
        saved = [sum((c[0] - c[(e + m * c / 0.5).argmin()]) for e, c in tables) for m in multipliers]
        whole = sum(c[0] - c.min() for _, c in tables)
        for pressure in (0.1, 0.35, 0.6, 0.9):
            enough = multipliers[np.searchsorted(saved, pressure * whole)]
            left = np.tile(np.arange(4) >= site, (2, 1))
            assert prices(np.array([pressure, 0.0]), left) == pytest.approx([enough, 0.0], rel=5e-3)
    assert prices(np.ones(2), np.zeros((2, 4), dtype=np.bool_)).tolist() == [0, 0]


def test_observations_are_sums_over_the_tables() -> None:
    made = problem(2, sizes=(3, 4, 2), limit=0.5)
    seen = Observer(made)(np.array([[1], [2]], dtype=np.int64))
    scale = made.error(made.cheapest) / 3
    unit = made.overrun(made.dense) / 3
    assert seen["site"].tolist() == [[1], [1]]
    assert seen["decided"].tolist() == [[1, -1, -1], [2, -1, -1]]
    for row, first in enumerate((1, 2)):
        for option in range(4):
            added = (made.error((first, option, 0)) - made.error((first, 0, 0))) / scale
            saved = (made.overrun((first, 0, 0)) - made.overrun((first, option, 0))) / unit
            features = seen["options"][row, option]
            assert features[[0, 2]] == pytest.approx([added, saved], abs=1e-5)
            assert features[3] == pytest.approx(made.overrun((first, option, made.cheapest[2])), abs=1e-5)
        high, low = made.overrun((first, 0, 0)), made.overrun((first, *made.cheapest[1:]))
        assert seen["state"][row, :3] == pytest.approx([1 / 3, high, low], abs=1e-5)
        pressure = np.clip((high - 1) / (high - low), 0, 1)
        price = Prices(made)(np.array([pressure]), np.array([[False, True, True]]))[0] * unit / scale
        assert seen["state"][row, 4:] == pytest.approx([pressure, np.log(price + 1e-3) / 3], abs=1e-5)
        worth = price * seen["options"][row, :, 2] - seen["options"][row, :, 0]
        regret = (worth.max() - worth) / (price * seen["options"][row, :, 2].max() + 1e-3)
        assert seen["options"][row, :, 5] == pytest.approx(np.minimum(regret, 10), abs=1e-3)
