"""The main agent on problems whose answer is known, and its policy files."""

import tomllib
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from graphprune.agents import create
from graphprune.agents.autosculpt import (
    AT_ONCE,
    SHIPPED,
    TRADES,
    AutoSculpt,
    Search,
    fits,
    merit,
)
from graphprune.agents.belief import EXPLORATION, Belief
from graphprune.agents.encoder import Sight
from graphprune.agents.policies import Weights, adopt, read_policy
from graphprune.agents.wall import only_plan
from graphprune.counting import count
from graphprune.engines.fake import FakeEngine
from graphprune.errors import InputError
from graphprune.record import Record, Share
from graphprune.registry import patterns
from graphprune.searching.problem import BudgetSpent, Choices, Problem
from graphprune.searching.search import Session, search
from graphprune.searching.views import VIEW_FEATURES
from graphprune.target import Target
from tests.agents.toys import accuracy_of, feasible_plans, problem, with_branch
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


def traced(made: Problem) -> Problem:
    """The toy with as many node features as a traced model has, those of the toy being none of them."""
    nodes = len(made.graph.features)
    made.graph = replace(made.graph, features=np.zeros((nodes, len(VIEW_FEATURES)), np.float32))
    return made


def first_plan(agent: str | AutoSculpt, made: Problem) -> Choices:
    """What an agent asks for first."""
    asked: list[Choices] = []
    evaluator = made.evaluator

    def noted(choices: Choices) -> Record:
        asked.append(choices)
        return evaluator(choices)

    run(agent, replace(made, evaluator=noted, trials=1, records=[], _seen={}), 0)
    return asked[0]


def errors_of_first_plans(made: Problem) -> list[float]:
    """By the error table: of the main agent, of `uniform` and of `magnitude`."""
    return [made.error(first_plan(name, made)) for name in ("autosculpt", "uniform", "magnitude")]


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


def test_what_the_policy_decides_keeps_the_rest_and_is_legal() -> None:
    """Of plans with some sites open: what comes back has the other sites as they were, up to branches that went."""
    made = with_branch(limit=0.6)
    search = Search(made, np.random.default_rng(0), None)
    anchors = np.array([[-1, 2, 1], [0, -1, 2], [0, 1, -1], [-1, -1, -1]] * 40, dtype=np.int64)
    plans = search.decode(anchors, greedy=False)
    assert 0 < len(plans) <= len(anchors)
    assert all(made.allows(plan) for plan in plans.tolist())
    fitting = [
        any(made.canonical(np.where(anchor < 0, plan, anchor)) == tuple(plan) for anchor in anchors[:4])
        for plan in plans.tolist()
    ]
    assert all(fitting)


def test_variations_open_few_sites_at_a_time_and_exchanges_are_legal() -> None:
    made = problem(3, sizes=(4,) * 20, limit=0.5)
    search = Search(made, np.random.default_rng(0), None)
    plans = search.own_plans()
    opened = search._opened(plans)
    assert ((opened < 0).sum(axis=1) >= 1).all()
    assert ((opened < 0).sum(axis=1) <= 3).all()
    assert (opened < 0).any(axis=0).sum() == AT_ONCE
    exchanged = search._exchanged(plans)
    assert len(exchanged) > 50
    assert all(made.allows(plan) for plan in exchanged.tolist())
    near = [min((np.array(plan) != own).sum() for own in plans) for plan in exchanged.tolist()]
    assert max(near) == 2


def test_trades_are_the_best_of_one_better_and_one_cheaper_option() -> None:
    """By enumeration, where sites do not interact."""
    made = problem(3, sizes=(4,) * 8, limit=0.5, pairs=False)
    search = Search(made, np.random.default_rng(0), None)

    def changed(plan: Choices) -> list[Choices]:
        return [(*plan[:i], k, *plan[i + 1 :]) for i in range(len(plan)) for k in range(4) if k != plan[i]]

    for start in map(tuple, search.own_plans()[:10].tolist()):
        better = [plan for plan in changed(start) if made.error(plan) < made.error(start)]
        pairs = [
            other
            for plan in better
            for other in changed(plan)
            if made.overrun(other) < made.overrun(plan) and sum(x != y for x, y in zip(other, start, strict=True)) == 2
        ]
        errors = sorted({made.error(plan) for plan in better + pairs if made.feasible(plan)})
        expected = [error for error in errors if error < made.error(start) - 1e-12][:TRADES]
        traded = search._traded(np.array([start]), made.error)
        assert all(made.allows(plan) for plan in traded.tolist())
        assert sorted({made.error(plan) for plan in traded.tolist()}) == pytest.approx(expected)


