"""The episodes of SparRL against enumeration: what cuts change, which are open, where episodes start, what they pay."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from graphprune.agents.cutting import PRE_PRUNED, SAMPLE, Cuts, Cutting, Observer, Vectors
from graphprune.searching.problem import Factor, Problem, Sum
from tests.agents.toys import feasible_plans, problem, with_branch


def exclusive() -> Problem:
    """Two of the sites rule each other out, and there are two kinds of cost."""
    made = problem(5, sizes=(4, 4, 3, 3), limit=0.6)
    forbidden = np.zeros((4, 4))
    forbidden[1:, 1:] = np.inf
    latency = Sum(0.0, (*made.costs["latency"].factors, Factor((0, 1), forbidden)))
    flops = Sum(0.1, tuple(Factor(factor.sites, 0.9 * factor.table**2) for factor in made.costs["latency"].factors))
    made.costs, made.limits = {"latency": latency, "flops": flops}, {"latency": 0.6, "flops": 0.5}
    return made


PROBLEMS = {
    "pairs": lambda: problem(1, sizes=(4, 3, 1, 4), limit=0.5),
    "branch": lambda: with_branch(1, limit=0.45),
    "exclusive": exclusive,
}


@pytest.fixture(params=PROBLEMS)
def made(request: pytest.FixtureRequest) -> Problem:
    """Problems whose every choice vector can be looked at."""
    return PROBLEMS[request.param]()


def states(made: Problem, cuts: Cuts) -> Vectors:
    """Every state an episode may be in: canonical, short of the target, the target within reach."""
    every = list(product(*(range(len(decision.options)) for decision in made.decisions)))
    vectors = np.array([choices for choices in every if made.canonical(choices) == choices])
    return vectors[~cuts.finished(vectors) & np.isfinite(made.overruns(vectors)) & (cuts.floors(vectors) <= 1 + 1e-9)]


def extends(plan: tuple[int, ...], state: Vectors) -> bool:
    """Whether a plan keeps what a state cuts."""
    return all(option in {0, taken} for option, taken in zip(state.tolist(), plan, strict=True))


def test_what_a_cut_changes_is_what_the_tables_say_of_the_vector_after_it(made: Problem) -> None:
    cuts = Cuts(made, made.error)
    before = states(made, cuts)
    overruns, errors = cuts.overruns(before), cuts.errors(before)
    for cut in range(len(cuts.sites)):
        at = np.flatnonzero(~cuts._gone(before)[:, cuts.sites[cut]])  # elsewhere there is nothing to cut
        after = cuts.take(before[at], np.full(len(at), cut))
        assert overruns[at, cut] == pytest.approx(made.overruns(after))
        change = made.error.batch(after) - made.error.batch(before[at])
        assert errors[at, cut] == pytest.approx(change)


def test_open_cuts_cost_less_and_leave_the_target_within_reach(made: Problem) -> None:
    cuts, plans = Cuts(made, made.error), feasible_plans(made)
    before = states(made, cuts)
    opened = cuts.open(before, cuts.overruns(before))
    assert opened.any(axis=1).all(), "an episode never gets stuck"
    assert 0 < opened.mean() < 1
    for state, open_here in zip(before, opened, strict=True):
        for cut in np.flatnonzero(open_here):
            after = cuts.take(state[None], np.array([cut]))[0]
            assert made.overrun(after) < made.overrun(state)
            assert made.canonical(after) == tuple(after)
            assert any(extends(plan, after) for plan in plans)


def test_a_walk_that_has_to_pay_first_is_not_stuck() -> None:
    """Only both sites together save anything: the completion's cuts are open though the first one costs."""
    made = problem(0, sizes=(2, 2), limit=0.5, pairs=False)
    made.costs = {"latency": Sum(0.0, (Factor((0, 1), np.array([[1.0, 1.1], [1.2, 0.3]])),))}
    made.__dict__["completions"] = ((1, 1),)  # which the problem's own greedy search does not find
    cuts = Cuts(made, made.error)
    dense = np.zeros((1, 2), dtype=np.int64)
    assert cuts.open(dense, cuts.overruns(dense)).tolist() == [[True, True]]
    after = cuts.take(dense, np.array([0]))
    assert cuts.open(after, cuts.overruns(after)).tolist() == [[False, True]]


