"""Bayesian optimisation with clusters and rollback: its rules one by one, then the search on clustered problems."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from graphprune.agents.base import Agent
from graphprune.agents.bocr import (
    BOCR,
    BayesianOptimisation,
    Box,
    GradualBOCR,
    Process,
    Sample,
    Search,
    averages,
    bounds,
    rolls_back,
)
from graphprune.agents.fronts import Fronts
from graphprune.agents.random_search import RandomSearch
from graphprune.record import Record
from graphprune.searching.problem import BudgetSpent, Choices, Decision, Factor, Floats, Option, Problem, Sum
from tests.agents.toys import feasible_plans, problem, view

SHAPES = (0.05, 0.15, 0.4)
"""How widely the importances of the units of each group of sites are spread."""


def clustered(seed: int, sites: int = 15, trials: int = 40, limit: float = 0.7) -> Problem:
    """Sites in three groups that look different; each has a ratio of its own, from which its sites stray a little.

    Accuracy falls with the mean squared distance from the sites' best ratios.
    """
    rng, shares = np.random.default_rng(seed), np.linspace(1, 0.2, 6)
    group = rng.permutation(np.arange(sites) % 3)
    best = np.clip(rng.permutation([0.1, 0.5, 0.9])[group] + 0.1 * rng.normal(size=sites), 0, 1)

    def accuracy(choices: Choices) -> float:
        return float(np.exp(-6 * np.square(np.array(choices) / 5 - best).mean()))

    def site(number: int) -> Decision:
        options = tuple(Option("channels", str(k), (0,), s, 1 - s, 1 / s) for k, s in enumerate(shares.tolist()))
        importance = 2 + 2 * SHAPES[group[number]] * rng.normal(size=32)
        return Decision(f"site{number}", "channels", number, options, importance=tuple(importance.tolist()))

    made = Problem(
        decisions=tuple(map(site, range(sites))),
        graph=view(rng, sites),
        costs={"latency": Sum(0.0, tuple(Factor((i,), shares / sites) for i in range(sites)))},
        limits={"latency": limit},
        error=Sum(0.0, tuple(Factor((i,), 1 - shares) for i in range(sites))),
        evaluator=lambda choices: Record(
            made.plan(choices), accuracy=accuracy(choices), feasible=made.feasible(choices)
        ),
        trials=trials,
    )
    return made


def judged(made: Problem, values: Callable[[int], float]) -> Problem:
    """The same problem where the n-th plan that is evaluated has accuracy `values(n)`, whatever it is."""
    inner, seen = made.evaluator, []

    def evaluator(choices: Choices) -> Record:
        seen.append(choices)
        return replace(inner(choices), accuracy=values(len(seen)))

    made.evaluator = evaluator
    return made


@dataclass
class Spied:
    """What Gaussian processes were told and asked during a run, each with its number of variables."""

    told: list[tuple[int, Floats]] = field(default_factory=list)
    asked: list[tuple[int, Floats]] = field(default_factory=list)
    begun: list[tuple[int, int]] = field(default_factory=list)
    """Variables of each process, and how many plans had been evaluated when it began."""
    boxes: list[Box] = field(default_factory=list)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Callable[[Problem], Spied]:
    """Replace the proposals by uniform draws, which is fast, and watch."""

    def watch(made: Problem) -> Spied:
        seen = Spied()
        begin, tell = Process.__init__, Process.tell

        def watched_begin(self: Process, box: Box, rng: np.random.Generator) -> None:
            seen.begun.append((len(box.low), len(made.records)))
            seen.boxes.append(box)
            begin(self, box, rng)

        def watched_tell(self: Process, point: Floats, value: float) -> None:
            seen.told.append((len(point), point))
            tell(self, point, value)

        def uniform(self: Process) -> Floats:
            point = self.rng.random(len(self.box.low))
            seen.asked.append((len(point), point))
            return point

        monkeypatch.setattr(Process, "__init__", watched_begin)
        monkeypatch.setattr(Process, "tell", watched_tell)
        monkeypatch.setattr(Process, "ask", uniform)
        return seen

    return watch


def run(agent: Agent, made: Problem, seed: int = 0) -> Problem:
    """Let an agent spend the trials."""
    try:
        agent.run(made, np.random.default_rng(seed))
    except BudgetSpent:
        assert made.remaining == 0
    return made


def test_each_cluster_has_one_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the rollback, every plan is the fronts' answer to one number for each group of the problem."""
    made, asked = clustered(0, trials=40), []
    plan = Fronts.plan
    monkeypatch.setattr(Fronts, "plan", lambda self, ratios: (asked.append(ratios), plan(self, ratios))[1])
    monkeypatch.setattr(Process, "ask", lambda self: self.rng.random(len(self.box.low)))
    spread = np.array([np.std(decision.importance) for decision in made.decisions])
    group = np.searchsorted([0.2, 0.5], spread)
    run(BOCR(), made)
    for ratios in asked[:16]:
        assert all(len(set(np.array(ratios)[group == number].tolist())) == 1 for number in range(3))
    assert len(set(asked[-1])) == 15