def test_sites_settle_at_the_least_error_and_price() -> None:
    """By enumeration, where sites do not interact; and inside a branch that is only worth its price when it is cut."""
    prices = np.array([0.1, 1.0, 3.0, 10.0])
    for made in (problem(3, sizes=(4,) * 6, pairs=False), with_branch(5)):
        search, sites = Search(made, np.random.default_rng(0), None), len(made.decisions)
        for start in (made.dense, made.cheapest):
            plans = np.repeat(np.array([start]), len(prices), axis=0)
            settled = search._settled(plans, np.ones(plans.shape, np.bool_), prices, made.error)
            every = np.array(list(product(*(range(len(decision.options)) for decision in made.decisions))))
            for plan, price in zip(settled, prices, strict=True):
                least = (made.error.batch(every) + price * made.overruns(every)).min()
                assert made.error(plan) + price * made.overrun(plan) == pytest.approx(least)
            shut = np.zeros(plans.shape, np.bool_)
            shut[:, 0] = True
            assert (search._settled(plans, shut, prices, made.error)[:, 1:sites] == plans[:, 1:]).all()


def test_the_first_plan_has_nearly_the_least_error() -> None:
    """Among all plans, by enumeration, whatever the policy says; by exchanges alone a branch would not come back."""
    for made in (problem(TOY), problem(7), problem(3, sizes=(3,) * 9, limit=0.5), with_branch(5)):
        search = Search(made, np.random.default_rng(0), None)
        for belief, error in ((Belief(made, power=1.0), made.error), (search.belief, search.belief.error)):
            bred = search.first_plans(belief)
            assert error.batch(bred).min() == pytest.approx(min(error(plan) for plan in feasible_plans(made)))


def test_a_branch_is_opened_and_grafted_with_what_is_inside() -> None:
    made = with_branch(limit=0.6)
    search = Search(made, np.random.default_rng(0), None)
    gone, kept = np.array([[1, 0, 2]]), np.array([[0, 3, 2]])
    opened = search._opened(gone)
    assert (opened[opened[:, 0] < 0, 1] < 0).all()
    assert {tuple(plan) for plan in (opened < 0).tolist()} > {(True, True, False), (False, False, True)}
    grafted = {tuple(plan) for plan in search._grafted(gone, np.concatenate([kept, gone])).tolist()}
    assert grafted <= {(1, 0, 2), (0, 3, 2)}
    assert made.feasible(kept[0]) == ((0, 3, 2) in grafted)


def test_a_dream_has_nearly_the_least_of_the_errors_it_is_dreamt_for() -> None:
    made = problem(3, sizes=(3,) * 9, limit=0.5)
    search, plans = Search(made, np.random.default_rng(0), None), np.array(feasible_plans(made))
    noise = np.random.default_rng(1)
    found, excess = [], []
    for _ in range(10):
        errors = search.belief.errors(2 * noise.normal(size=len(made.error.factors)))
        (dream,) = search._least(errors, search._at_prices(errors)[0])
        assert made.allows(dream.tolist())
        excess.append(errors(dream.tolist()) / errors.batch(plans).min() - 1)
        found.append(tuple(dream.tolist()))
    assert np.median(excess) == pytest.approx(0)
    assert max(excess) < 0.2
    assert len(set(found)) > 3
    assert len(search.dreams(4)) == 4


def judged(made: Problem, accuracy: float | None, deviation: float | None = None) -> Record:
    """The record of the cheapest plan, as if it had turned out so."""
    error = "boom" if accuracy is None else None
    return Record(made.plan(made.cheapest), accuracy, accuracy is not None, deviation=deviation, error=error)


def test_what_a_plan_is_worth_rises_evenly_in_what_is_off() -> None:
    made = problem(TOY)
    wrong = [merit(made, judged(made, accuracy), made.cheapest) for accuracy in (None, 0.0, 0.5, 0.75, 0.875)]
    assert np.diff(wrong) == pytest.approx(np.log(2))
    most, alike, less = (merit(made, judged(made, accuracy), made.cheapest) for accuracy in (1.0, 0.995, 0.98))
    assert most == alike > less
    far = [merit(made, judged(made, 0.5, deviation), made.cheapest) for deviation in (1.0, 0.5, 0.25)]
    assert np.diff(far) == pytest.approx(np.log(2) / 2)
    assert merit(made, judged(made, 0.5, 0.5), made.cheapest) == pytest.approx(wrong[2])


def test_answers_and_outputs_count_alike_and_an_overrun_is_taken_off() -> None:
    made = problem(TOY)
    near, lucky = judged(made, 0.8, 0.1), judged(made, 0.9, 0.3)
    assert merit(made, near, made.cheapest) > merit(made, lucky, made.cheapest)
    assert merit(made, near, made.cheapest) == pytest.approx(merit(made, judged(made, 0.9, 0.2), made.cheapest))
    late = replace(near, measured=Share(1.1 * made.limits["latency"], 0.0, 1.0, (), (), "an engine"))
    assert merit(made, near, made.cheapest) - merit(made, late, made.cheapest) == pytest.approx(0.1)


def test_dreams_and_exploration_end_with_the_trials() -> None:
    made = problem(TOY, trials=30)
    search = Search(made, np.random.default_rng(0), None)
    asked: list[int] = []
    dreams = search.dreams

    def noted(count: int) -> np.ndarray:
        asked.append(count)
        return dreams(count)

    search.dreams = noted  # type: ignore[method-assign]
    assert search.exploration == EXPLORATION
    with pytest.raises(BudgetSpent):
        search.spend()
    assert asked == sorted(asked, reverse=True)
    assert asked[0] > asked[-1] == 0
    assert search.exploration == 0


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


