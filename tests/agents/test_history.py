"""What AMC takes from earlier searches: on a family of toys, and from a study as a real search leaves it."""

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

from graphprune.agents import create, history
from graphprune.agents.amc import Amc, RatioPolicy, Search
from graphprune.agents.belief import Belief
from graphprune.agents.history import others, practise, rebudgeted, replay, standardised, worse
from graphprune.agents.ratios import RatioEpisodes, Vectors, retrace
from graphprune.agents.wall import passes
from graphprune.engines.fake import FakeEngine
from graphprune.errors import InputError
from graphprune.searching.environment import reward
from graphprune.searching.past import PROBLEM, History, Past, read_past
from graphprune.searching.problem import Floats, Problem
from graphprune.searching.problem_file import pack
from graphprune.searching.search import search
from graphprune.searching.study import Study
from graphprune.target import Target
from tests.agents.family import member
from tests.agents.test_autosculpt import Wider
from tests.graphprune import tiny

SOURCES = range(20, 26)
TARGETS = range(5)
"""Members of the family of toys; a search has the seed of its toy."""
TRIALS = 24


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What random searches of other members of the family leave."""
    path = tmp_path_factory.mktemp("past") / "study.db"
    for seed in SOURCES:
        made = member(seed, trials=40)
        create("random").run(made, np.random.default_rng(seed))
        study = Study.open(path, made.model)
        study.attach(PROBLEM, pack(made))
        for record in dict.fromkeys(record.plan for record in made.records):
            study.add(next(one for one in made.records if one.plan == record))
    return path


def nothing(plans: Vectors) -> Floats:
    return np.zeros(len(plans))


def fresh(made: Problem) -> RatioPolicy:
    return RatioPolicy(RatioEpisodes(made, 1, nothing), np.random.default_rng(0))


def reached(made: Problem) -> Floats:
    """The best accuracy after each trial."""
    best: Floats = np.maximum.accumulate([record.accuracy or 0.0 for record in made.records])
    return best


@pytest.fixture(scope="module")
def scratch() -> dict[int, Floats]:
    """How AMC alone fares on the targets."""
    return {target: searched(Amc(), target) for target in TARGETS}


def searched(agent: Amc, target: int) -> Floats:
    made = member(target, TRIALS)
    agent.run(made, np.random.default_rng(target))
    return reached(made)


def trials_needed(curve: Floats, goal: float) -> int:
    return int(np.argmax(curve >= goal)) + 1 if curve[-1] >= goal else TRIALS + 1


@pytest.mark.parametrize("boosts", [{"transfer": True}, {"augment": True}, {"assistant": True}])
def test_each_boost_alone_needs_fewer_trials(boosts: dict[str, bool], scratch: dict[int, Floats], store: Path) -> None:
    """The median over the targets of the trials until the final reward of the search from scratch is reached."""
    given = History(study=None if "assistant" in boosts else store, **boosts)
    without = [trials_needed(curve, curve[-1]) for curve in scratch.values()]
    needed = [trials_needed(searched(Amc(given), target), scratch[target][-1]) for target in TARGETS]
    assert median(needed) < median(without), (needed, without)


def spoil(past: Past) -> Past:
    """The past of an adversary: what was good is said to be bad."""
    turned = ((plan, replace(record, accuracy=1 - (record.accuracy or 0.0))) for plan, record in past.judged)
    return Past(past.name, past.problem, tuple(turned))


def test_a_misleading_past_is_noticed_and_costs_little(scratch: dict[int, Floats], store: Path) -> None:
    lies = [spoil(past) for past in read_past(store)]
    fallen, ends = [], []
    for target in TARGETS:
        made = member(target, TRIALS)
        one = Search(made, np.random.default_rng(target))
        replay(one.policy, lies)
        one.spend(taught=True)
        fallen.append(one.fell_back)
        ends.append(reached(made)[-1])
    assert sum(fallen) >= 4, fallen
    assert median(ends) >= median(curve[-1] for curve in scratch.values()) - 0.05


def test_worse_is_the_exact_rank_test() -> None:
    """Against the share of all assignments with as small a rank sum, by enumeration."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        own, random = rng.normal(-0.7, 1, 5), rng.normal(0, 1, 6)
        pooled = np.argsort(np.argsort(np.concatenate([own, random])))
        sums = np.array([pooled[list(rows)].sum() for rows in combinations(range(11), 5)])
        assert worse(own.tolist(), random.tolist()) == ((sums <= pooled[:5].sum()).mean() <= history.DOUBT)
    assert not worse([-1.0] * 6, [-1.0] * 6)


def recording(policy: RatioPolicy) -> list[int]:
    """Notes how much the memory holds at each call of `train`, and trains nothing."""
    sizes: list[int] = []
    policy.train = lambda updates: sizes.append(policy.replay.size())  # type: ignore[method-assign]
    return sizes


