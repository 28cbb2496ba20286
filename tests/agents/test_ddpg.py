"""DDPG fed by hand: what its memory tells, what its critic learns, and an actor that stays alive at its bounds."""

from math import inf

import numpy as np
import pytest
import torch
from scipy.stats import kstest, truncnorm

from graphprune.agents.bounded import Bounded, BoundedActor
from graphprune.agents.ddpg import BASELINE, Episode, RatioPolicy, truncated_normal
from graphprune.agents.ratios import Embeddings, RatioEpisodes
from tests.agents.toys import problem


def policy_of(sites: int) -> tuple[RatioPolicy, Embeddings]:
    """A policy, and embeddings [sites, D] that are easy to tell apart."""
    episodes = RatioEpisodes(problem(3, sizes=(3,) * sites), 1, lambda plans: np.zeros(len(plans)))
    embeddings = np.eye(sites, *episodes.observation_space.shape, dtype=np.float32)
    return RatioPolicy(episodes, np.random.default_rng(0)), embeddings


def test_rewards_are_seen_less_their_moving_average() -> None:
    policy, embeddings = policy_of(2)
    values = np.array([0.5, 0.9, 0.1, 0.4])
    policy.remember(Episode(embeddings, np.ones(2), 0.7))
    policy.replay.centre(values, 2)
    average = values[0]
    for value in values[1:]:
        average = (1 - BASELINE) * average + BASELINE * value
    drawn = policy.replay.sample(5).rewards.numpy()
    np.testing.assert_allclose(drawn, np.full((5, 1), (0.7 - average) / (2 * values.std())), rtol=1e-5)


def test_the_critic_learns_the_undiscounted_sum() -> None:
    """One state after another, each step worth the same: with gamma 1 Q is what is left of the episode."""
    policy, embeddings = policy_of(3)
    for action in np.linspace(0, 1, 30):
        policy.remember(Episode(embeddings, np.full(3, action), 0.2))
    policy.train(700)
    with torch.no_grad():
        (left,) = policy.ddpg.critic(torch.from_numpy(embeddings), torch.zeros(3, 1))
    assert left.flatten().tolist() == pytest.approx([0.6, 0.4, 0.2], abs=0.05)


def test_the_actor_finds_the_best_action_and_comes_back_from_the_bound() -> None:
    """The reward peaks at another action than the bound at which all earlier rewards made the actor end."""
    policy, embeddings = policy_of(2)
    actions = np.linspace(0, 1, 41)
    for action in actions:
        policy.remember(Episode(embeddings, np.full(2, action), -action))
    policy.train(400)
    assert policy.answers(embeddings, 1e-9) == pytest.approx(np.zeros(2), abs=0.02)
    policy.replay.reset()
    for action in actions:
        policy.remember(Episode(embeddings, np.full(2, action), -4 * (action - 0.7) ** 2))
    policy.train(1500)
    assert policy.answers(embeddings, 1e-9) == pytest.approx(np.full(2, 0.7), abs=0.15)


def test_gradients_are_scaled_by_the_room_that_is_left() -> None:
    answers = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 1.5], requires_grad=True)
    clipped = Bounded()(answers)
    assert clipped.tolist() == [-1.0, -1.0, 0.0, 0.5, 1.0, 1.0]
    (up,) = torch.autograd.grad(-clipped.sum(), answers, retain_graph=True)  # a descent step would raise the answers
    assert up.tolist() == [-1.25, -1.0, -0.5, -0.25, 0.0, 0.25]
    (down,) = torch.autograd.grad(clipped.sum(), answers)
    assert down.tolist() == [-0.25, 0.0, 0.5, 0.75, 1.0, 1.25]


def test_both_actors_are_bounded_that_way() -> None:
    policy, _ = policy_of(2)
    for actor in (policy.ddpg.actor, policy.ddpg.actor_target):
        assert isinstance(actor, BoundedActor)
        assert isinstance(actor.mu[-1], Bounded)


@pytest.mark.parametrize(("mean", "deviation"), [(0.5, 0.5), (0.0, 0.3), (0.9, 0.1)])
def test_noise_is_a_truncated_normal(mean: float, deviation: float) -> None:
    drawn = truncated_normal(np.full(4000, mean), deviation, np.random.default_rng(0))
    law = truncnorm(-mean / deviation, (1 - mean) / deviation, mean, deviation)
    assert kstest(drawn, law.cdf).pvalue > 0.01
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_endless_noise_is_uniform_and_tiny_noise_is_none() -> None:
    assert kstest(truncated_normal(np.full(4000, 0.1), inf, np.random.default_rng(0)), "uniform").pvalue > 0.01
    means = np.array([0.0, 0.3, 1.0])
    assert truncated_normal(means, 1e-9, np.random.default_rng(0)) == pytest.approx(means, abs=1e-6)
