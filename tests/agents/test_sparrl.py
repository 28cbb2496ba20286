"""SparRL on problems whose answer is known, at budgets that it was asked for and at others."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from graphprune.agents import create
from graphprune.agents.cutting import Cutting
from graphprune.agents.sparrl import Search, SparRL, Worth
from graphprune.agents.wall import passes
from graphprune.errors import InputError
from graphprune.searching.problem import BudgetSpent, Choices, Problem
from tests.agents.toys import accuracy_of, feasible_plans, problem

SEEDS = range(5)
SIZES = (4,) * 6
BUDGETS = tuple({"latency": limit} for limit in (0.6, 0.5, 0.35, 0.3))
"""The toys ask for 0.4."""


def run(agent: str | SparRL, made: Problem, seed: int = 0) -> Problem:
    searcher = create(agent) if isinstance(agent, str) else agent
    try:
        searcher.run(made, np.random.default_rng(seed))
    except BudgetSpent:
        assert made.remaining == 0
    return made


def best(agent: str, made: Problem, seed: int = 0) -> float:
    """The best accuracy that an agent finds."""
    return max(record.accuracy or 0 for record in run(agent, made, seed).records)


@cache
def trained(seed: int) -> tuple[Problem, list[Choices]]:
    """A toy on which the agent spent its trials, and the agent's curve."""
    agent, made = SparRL(), problem(seed, SIZES, trials=40)
    run(agent, made, seed)
    return made, agent.curve(made, BUDGETS, np.random.default_rng(seed))


def test_better_than_random_with_as_many_trials() -> None:
    wins = 0
    for seed in SEEDS:
        made, _ = trained(seed)
        assert len(made.records) == 40
        mine = max(record.accuracy or 0 for record in made.records)
        wins += mine > best("random", problem(seed, SIZES, trials=40), seed)
    assert wins >= 4


@pytest.mark.parametrize(("other", "least"), [("uniform", 18), ("magnitude", 13)])
def test_one_run_serves_budgets_that_it_was_not_asked_for(other: str, least: int) -> None:
    """Of 20 plans at other budgets, those better than a plan made for that budget."""
    wins = 0
    for seed in SEEDS:
        made, curve = trained(seed)
        for limit, plan in zip(BUDGETS, curve, strict=True):
            asked = replace(made, limits=limit, records=[], _seen={}, trials=60)
            assert passes(asked, plan)
            wins += accuracy_of(made, plan) > best(other, asked)
    assert wins >= least


def together(seed: int, trials: int) -> list[Problem]:
    """One toy at every budget, after one run for all of them."""
    made = problem(seed, SIZES)
    asked = [replace(made, limits=limit, records=[], _seen={}, trials=trials) for limit in BUDGETS]
    SparRL().run_together(asked, np.random.default_rng(seed))
    return asked


def test_one_run_for_several_budgets_spends_each_ones_trials_on_plans_of_its_own() -> None:
    asked = together(0, trials=8)
    for made in asked:
        own = {made.plan(plan) for plan in feasible_plans(made)}
        assert len(made.records) == 8
        assert all(record.plan in own for record in made.records)
    plans = [record.plan for made in asked for record in made.records]
    assert len(plans) == len(set(plans))


def test_what_a_loose_budget_teaches_serves_a_tight_one() -> None:
    """How far the most promising plan at the tight one is behind the best: before and after plans at the other."""
    behind = np.zeros((len(SEEDS), 2))
    for seed in SEEDS:
        made = problem(seed, SIZES)
        loose, tight = (replace(made, limits=limit, records=[], _seen={}, trials=20) for limit in BUDGETS[1:3])
        search, plans = Search([loose, tight], np.random.default_rng(seed), None), np.array(feasible_plans(tight))
        accuracy = np.array([accuracy_of(made, plan) for plan in map(tuple, plans.tolist())])
        behind[seed, 0] = accuracy.max() - accuracy[search.metric(plans).argmax()]
        slow = np.array([plan for plan in feasible_plans(loose) if not tight.feasible(plan)])
        for _ in range(2):
            search._try(loose, slow, 10)
        behind[seed, 1] = accuracy.max() - accuracy[search.metric(plans).argmax()]
    assert not tight.records
    assert behind[:, 1].mean() < 0.5 * behind[:, 0].mean()


def test_a_budget_that_dense_meets_is_answered_beside_the_others() -> None:
    made = problem(0, SIZES)
    loose, tight = (replace(made, limits={"latency": limit}, records=[], _seen={}, trials=5) for limit in (1.0, 0.4))
    SparRL().run_together([tight, loose], np.random.default_rng(0))
    assert [record.plan for record in loose.records] == [made.plan(made.dense)]
    assert len(tight.records) == 5


def test_a_curve_spends_no_trial_and_draws_from_its_generator_alone() -> None:
    agent, made = SparRL(), problem(1, sizes=(3, 3, 3), trials=3)
    run(agent, made)
    before, state = len(made.records), torch.get_rng_state()
    first = agent.curve(made, BUDGETS, np.random.default_rng(0))
    torch.manual_seed(1)
    second = agent.curve(made, BUDGETS, np.random.default_rng(0))
    torch.set_rng_state(state)
    assert first == second
    assert len(made.records) == before
    impossible, nothing = agent.curve(made, [{"latency": 0.01}, {"latency": 1.0}], np.random.default_rng(0))
    assert impossible == made.cheapest
    assert nothing == made.dense