def test_averages_are_taken_over_the_sites_of_a_cluster() -> None:
    assert averages(np.array([0.0, 0.5, 1.0, 0.3]), np.array([1, 0, 1, 2])).tolist() == [0.5, 0.5, 0.3]


@pytest.mark.parametrize("agent", [BayesianOptimisation, BOCR])
def test_executed_ratios_are_told_not_those_that_were_asked_for(
    agent: type[BayesianOptimisation], spied: Callable[[Problem], Spied]
) -> None:
    """The wall clips: at so tight a limit what a plan really cuts is far from what was asked for."""
    made = clustered(1, trials=12, limit=0.3)
    seen = spied(made)
    executed = []
    inner, fronts = made.evaluator, Fronts(made)
    made.evaluator = lambda choices: (executed.append(fronts.executed(choices)), inner(choices))[1]
    run(agent(), made)
    each = [point for size, point in seen.told if size == 15][-12:]
    assert np.allclose(each, executed)
    asked = [point for size, point in seen.asked if size == 15]
    assert np.abs(np.array(asked) - np.array(executed[-len(asked) :])).mean() > 0.2


def left_at(values: list[float], trials: int) -> int:
    """The trial after which a cut with the deadline 0.5 is left."""
    due = [done for done in range(1, trials + 1) if rolls_back(values[:done], trials, 0.5)]
    assert due[-1] == trials
    return due[0]


@pytest.mark.parametrize(
    ("best_at", "expected"), [(1, 80), (60, 80), (61, 81), (70, 90), (79, 99), (80, 100), (81, 80), (100, 80)]
)
def test_a_stall_rolls_back_from_two_fifths_of_the_trials_on(best_at: int, expected: int) -> None:
    """Of 200 trials: from 80 on, once 20 in a row were no better than the best before them."""
    assert left_at([1.0 if number >= best_at else 0.5 for number in range(1, 201)], 200) == expected


@pytest.mark.parametrize(("trials", "expected"), [(200, 100), (60, 30)])
def test_without_a_stall_half_of_the_trials_are_for_the_clusters(trials: int, expected: int) -> None:
    assert left_at(list(map(float, range(trials))), trials) == expected
    assert left_at([0.0] * trials, trials) == 0.8 * expected


@pytest.mark.parametrize("agent", [BOCR, GradualBOCR, BayesianOptimisation])
@pytest.mark.parametrize("better", [True, False])
def test_stages_follow_the_rule(
    agent: type[BayesianOptimisation], better: bool, spied: Callable[[Problem], Spied]
) -> None:
    """Of 20 trials: clusters end at 10 and 15 where each plan is better than the last, at 8 and 13 where none is."""
    made = judged(clustered(2, trials=20), lambda number: 0.5 + 0.01 * number if better else 0.5)
    seen = spied(made)
    run(agent(), made)
    first, middle = (10, 15) if better else (8, 13)
    expected = {
        "bo": [(15, 5)],
        "bocr": [(3, 5), (15, first)],
        "bocr-gradual": [(3, 5), (7, first), (15, middle)],
    }
    assert seen.begun == expected[agent.name]
    assert len(made.records) == len({record.plan for record in made.records}) == 20
    last = [point for size, point in seen.told if size == 15]
    assert len(last) == 20  # all that was executed before, then each plan


def samples(made: Problem, count: int) -> list[Sample]:
    """Feasible plans: the nearer to half of everything, the better."""
    fronts, rng = Fronts(made), np.random.default_rng(0)
    found = []
    for spread in rng.permutation(np.linspace(0.02, 0.6, count)).tolist():
        plan = fronts.plan(np.clip(0.5 + spread * rng.normal(size=len(made.decisions)), 0, 1).tolist())
        found.append(Sample(fronts.executed(plan), -spread, True))
    return found


def test_bounds_are_those_of_the_ten_best_and_one_option_more() -> None:
    made = clustered(3, limit=0.9)
    found = samples(made, 30)
    traps = [Sample(np.full(15, place), 2.0, False) for place in (0.0, 1.0)]
    box = bounds([*found, *traps], Fronts(made))
    best = np.array([sample.executed for sample in found if sample.value >= -0.02 - 9.5 * 0.02])
    assert len(best) == 10
    assert box.low == pytest.approx(np.maximum(best.min(axis=0) - 0.2, 0))
    assert box.high == pytest.approx(np.minimum(best.max(axis=0) + 0.2, 1))
    assert (box.high - box.low).min() < 1