class Unseen(nn.Module):
    """A network of another make than those that the policy practised on: two branches side by side, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 48, 3, 1, 1)
        self.left = nn.Conv2d(48, 64, 3, 2, 1)
        self.right = nn.Conv2d(48, 32, 5, 2, 2)
        self.middle = nn.Conv2d(96, 64, 3, 1, 1)
        self.block = nn.Conv2d(64, 64, 3, 1, 1)
        self.head = nn.Linear(64, tiny.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = self.middle(torch.cat([self.left(x), self.right(x)], 1).relu()).relu()
        return self.head((x + self.block(x).relu()).mean((2, 3)))


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


def test_the_shipped_policy_fits_what_traced_models_show() -> None:
    weights, made = read_policy(SHIPPED), traced(problem())
    assert fits(weights, made)
    assert not fits(weights, problem()), "toys by hand have other features and start from scratch"
    adopt(Search(made, np.random.default_rng(0), None).ppo.policy, weights)
    assert SHIPPED.stat().st_size < 200_000
    settings = tomllib.loads((SHIPPED.parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-data"]["graphprune.agents"] == ["*.safetensors"]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The weights that each search has before its first update."""
    seen: list[Weights] = []
    monkeypatch.setattr(Search, "warm_up", lambda self, updates: seen.append(self.weights()))
    return seen


def test_the_shipped_policy_is_the_start_unless_told_otherwise(started: list[Weights], tmp_path: Path) -> None:
    shipped = read_policy(SHIPPED)
    mine = {name: value + 1 for name, value in shipped.items()}
    save_file(mine, tmp_path / "mine.safetensors")
    own = AutoSculpt(tmp_path / "mine.safetensors")
    for agent in (AutoSculpt(), own, AutoSculpt(None), AutoSculpt(sight=Sight(graph=False))):
        run(agent, traced(problem(trials=1)), 0)
    run(AutoSculpt(), problem(trials=1), 0)

    def same(weights: Weights, other: Weights) -> bool:
        return all(torch.equal(value, other[name]) for name, value in weights.items())

    assert [same(weights, shipped) for weights in started] == [True, False, False, False, False]
    assert [same(weights, mine) for weights in started] == [False, True, False, False, False]


def test_a_policy_for_other_features_is_refused(tmp_path: Path) -> None:
    agent = AutoSculpt(SHIPPED)
    with pytest.raises(InputError, match=r"does not fit this version: size mismatch for .*embed\.weight"):
        agent.run(problem(trials=1), np.random.default_rng(0))
    with pytest.raises(InputError, match="cannot read a policy"):
        AutoSculpt(tmp_path / "none.safetensors")


@pytest.mark.parametrize("limit", [0.35, 0.5, 0.65])
def test_the_first_plan_on_unseen_toys_beats_uniform_and_is_never_worse_than_magnitude(limit: float) -> None:
    ratios = []
    for seed in range(5):
        own, uniform, magnitude = errors_of_first_plans(traced(problem(100 + seed, sizes=(5,) * 10, limit=limit)))
        assert own < uniform
        ratios.append(own / magnitude)
    assert max(ratios) <= 1 + 1e-9
    assert np.exp(np.mean(np.log(ratios))) < 0.99


def test_the_shipped_policy_knows_more_than_an_untrained_one() -> None:
    ratios = []
    for seed in range(5):
        made = traced(problem(100 + seed, sizes=(5,) * 10, limit=0.5))
        starts = (Search(made, np.random.default_rng(0), weights) for weights in (read_policy(SHIPPED), None))
        trained, untrained = (made.error.batch(start.own_plans()).mean() for start in starts)
        ratios.append(trained / untrained)
    assert max(ratios) < 0.8


def test_the_first_plan_on_an_unseen_traced_network_is_no_worse_than_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model, allowed = Unseen().eval(), [patterns()[name] for name in ("filter", "kernel")]
    session = Session.prepare(model, tiny.task(), Target(latency=0.5), FakeEngine(), allowed, None, lambda *_: None)
    made = session.problem(1, {"latency": 0.5})
    made.evaluator = lambda choices: Record(made.plan(choices), accuracy=0.5)
    own, uniform, magnitude = errors_of_first_plans(made)
    assert made.feasible(first_plan("autosculpt", made))
    assert own < uniform
    assert own <= magnitude + 1e-9


@pytest.mark.parametrize("missing", ["nodes", "patterns", "graph", "errors"])
def test_an_ablated_agent_searches_all_the_same(missing: str) -> None:
    made = run(AutoSculpt(sight=Sight(**{missing: False})), traced(problem(2, sizes=(3, 3, 3), trials=5)), 0)
    assert len(made.records) == 5


def test_only_plan_follows_the_wall() -> None:
    made = problem(3, sizes=(2, 3), limit=0.9, trials=1)
    assert only_plan(made) is None
    made.limits = {"latency": made.costs["latency"](made.cheapest)}
    del made.completions
    assert only_plan(made) == made.cheapest == (1, 2)
