"""GNN-RL: its environment against brute force, its rewards, and whether it learns."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from safetensors.torch import load

from graphprune.agents import create
from graphprune.agents.fronts import Fronts
from graphprune.agents.gnn_rl import CUTS, GNNRL, IDLE, MISSED, STEPS, Search, ShrinkingEnv, reward
from graphprune.record import Record
from graphprune.searching.problem import BudgetSpent, Choices, Factor, Problem, Sum
from tests.agents.toys import accuracy_of, feasible_plans, problem

SEEDS = range(6)


class Judge:
    """Remembers with what plans episodes ended."""

    def __init__(self) -> None:
        self.plans: list[Choices | None] = []

    def __call__(self, plan: Choices | None) -> float:
        self.plans.append(plan)
        return -0.25


def environment(made: Problem) -> tuple[ShrinkingEnv, Judge]:
    judge = Judge()
    return ShrinkingEnv(Fronts(made), judge), judge


def spent(made: Problem, seed: int = 0) -> Problem:
    try:
        GNNRL().run(made, np.random.default_rng(seed))
    except BudgetSpent:
        assert made.remaining == 0
    return made


def best(made: Problem) -> float:
    return max(record.accuracy or 0.0 for record in made.records)


@pytest.mark.parametrize("seed", range(5))
def test_steps_only_shrink_and_are_five_at_most(seed: int) -> None:
    """Every state against the product of the ratios so far; the step that meets the budget is its shortest part."""
    made = problem(seed, sizes=(4, 3, 5, 2), limit=0.5)
    env, judge = environment(made)
    rng = np.random.default_rng(seed)
    for episode in range(10):
        env.reset()
        kept, done, steps, cost = np.ones(4), False, 0, np.inf
        while not done:
            action = rng.random(4).astype(np.float32) * rng.choice([0.05, 0.3, 1.0])
            seen, value, done, truncated, _ = env.step(action)
            before, kept, steps = kept, kept * (1 - action.astype(float)), steps + 1
            assert (env.kept <= before).all()
            assert made.overrun(env.asked) <= cost
            cost = made.overrun(env.asked)
            assert not truncated
            assert value == (-0.25 if done else 0.0)
            assert seen["state"] == pytest.approx([cost, steps / STEPS])
            if not done:
                assert env.kept == pytest.approx(kept)
                assert cost > 1
        assert steps <= STEPS
        if judge.plans[episode] is None:
            assert steps == STEPS
            assert cost > 1
            assert env.kept == pytest.approx(kept)
        else:
            assert judge.plans[episode] == tuple(env.asked)
            assert made.feasible(env.asked)
            parts = [before * (1 - action.astype(float) * part / CUTS) for part in range(1, CUTS + 1)]
            meets = [made.feasible(env.asks(part[None])[0]) for part in parts]
            assert env.kept == pytest.approx(parts[meets.index(True)])
    assert len(set(judge.plans)) > 2


def test_nothing_asked_for_misses_the_budget_after_five_steps() -> None:
    env, judge = environment(problem())
    env.reset()
    ends = [env.step(np.zeros(6, np.float32))[2] for _ in range(STEPS)]
    assert ends == [False] * 4 + [True]
    assert judge.plans == [None]


def test_options_that_exclude_each_other_are_not_asked_for_together() -> None:
    made = problem(sizes=(3, 3), pairs=False, limit=0.5)
    table = np.zeros((3, 3))
    table[1:, 1:] = np.inf
    made.costs = {"latency": Sum(0.0, (*made.costs["latency"].factors, Factor((0, 1), table)))}
    env, _ = environment(made)
    shares = np.random.default_rng(0).random((50, 2))
    asked = env.asks(shares)
    fronts = [
        [0 if site and row[0] else alone(env, site, share) for site, share in enumerate(line)]
        for row, line in zip(asked, shares, strict=True)
    ]
    assert asked.tolist() == fronts
    assert {tuple(row) for row in asked} > {(0, 1), (1, 0)}
    assert np.isfinite(made.overruns(asked)).all()


def alone(env: ShrinkingEnv, site: int, share: float) -> int:
    return int(np.nanargmin(np.abs(env.fronts.ratios[site] - (1 - share))))


def test_the_environment_keeps_gymnasiums_contract() -> None:
    env, _ = environment(problem(sizes=(3, 2, 4)))
    env.observation_space.seed(0)
    env.action_space.seed(0)
    states = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    check_env(env, skip_render_check=True)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_the_reward_is_minus_the_error_and_the_largest_one_for_a_missed_budget() -> None:
    made = problem(limit=0.5)
    plan = feasible_plans(made)[7]
    assert reward(made.evaluator(plan)) == accuracy_of(made, plan) - 1
    assert reward(Record(made.plan(plan), error="did not build")) == MISSED == -1
    search = Search(made, np.random.default_rng(0), None)
    assert search.judge(None) == -1
    assert made.records == []
    assert search.judge(plan) == search.judge(plan) == accuracy_of(made, plan) - 1
    assert len(made.records) == 1


class Imagined(Search):
    """Judges plans by the error table, over 300 episodes that cost no trial."""

    def __init__(self, made: Problem) -> None:
        self.ends: list[float] = []
        super().__init__(made, np.random.default_rng(0), None)

    def judge(self, plan: Choices | None) -> float:
        self.idle = 0 if len(self.ends) < 300 else IDLE
        self.ends.append(MISSED if plan is None else -self.problem.error(plan))
        return self.ends[-1]


def test_learns_which_sites_bear_to_be_cut() -> None:
    """Every second site errs a tenth of the others, which the policy has to find out."""
    made = problem(3, sizes=(4,) * 8, limit=0.6, pairs=False)
    scale = np.where(np.arange(8) % 2, 0.1, 1.0) / made.error(made.cheapest)
    tables = [replace(own, table=own.table * scale[site]) for site, own in enumerate(made.error.factors)]
    made.error = Sum(0.0, tuple(tables))
    search = Imagined(made)
    search.spend()
    least = -min(made.error(plan) for plan in feasible_plans(made))
    first, last = np.mean(search.ends[:100]), np.mean(search.ends[-100:])
    assert last - first > 0.4 * (least - first)


def test_better_than_random_on_most_toys() -> None:
    wins = 0
    for seed in SEEDS:
        own, other = (problem(seed, sizes=(4,) * 8, trials=80) for _ in range(2))
        spent(own, seed)
        create("random").run(other, np.random.default_rng(seed + 1000))
        wins += best(own) > best(other)
    assert wins >= 4


def test_ends_when_nothing_new_turns_up() -> None:
    made = spent(problem(2, sizes=(3, 3, 3), limit=0.6, trials=200))
    plans = [record.plan for record in made.records]
    assert 0 < len(plans) < 27
    assert len(plans) == len(set(plans))


def test_the_plan_that_asks_for_most_is_left_when_no_episode_meets_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphprune.agents.gnn_rl.IDLE", 10)
    monkeypatch.setattr(ShrinkingEnv, "asks", lambda self, kept: np.zeros((len(kept), 6), dtype=np.int64))
    made = spent(problem())
    assert [record.plan for record in made.records] == [made.plan(Fronts(made).plan([1.0] * 6))]


def test_what_an_evaluation_draws_does_not_turn_the_search() -> None:
    asked: list[list[Choices]] = []
    threads, seen = torch.get_num_threads(), set()
    for reseeds in (False, True):
        made = problem(trials=20)
        inner, plans = made.evaluator, []

        def evaluator(choices: Choices, inner=inner, plans=plans, reseeds=reseeds) -> Record:
            seen.add(torch.get_num_threads())
            plans.append(choices)
            if reseeds:
                torch.manual_seed(0)
            return inner(choices)

        made.evaluator = evaluator
        torch.set_num_threads(2)
        try:
            spent(made)
        finally:
            torch.set_num_threads(threads)
        asked.append(plans)
    assert asked[0] == asked[1]
    assert seen == {2}


def test_a_policy_moves_to_a_problem_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    first, second = GNNRL(), GNNRL()
    with pytest.raises(BudgetSpent):
        first.run(problem(0, sizes=(4, 3, 4), trials=4), np.random.default_rng(7))
    first.save_policy(path)
    saved = load(path.read_bytes())
    second.load_policy(path)
    path.write_bytes(b"what is loaded no longer needs the file")
    other = problem(1, sizes=(2, 5, 5, 3, 4), trials=30)
    start = Search(other, np.random.default_rng(0), saved).weights()
    assert all(torch.equal(start[name], value) for name, value in saved.items())
    with pytest.raises(BudgetSpent):
        second.run(other, np.random.default_rng(0))
    second.save_policy(path)
    assert any(not torch.equal(value, saved[name]) for name, value in load(path.read_bytes()).items())