def test_fewer_than_ten_feasible_plans_bound_nothing() -> None:
    made = clustered(3, limit=0.9)
    best = sorted(samples(made, 30), key=lambda sample: -sample.value)
    few = [*best[:9], *(replace(sample, feasible=False) for sample in best[9:])]
    box = bounds(few, Fronts(made))
    assert not box.low.any()
    assert (box.high == 1).all()
    assert (bounds([*few, best[9]], Fronts(made)).high < 1).any()


def test_only_after_a_rollback_are_there_bounds(spied: Callable[[Problem], Spied]) -> None:
    """Bounds could be had at once: ten plans are known, and so tight a limit keeps their last sites from 0."""
    made = clustered(2, trials=60, limit=0.9)
    seen = spied(made)
    run(BOCR(), made)
    first, last = seen.boxes
    assert seen.begun[0] == (3, 10)
    assert (first.high - first.low).tolist() == [1, 1, 1]
    executed = np.array([point for size, point in seen.told if size == 15])[: seen.begun[1][1]]
    best = executed[np.argsort([-(record.accuracy or 0) for record in made.records[: len(executed)]])[:10]]
    assert last.low == pytest.approx(np.maximum(best.min(axis=0) - 0.2, 0))
    assert last.high == pytest.approx(np.minimum(best.max(axis=0) + 0.2, 1))


def parabola(point: Floats) -> float:
    """Largest at (0.3, 0.6)."""
    return -float(np.square(point - [0.3, 0.6]).sum())


def test_the_process_finds_the_maximum() -> None:
    process, rng = Process(Box(np.zeros(2), np.ones(2)), np.random.default_rng(0)), np.random.default_rng(1)
    for _ in range(5):
        process.tell(point := rng.random(2), parabola(point))
    asked = []
    for _ in range(10):
        asked.append(process.ask())
        process.tell(asked[-1], parabola(asked[-1]))
    assert max(asked, key=parabola) == pytest.approx([0.3, 0.6], abs=0.05)


def test_the_process_learns_from_outside_its_box_and_proposes_inside() -> None:
    box = Box(np.array([0.5, 0.2, 0.4]), np.array([0.9, 0.2, 0.7]))
    process, rng = Process(box, np.random.default_rng(0)), np.random.default_rng(1)
    for _ in range(20):
        point = np.r_[0.5 * rng.random(), rng.random(2)]
        process.tell(point, parabola(point[[0, 2]]))
    asked = np.array([process.ask() for _ in range(2)])
    assert (asked >= box.low).all()
    assert (asked <= box.high).all()
    assert asked[:, 0] == pytest.approx(0.5, abs=0.1)  # the edge that is nearest to the maximum


def test_what_is_known_is_varied_until_it_is_new() -> None:
    made = problem(sizes=(3, 2, 2), limit=1.0, trials=30, pairs=False)
    search = Search(made, np.random.default_rng(0))
    for _ in range(20):
        if len(search.samples) < 12:
            search.evaluate(np.full(3, 0.5), np.arange(3))
    assert set(search.samples) == set(feasible_plans(made))
    assert search.evaluate(np.full(3, 0.5), np.arange(3)) is None
    assert len(made.records) == 12


def test_clusters_that_offer_nothing_new_roll_back_at_once(spied: Callable[[Problem], Spied]) -> None:
    """Four equal sites are one cluster; under one ratio they have three plans."""
    made = problem(sizes=(3, 3, 3, 3), limit=1.0, trials=100, pairs=False)
    made.decisions = tuple(replace(decision, importance=(1.0, 2.0)) for decision in made.decisions)
    seen = spied(made)
    run(BOCR(), made)
    assert seen.begun == [(1, 3), (4, 3)]
    assert len({record.plan for record in made.records}) == len(made.records) >= 40


def test_clusters_help_where_sites_come_in_groups_and_both_beat_chance() -> None:
    def best(agent: Agent, seed: int) -> float:
        made = run(agent, clustered(seed, sites=12, trials=20), seed)
        assert len(made.records) == 20
        return max(record.rank[1] for record in made.records)

    found = np.array([[best(kind(), seed) for kind in (RandomSearch, BayesianOptimisation, BOCR)] for seed in range(2)])
    assert (np.diff(found, axis=1) > 0).all(), found