def test_imagination_alone_learns_the_error_table() -> None:
    """On average over seeds, of which one in four is unlucky."""
    made = problem(1, sizes=(4,) * 8)
    least, above = min(made.error(plan) for plan in feasible_plans(made)), []
    for seed in range(4):
        search = Search([made], np.random.default_rng(seed), None)
        random = made.error.batch(search.pruners[0].finish(np.zeros((200, 8), dtype=np.int64), curiosity=1.0)).mean()
        search.learn(25, 200)
        above.append((made.error(search.pruners[0].greedy()) - least) / (random - least))
    assert made.records == []
    assert np.mean(above) <= 0.25


def test_no_trial_is_spent_twice_on_one_plan_and_the_search_ends() -> None:
    made = run("sparrl", problem(2, sizes=(3, 3, 3), limit=0.6, trials=200))
    plans = [record.plan for record in made.records]
    assert len(plans) == len(set(plans))
    assert len(plans) >= 0.7 * len(feasible_plans(made))


def test_returns_are_the_change_of_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also once records correct what whole plans are worth."""
    made = problem(0, sizes=(4, 4, 4, 4))
    search = Search([made], np.random.default_rng(0), None)
    for plan in feasible_plans(made)[::9]:
        search.rewards[plan] = accuracy_of(made, plan)
    search.belief.learn(np.array(list(search.rewards)), np.array(list(search.rewards.values())))
    search._understand(np.array(feasible_plans(made)))
    rng = np.random.default_rng(1)
    episodes = Cutting(search.episodes.observers, 6, search.metric, rng)
    start, total, ends = episodes.reset()["decided"].copy(), np.zeros(6), []
    for _ in range(12):
        episodes.step_async(rng.integers(64, size=6))
        seen, rewards, done, _ = episodes.step_wait()
        total += rewards
        ends += [(start[number].copy(), total[number]) for number in np.flatnonzero(done)]
        total[done], start[done] = 0.0, seen["decided"][done]
    finals = search.metric(np.array(episodes.finished))
    assert len(ends) > 10
    assert search.metric(np.array([first for first, _ in ends])) + [change for _, change in ends] == pytest.approx(
        finals
    )
    known = [number for number, plan in enumerate(episodes.finished) if plan in search.rewards]
    values = np.array([search.rewards[episodes.finished[number]] for number in known])
    assert len(known) > 1
    assert finals[known] == pytest.approx(search.worth.standard(values))


def test_the_metric_of_half_cut_models_finds_the_layers_sensitivities() -> None:
    made = problem(0, sizes=(4, 4, 4))
    plans, sensitivities = np.array(feasible_plans(made)), np.array([0.5, 1.0, 2.0])
    parts = made.error.parts(plans)
    values = 7 - parts @ sensitivities
    many = np.repeat(plans, 200, axis=0)
    worth = Worth(made, many, np.repeat(values, 200))
    assert worth.halfway(plans) == pytest.approx(worth.standard(values), abs=0.02)
    found = [factor.table[1] for factor in worth.error.factors] / np.array([f.table[1] for f in made.error.factors])
    assert found / found[1] == pytest.approx(sensitivities, rel=0.02)


@pytest.mark.parametrize("values", [np.full(8, -1.0), np.linspace(0, 1, 8)])
def test_error_never_counts_in_favour(values: np.ndarray) -> None:
    """Whether all plans failed or the worse ones did better."""
    made = problem(0, sizes=(4, 4, 4))
    plans = np.array(sorted(feasible_plans(made), key=made.error)[:8])
    worth = Worth(made, plans, values)
    assert all(np.isfinite(factor.table).all() and (factor.table >= 0).all() for factor in worth.error.factors)


def test_a_policy_moves_to_a_problem_of_another_size(tmp_path: Path) -> None:
    first = SparRL()
    run(first, problem(0, sizes=(4, 3, 4), trials=4))
    first.save_policy(tmp_path / "policy.safetensors")
    saved = load_file(tmp_path / "policy.safetensors")
    other = problem(1, sizes=(2, 5, 5, 3, 4), trials=4)
    start = Search([other], np.random.default_rng(0), saved).dqn.policy.state_dict()
    assert start.keys() == saved.keys()
    assert all(torch.equal(start[name], value) for name, value in saved.items())
    second = SparRL()
    second.load_policy(tmp_path / "policy.safetensors")
    plans = second.curve(other, BUDGETS[:2], np.random.default_rng(0))
    assert all(passes(replace(other, limits=limit), plan) for limit, plan in zip(BUDGETS[:2], plans, strict=True))
    run(second, other)
    assert len(other.records) == 4
    second.save_policy(tmp_path / "after.safetensors")
    assert any(not torch.equal(value, saved[name]) for name, value in load_file(tmp_path / "after.safetensors").items())


def test_without_a_policy_that_fits_there_is_no_curve(tmp_path: Path) -> None:
    made = problem(trials=1)
    with pytest.raises(InputError, match="no policy yet"):
        SparRL().curve(made, BUDGETS, np.random.default_rng(0))
    save_file({"value.0.weight": torch.zeros(2, 2)}, tmp_path / "policy.safetensors")
    agent = SparRL()
    agent.load_policy(tmp_path / "policy.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        agent.curve(made, BUDGETS, np.random.default_rng(0))


def test_where_the_dense_model_meets_the_target_it_is_the_answer() -> None:
    made = run("sparrl", problem(0, sizes=(3, 3), limit=1.0, trials=5))
    assert [record.plan for record in made.records] == [made.plan(made.dense)]