def test_replaying_remembers_what_was_recorded(store: Path) -> None:
    past = read_past(store)[0]
    forbidden = next(plan for plan in np.ndindex(*(4,) * 6) if not passes(past.problem, plan))
    judged = (*past.judged, (forbidden, past.judged[0][1]))
    policy = fresh(member(1))
    sizes = recording(policy)
    assert replay(policy, [Past(past.name, past.problem, judged)]) == len(past.judged)
    assert sizes == [6 * len(past.judged)]
    assert policy.replay.size() == 0  # the memory is for the problem itself
    plans = np.array([plan for plan, _ in past.judged])
    executed = retrace(RatioEpisodes(past.problem, len(plans), nothing), plans).actions.ravel()
    np.testing.assert_allclose(policy.replay.actions[: sizes[0], 0, 0], 2 * executed - 1, atol=1e-6)
    rewards = np.array([reward(past.problem, record, plan) for plan, record in past.judged])
    each = policy.replay.rewards[: sizes[0], 0].reshape(-1, 6)
    np.testing.assert_allclose(each.sum(axis=1), (rewards - rewards.mean()) / rewards.std(), atol=1e-5)


def test_practice_runs_over_tasks_of_any_budget(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pasts, tasks = read_past(store), []
    inner: Callable[[Problem, float], Problem] = rebudgeted
    monkeypatch.setattr(history, "rebudgeted", lambda *given: tasks.append(inner(*given)) or tasks[-1])
    policy = fresh(member(1))
    sizes = recording(policy)
    practise(policy, pasts, np.random.default_rng(0))
    assert sizes == [6 * history.EPISODES * (number + 1) for number in range(history.TASKS)]
    assert policy.replay.size() == 0
    assert len({task.model for task in tasks}) == len(pasts)
    limits = [task.limits["latency"] for task in tasks]
    assert max(limits) - min(limits) > 0.3


def test_budgets_lie_between_the_cheapest_plan_and_the_dense_model() -> None:
    made = member(3)
    cost = made.costs["latency"]
    for share in (0.0, 0.5, 1.0):
        task = rebudgeted(made, share)
        assert task.limits["latency"] == pytest.approx((1 - share) * cost(made.cheapest) + share * cost(made.dense))
        assert task.feasible(task.cheapest)
        assert task.records is not made.records
    assert rebudgeted(made, 1.0).feasible(made.dense)


def test_imagined_rewards_count_against_random_ratios() -> None:
    values = np.array([1.0, 3.0, 5.0, 9.0])
    assert standardised(values, values[:2]).tolist() == [-1.0, 1.0, 3.0, 7.0]
    assert standardised(np.ones(3), np.ones(2)).tolist() == [0.0, 0.0, 0.0]


def test_no_search_learns_from_its_own_model(store: Path) -> None:
    pasts = read_past(store)
    assert [past.name for past in others(pasts, member(20))] == [f"member {seed}" for seed in SOURCES if seed != 20]
    agent = Amc(History(store, transfer=True))
    only = member(20)
    agent._pasts = pasts[:1]
    with pytest.raises(InputError, match="none of another model"):
        agent.run(only, np.random.default_rng(0))
    assert only.records == []


def test_a_study_is_read_when_the_agent_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no study store"):
        Amc(History(tmp_path / "none.db", transfer=True))


def test_all_boosts_together(store: Path) -> None:
    made = member(4, trials=14)
    agent = Amc(History(store, transfer=True, augment=True, assistant=True))
    agent.run(made, np.random.default_rng(0))
    assert len({record.plan for record in made.records}) == 14
    assert all(record.feasible for record in made.records)


def test_the_assistant_learns_from_each_trial() -> None:
    made = member(4, trials=8)
    belief = Belief(made)
    one = Search(made, np.random.default_rng(0), belief)
    one.spend()
    mean, deviation = belief.predict(np.array(list(one.rewards)))
    assert np.corrcoef(mean, list(one.rewards.values()))[0, 1] > 0.9
    assert (deviation < belief.predict(np.array([made.cheapest]))[1]).all()


def test_one_traced_model_learns_from_the_study_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(history, "REPLAYS", 3)
    monkeypatch.setattr(history, "TASKS", 2)
    engine, target, task = FakeEngine(), Target(latency=0.7), tiny.task()
    first = search(tiny.fitted(), task, target, "random", trials=3, engine=engine, study=tmp_path / "study.db")
    (past,) = read_past(tmp_path)
    assert past.problem.model == first.graph.signature
    plans = [record.plan for record in Study.open(tmp_path / "study.db", past.name).records()]
    assert [past.problem.plan(choices) for choices, _ in past.judged] == plans
    pupil = Amc(History(tmp_path, transfer=True, augment=True))
    torch.manual_seed(0)
    second = search(Wider().eval(), task, target, pupil, trials=3, engine=engine)
    assert second.met
    assert len(second.graph.all_sites) != len(first.graph.all_sites)
    with pytest.raises(InputError, match="none of another model"):
        search(tiny.fitted(), task, target, pupil, trials=3, engine=engine)