def test_starts_spread_over_the_way_and_can_be_finished() -> None:
    made = problem(3, sizes=(6,) * 12, limit=0.4)
    cuts = Cuts(made, made.error)
    starts = cuts.starts(600, np.random.default_rng(0))
    dense = made.overrun(made.dense)
    shares = (dense - made.overruns(starts)) / (dense - 1)
    assert shares.min() >= 0
    assert shares.max() <= PRE_PRUNED
    counts, _ = np.histogram(shares, bins=9, range=(0, PRE_PRUNED))
    assert counts.min() >= 600 / 9 / 2
    assert counts.max() <= 600 / 9 * 2
    assert (cuts.floors(starts) <= 1 + 1e-9).all()
    assert len(np.unique(starts, axis=0)) > 400


def test_starts_are_states_from_which_a_feasible_plan_is_left(made: Problem) -> None:
    cuts, plans = Cuts(made, made.error), feasible_plans(made)
    for start in cuts.starts(60, np.random.default_rng(0)):
        assert made.canonical(start) == tuple(start)
        assert any(extends(plan, start) for plan in plans)


def test_only_open_cuts_are_offered(made: Problem) -> None:
    cuts = Cuts(made, made.error)
    before = states(made, cuts)
    opened = cuts.open(before, cuts.overruns(before))
    offered = Observer(cuts).sample(before, np.random.default_rng(0))["cuts"]
    assert offered.shape == (len(before), SAMPLE)
    for row, open_here in zip(offered, opened, strict=True):
        assert set(row.tolist()) == set(np.flatnonzero(open_here).tolist())


def test_where_more_are_open_each_is_offered_as_often_and_none_twice() -> None:
    made = problem(0, sizes=(12,) * 10)
    cuts = Cuts(made, made.error)
    dense = np.zeros((3000, 10), dtype=np.int64)
    opened = int(cuts.open(dense[:1], cuts.overruns(dense[:1])).sum())
    offered = Observer(cuts).sample(dense, np.random.default_rng(0))["cuts"]
    assert opened > SAMPLE
    assert all(len(set(row)) == SAMPLE for row in offered.tolist())
    counts = np.bincount(offered.ravel())
    assert counts[counts > 0] == pytest.approx(3000 * SAMPLE / opened, rel=0.1)


def test_observations_lie_in_their_space(made: Problem) -> None:
    observer = Observer(Cuts(made, made.error))
    seen = observer.sample(states(made, observer.cuts), np.random.default_rng(0))
    space = observer.space
    for number in range(len(seen["decided"])):
        assert space.contains({name: values[number] for name, values in seen.items()})


def test_rewards_add_up_to_the_change_of_the_metric(made: Problem) -> None:
    def metric(choices: Vectors) -> np.ndarray:
        return np.sin(choices @ np.arange(1.0, 1 + choices.shape[1])) * 3

    rng = np.random.default_rng(0)
    episodes = Cutting([Observer(Cuts(made, made.error))], 5, metric, rng)
    start = episodes.reset()["decided"].copy()
    total, ended = np.zeros(5), []
    for _ in range(60):
        episodes.step_async(rng.integers(SAMPLE, size=5))
        seen, rewards, done, _ = episodes.step_wait()
        total += rewards
        for number in np.flatnonzero(done):
            ended.append((metric(start[[number]])[0], total[number]))
            total[number], start[number] = 0.0, seen["decided"][number]
        assert total == pytest.approx(metric(seen["decided"]) - metric(start))
    finals = metric(np.array(episodes.finished))
    assert len(ended) == len(finals) > 20
    assert [first + change for first, change in ended] == pytest.approx(finals)
    assert all(made.allows(plan) for plan in episodes.finished)


@pytest.mark.parametrize("count", [2, 7])
def test_each_target_has_a_share_of_the_episodes(count: int) -> None:
    """Also where there are fewer episodes than targets."""
    limits = (0.6, 0.45, 0.3)
    asked = [replace(problem(0), limits={"latency": limit}) for limit in limits]
    observers = [Observer(Cuts(one, one.error)) for one in asked]
    rng = np.random.default_rng(0)
    episodes = Cutting(observers, count, lambda choices: -asked[0].error.batch(choices), rng)
    before, ended = episodes.reset(), np.zeros(count)
    for _ in range(40):
        actions = rng.integers(SAMPLE, size=count)
        taken = before["cuts"][np.arange(count), actions].astype(np.int64)
        after = observers[0].cuts.take(before["decided"].astype(np.int64), taken)
        episodes.step_async(actions)
        before, _, done, _ = episodes.step_wait()
        of = np.repeat(np.arange(3), [len(own) for own in np.array_split(np.arange(count), 3)])
        assert done.tolist() == [asked[of[number]].feasible(after[number]) for number in range(count)]
        ended += done
    assert (ended > 0).all()
