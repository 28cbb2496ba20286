"""The Q network and its learning rule: hand-worked targets, symmetry, and a problem solved by enumeration."""

import numpy as np
import pytest
import torch

from graphprune.agents.cutting import Cuts, Cutting, Observer
from graphprune.agents.deep_q import DoubleDQN, double_target, learner, score
from graphprune.agents.policies import reproducible
from tests.agents.toys import problem


def untrained(seed: int = 0) -> tuple[DoubleDQN, Cutting]:
    """A learner whose head is not zero, on a problem with seven sites."""
    made = problem(seed, sizes=(5, 4, 5, 4, 5, 4, 5), limit=0.4)
    rng = np.random.default_rng(seed)
    episodes = Cutting([Observer(Cuts(made, made.error))], 4, lambda choices: -made.error.batch(choices), rng)
    with reproducible(rng):
        dqn = learner(episodes, rng)
        for network in (dqn.q_net, dqn.q_net_target):
            torch.nn.init.normal_(network.features_extractor.head[-1].weight)
    return dqn, episodes


def test_double_target_by_hand() -> None:
    rewards, dones = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    online = torch.tensor([[0.0, 5.0, 1.0], [9.0, 8.0, 7.0], [1.0, 2.0, 3.0]])
    slow = torch.tensor([[10.0, 0.5, 20.0], [-3.0, 30.0, 30.0], [50.0, 50.0, 50.0]])
    assert double_target(rewards, dones, online, slow).tolist() == [[1.5], [-1.0], [-1.0]]


def test_scores_follow_their_cuts() -> None:
    dqn, episodes = untrained()
    seen = episodes.observers[0].sample(
        episodes.observers[0].cuts.starts(6, np.random.default_rng(1)), np.random.default_rng(2)
    )
    scores = score(dqn.q_net, seen)
    order = np.random.default_rng(3).permutation(scores.shape[1])
    moved = score(dqn.q_net, {**seen, "cuts": seen["cuts"][:, order], "values": seen["values"][:, order]})
    assert scores.std() > 0.1
    np.testing.assert_allclose(moved, scores[:, order], rtol=1e-5, atol=1e-5)


def test_a_score_does_not_depend_on_what_else_is_offered() -> None:
    dqn, episodes = untrained()
    seen = episodes.observers[0].sample(
        episodes.observers[0].cuts.starts(6, np.random.default_rng(1)), np.random.default_rng(2)
    )
    few = {**seen, "cuts": seen["cuts"][:, 5:8], "values": seen["values"][:, 5:8]}
    np.testing.assert_allclose(score(dqn.q_net, few), score(dqn.q_net, seen)[:, 5:8], rtol=1e-5, atol=1e-5)


def test_before_any_training_a_score_is_what_the_cut_is_believed_to_change() -> None:
    made = problem(0, sizes=(4,) * 4)
    rng = np.random.default_rng(0)
    observer = Observer(Cuts(made, made.error))
    with reproducible(rng):
        dqn = learner(Cutting([observer], 2, lambda choices: -made.error.batch(choices), rng), rng)
    starts = observer.cuts.starts(5, rng)
    seen = observer.sample(starts, rng)
    added = np.take_along_axis(observer.cuts.errors(starts), seen["cuts"], axis=1)
    np.testing.assert_allclose(score(dqn.q_net, seen), -added, rtol=1e-5, atol=1e-6)


def test_one_update_moves_priorities_to_the_td_errors_and_heeds_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    dqn, _ = untrained()
    with reproducible(np.random.default_rng(0)):
        dqn.learn(4 * 12, log_interval=None)
    drawn = dqn.replay_buffer.draw(16, 1.0)
    told: list[tuple[np.ndarray, np.ndarray]] = []
    monkeypatch.setattr(dqn.replay_buffer, "reprioritise", lambda indices, errors: told.append((indices, errors)))
    with torch.no_grad():
        values = dqn.q_net(drawn.observations).gather(1, drawn.actions)
        chosen = dqn.q_net(drawn.next_observations).argmax(dim=1, keepdim=True)
        after = dqn.q_net_target(drawn.next_observations).gather(1, chosen)
        errors = (drawn.rewards + (1 - drawn.dones) * after - values).numpy()[:, 0]
    before = [parameter.clone() for parameter in dqn.q_net.parameters()]
    for weight, moves in ((0.0, False), (1.0, True)):
        batch = drawn._replace(weights=torch.full_like(drawn.weights, weight))
        monkeypatch.setattr(dqn.replay_buffer, "draw", lambda count, beta, batch=batch: batch)
        dqn.policy.optimizer = torch.optim.SGD(dqn.q_net.parameters(), lr=1e-3)  # which stands still at no gradient
        dqn.train(1, 16)
        np.testing.assert_allclose(told[-1][1], errors, rtol=1e-4, atol=1e-5)
        assert (told[-1][0] == drawn.indices).all()
        assert moves != all(torch.equal(*pair) for pair in zip(before, dqn.q_net.parameters(), strict=True))
