"""Episodes in ratios, against the fronts, the wall and the observer that they are made of."""

import numpy as np
import pytest

from graphprune.agents.fronts import Fronts
from graphprune.agents.ratios import POINTS, Embeddings, RatioEpisodes, Vectors, retrace, walk
from graphprune.searching.environment import BOUND, STATE_FEATURES, Observer
from graphprune.searching.problem import Floats, Problem
from tests.agents.toys import problem, with_branch


def nothing(plans: Vectors) -> Floats:
    return np.zeros(len(plans))


@pytest.mark.parametrize("made", [problem(3, sizes=(4, 2, 5, 3), limit=0.5), with_branch(1, limit=0.5)])
def test_actions_pick_the_nearest_option_between_the_bounds_of_the_wall(made: Problem) -> None:
    sites = len(made.decisions)
    asked = np.random.default_rng(0).random((20, sites))
    asked[0], asked[1] = 0.0, 1.0
    steps = iter(asked.T)
    walks = walk(RatioEpisodes(made, 20, nothing), lambda _: next(steps))
    fronts = Fronts(made)
    overruled = 0
    for row, plan in enumerate(map(tuple, walks.plans.tolist())):
        assert made.allows(plan)
        for site, option in enumerate(plan):
            left = {o: fronts.ratios[site][o] for o in np.flatnonzero(made.mask(plan[:site]))}
            low, high = min(left.values()), max(left.values())
            wanted = low + asked[row, site] * (high - low)
            assert option == min(left, key=lambda o: abs(left[o] - wanted))
            executed = (left[option] - low) / (high - low) if high > low else 0.0
            assert walks.actions[row, site] == pytest.approx(executed)
            overruled += low > 0
    assert overruled > 0
    assert np.abs(walks.actions - asked).max() > 0.1  # what was asked for is not what was executed


def test_options_off_the_front_count_by_what_they_save() -> None:
    made = problem(0, sizes=(3, 4), limit=1.0, pairs=False)
    error = made.error.factors[1].table
    error[1] = error[2] + 0.1  # beaten by option 2 in both
    episodes = RatioEpisodes(made, 1, nothing)
    assert np.isnan(episodes.fronts.ratios[1][1])
    walks = retrace(episodes, np.array([[0, 1]]))
    cost = made.costs["latency"].factors[1].table
    assert walks.plans.tolist() == [[0, 1]]
    assert episodes.executed[0] == pytest.approx([0.0, (cost[0] - cost[1]) / (cost[0] - cost[3])])


def test_embeddings_tell_the_wall_the_curve_and_what_was_executed() -> None:
    made = problem(3, sizes=(4, 2, 5, 3), limit=0.5)
    episodes, observer = RatioEpisodes(made, 8, nothing), Observer(made)
    rng = np.random.default_rng(1)
    walks = walk(episodes, lambda seen: rng.random(len(seen)))
    size = episodes.observation_space.shape[0]
    assert walks.observations.shape == (8, 4, size)
    assert np.abs(walks.observations).max() <= BOUND
    for row, plan in enumerate(walks.plans.tolist()):
        for site in range(4):
            embedding = walks.observations[row, site]
            ratios, legal = episodes.fronts.ratios[site], made.mask(plan[:site])
            assert embedding[-3:-1] == pytest.approx([ratios[legal].min(), ratios[legal].max()])
            assert embedding[-1] == pytest.approx(episodes.executed[row, site - 1] if site else 0.0)
            seen = observer(np.array([plan[:site]], dtype=np.int64).reshape(1, site))
            chosen = [np.abs(ratios - point).argmin() for point in POINTS]
            options = seen["options"][0, chosen].ravel()
            np.testing.assert_allclose(embedding[-3 - len(options) : -3], options, rtol=1e-6)
            state = embedding[-3 - len(options) - STATE_FEATURES : -3 - len(options)]
            np.testing.assert_allclose(state, seen["state"][0], rtol=1e-6)


def test_the_size_of_an_embedding_does_not_depend_on_the_problem() -> None:
    sizes = [(2, 2), (4, 3, 5, 2, 6)]
    shapes = {RatioEpisodes(problem(1, sizes=size), 1, nothing).observation_space.shape for size in sizes}
    assert len(shapes) == 1


def test_retracing_plans_sees_what_walking_to_them_saw() -> None:
    made = problem(2, sizes=(4, 3, 5), limit=0.5)
    rng = np.random.default_rng(0)

    def choose(seen: Embeddings) -> Floats:
        return rng.random(len(seen))

    first = walk(RatioEpisodes(made, 6, lambda plans: plans.sum(axis=1).astype(float)), choose)
    again = retrace(RatioEpisodes(made, 6, nothing), first.plans)
    np.testing.assert_array_equal(again.plans, first.plans)
    np.testing.assert_array_equal(again.observations, first.observations)
    np.testing.assert_array_equal(again.actions, first.actions)
    assert first.worth.tolist() == first.plans.sum(axis=1).tolist()
