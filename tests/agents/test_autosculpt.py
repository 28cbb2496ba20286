"""The main agent on problems whose answer is known, and its policy files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graphprune.agents import create
from graphprune.agents.autosculpt import AutoSculpt, Search, only_plan
from graphprune.counting import count
from graphprune.engines.fake import FakeEngine
from graphprune.errors import InputError
from graphprune.problem import BudgetSpent, Problem
from graphprune.search import search
from graphprune.target import Target
from tests.agents.toys import accuracy_of, feasible_plans, problem
from tests.graphprune import tiny

SEEDS = range(10)
TOY = 4


def run(agent: str | AutoSculpt, made: Problem, seed: int) -> Problem:
    searcher = create(agent) if isinstance(agent, str) else agent
    try:
        searcher.run(made, np.random.default_rng(seed))
    except BudgetSpent:
        assert made.remaining == 0
    return made


def finds(agent: str, best: float) -> int:
    """How many of the seeds reach the best accuracy on the toy within its trials."""
    ran = (run(agent, problem(TOY, trials=40), seed) for seed in SEEDS)
    return sum(max(record.accuracy or 0 for record in made.records) == best for made in ran)


def test_finds_the_enumerated_best_where_random_search_does_not() -> None:
    made = problem(TOY)
    plans = feasible_plans(made)
    accuracies = sorted((accuracy_of(made, plan) for plan in plans), reverse=True)
    by_table = accuracy_of(made, min(plans, key=made.error))
    assert len(plans) > 1000
    assert accuracies.index(by_table) > 50, "the error table must not give the answer away"
    assert finds("random", accuracies[0]) <= 3
    assert finds("autosculpt", accuracies[0]) >= 9


def test_imagination_alone_learns_the_error_table() -> None:
    made = problem(1, sizes=(4,) * 8)
    search = Search(made, np.random.default_rng(0), None)
    undecided = np.full((1, 8), -1, dtype=np.int64)
    before = made.error.batch(search.decode(np.tile(undecided, (200, 1)), greedy=False))
    search.warm_up(25)
    after = made.error(search.decode(undecided, greedy=True)[0])
    least = min(made.error(plan) for plan in feasible_plans(made))
    assert made.records == []
    assert after <= least + 0.05 * (before.mean() - least)


def test_the_same_seed_rounds_alike_whatever_the_threads() -> None:
    """Sums over threads round by chance, and in a long search a last digit decides which plans are tried."""
    threads, weights = torch.get_num_threads(), []
    try:
        for count_ in (1, 2, 2, 3):
            torch.set_num_threads(count_)
            made = Search(problem(sizes=(12,) * 12), np.random.default_rng(0), None)
            made.warm_up(2)
            assert torch.get_num_threads() == count_
            weights.append(made.weights())
    finally:
        torch.set_num_threads(threads)
    for other in weights[1:]:
        assert all(torch.equal(weight, other[name]) for name, weight in weights[0].items())


def test_no_trial_is_spent_twice_on_one_plan() -> None:
    made = run("autosculpt", problem(2, sizes=(3, 3, 3), limit=0.6, trials=200), 0)
    plans = [record.plan for record in made.records]
    assert len(plans) == len(set(plans))
    assert len(plans) >= 0.8 * len(feasible_plans(made))


def test_a_policy_moves_to_a_problem_of_another_size(tmp_path: Path) -> None:
    first = AutoSculpt()
    run(first, problem(0, sizes=(4, 3, 4), trials=4), 0)
    first.save_policy(tmp_path / "policy.safetensors")
    saved = load_file(tmp_path / "policy.safetensors")
    second = AutoSculpt()
    second.load_policy(tmp_path / "policy.safetensors")
    other = problem(1, sizes=(2, 5, 5, 3, 4), trials=4)
    start = Search(other, np.random.default_rng(0), load_file(tmp_path / "policy.safetensors")).weights()
    assert all(torch.equal(start[name], value) for name, value in saved.items())
    run(second, other, 0)
    assert len(other.records) == 4
    second.save_policy(tmp_path / "after.safetensors")
    assert any(not torch.equal(value, saved[name]) for name, value in load_file(tmp_path / "after.safetensors").items())


class Wider(nn.Module):
    """Another network than `tiny.network`: other operators, sites and options."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, 2, 1)
        self.block = nn.Conv2d(48, 48, 3, 1, 1)
        self.hidden = nn.Linear(48, 128)
        self.head = nn.Linear(128, tiny.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.block(x).relu()
        return self.head(nn.functional.gelu(self.hidden(x.mean((2, 3)))))


def test_one_traced_model_is_pruned_with_the_policy_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))
    engine, target, task = FakeEngine(), Target(latency=0.7), tiny.task()
    teacher = AutoSculpt()
    first = search(tiny.fitted(), task, target, teacher, trials=3, engine=engine)
    teacher.save_policy(tmp_path / "policy.safetensors")
    started: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(Search, "warm_up", lambda self, updates: started.append(self.weights()))
    pupil = AutoSculpt()
    pupil.load_policy(tmp_path / "policy.safetensors")
    torch.manual_seed(0)
    second = search(Wider().eval(), task, target, pupil, trials=3, engine=engine)
    saved = load_file(tmp_path / "policy.safetensors")
    assert all(torch.equal(started[0][name], value) for name, value in saved.items())
    assert {site.kind for site in first.graph.all_sites} != {site.kind for site in second.graph.all_sites}
    assert len(first.graph.all_sites) != len(second.graph.all_sites)
    assert isinstance(second.model, Wider)
    assert second.met
    assert count(second.model, task.example_inputs).flops < count(second.dense, task.example_inputs).flops


def test_bad_policies_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    with pytest.raises(InputError, match="no policy yet"):
        AutoSculpt().save_policy(path)
    with pytest.raises(InputError, match="cannot read"):
        AutoSculpt().load_policy(path)
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(InputError, match="cannot read"):
        AutoSculpt().load_policy(path)
    save_file({"value.0.weight": torch.zeros(2, 2)}, path)
    agent = AutoSculpt()
    agent.load_policy(path)
    with pytest.raises(InputError, match="does not fit"):
        agent.run(problem(trials=1), np.random.default_rng(0))


def test_only_plan_follows_the_wall() -> None:
    made = problem(3, sizes=(2, 3), limit=0.9, trials=1)
    assert only_plan(made) is None
    made.limits = {"latency": made.costs["latency"](made.cheapest)}
    del made.completions
    assert only_plan(made) == made.cheapest == (1, 2)
